"""circuits view."""

from __future__ import annotations

import contextlib
import webbrowser
from pathlib import Path

from tyro.conf import Positional

from circuits.cli.console import terminal
from circuits.plotting.graph_page.server import open_server


def command(folder: Positional[Path], port: int = 8000, browser: bool = True) -> None:
    """Explore a run folder's attribution graph in the browser, whatever its size. Ctrl-C ends it.

    $ circuits view runs/graphs/the-capital-of-the-state-1a2b3c4d
    $ circuits view my_graph --port 8123 --no-browser

    Only this machine can open the page, but all of its users can. Pinned nodes and supernodes are
    kept in the folder, in groups.json.

    Args:
        folder: The folder that holds graph.safetensors.
        port: Port of the page's address; 0 chooses a free one.
        browser: Open the page in the browser.
    """
    with contextlib.suppress(KeyboardInterrupt), open_server(folder, port) as server:
        text = f"{folder} is shown at {server.url} (Ctrl-C ends this)"
        terminal().print(text, soft_wrap=True, highlight=False)
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()
