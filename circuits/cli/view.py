"""circuits view."""

from __future__ import annotations

import contextlib
import webbrowser
from typing import Annotated

import tyro

from circuits.cli.console import terminal
from circuits.cli.parsing.options import ViewOptions
from circuits.cli.progress import phase
from circuits.plotting.graph_page.server import open_server


def command(options: Annotated[ViewOptions, tyro.conf.arg(name="")]) -> None:
    """Serve the page until Ctrl-C."""
    with phase(f"reading {options.folder}"):
        server = open_server(options.folder, options.port)
    with contextlib.suppress(KeyboardInterrupt), server:
        text = f"{options.folder} is shown at {server.url} (Ctrl-C ends this)"
        terminal().print(text, soft_wrap=True, highlight=False)
        if options.browser:
            webbrowser.open(server.url)
        server.serve_forever()
