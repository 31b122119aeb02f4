"""circuits view."""

from __future__ import annotations

import contextlib
import dataclasses
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from circuits.plotting.graph_page.server import open_server


@dataclass(frozen=True)
class ViewOptions:
    """Explore a run folder's attribution graph in the browser, whatever its size. Ctrl-C ends it.

    circuits view runs/graphs/the-capital-of-the-state-1a2b3c4d
    circuits view my_graph --port 8123 --no-browser

    Only this machine can open the page, but all of its users can. Pinned nodes and supernodes are
    kept in the folder, in groups.json.
    """

    folder: tyro.conf.Positional[Path] = dataclasses.field(kw_only=True)
    """The folder that holds graph.safetensors."""
    port: int = 8000
    """Port of the page's address; 0 chooses a free one."""
    browser: bool = True
    """Open the page in the browser."""


def view_command(words: Sequence[str]) -> None:
    """Serve the page of an attribution graph until Ctrl-C."""
    options = tyro.cli(ViewOptions, prog="circuits view", args=words)
    server = open_server(options.folder, options.port)
    with contextlib.suppress(KeyboardInterrupt), server:
        text = f"{options.folder} is shown at {server.url} (Ctrl-C ends this)"
        Console().print(text, soft_wrap=True, highlight=False, markup=False)
        if options.browser:
            webbrowser.open(server.url)
        server.serve_forever()
