"""The server behind `circuits view`: one graph, on this machine only.

It answers a fixed list of addresses and reads no path from any of them. Requests that name another host are refused (a page elsewhere could
have its own name point here), and so are writes that come from another page.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from circuits.attribution.feature_graph import FILE, FeatureGraph
from circuits.plotting.graph_page.data import GraphData
from circuits.plotting.graph_page.groups import load_groups, save_groups
from circuits.plotting.graph_page.page import served_page
from circuits.plotting.graph_page.queries import QUERIES
from circuits.system.errors import InputError

ADDRESS = "127.0.0.1"
PAGE, GROUPS = "/", "/api/groups"
LARGEST_BODY = 1 << 20
SECONDS = 20  # that a request may take to arrive
LET_GO_SECONDS, LET_GO_BYTES = 2, 1 << 24
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"


class RefusedError(Exception):
    """A request that is not answered: a status, and why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class GraphServer(ThreadingHTTPServer):
    """Serves the graph of one folder. `serve_forever` runs it; `url` is where."""

    daemon_threads = True

    def __init__(
        self, folder: Path, data: GraphData, port: int, *, title: str, details: Mapping[str, str]
    ) -> None:
        self.folder, self.data = folder, data
        page, policy = served_page(data, title=title, details=details)
        self.page, self.policy = page.encode(errors="replace"), f"{policy}; frame-ancestors 'none'"
        self.writing = threading.Lock()
        super().__init__((ADDRESS, port), _Handler)
        port = self.server_address[1]
        names = [f"{host}:{port}" for host in ("localhost", ADDRESS, "[::1]")]
        self.hosts = frozenset(names + (["localhost", ADDRESS, "[::1]"] if port == 80 else []))

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def groups(self) -> dict[str, Any]:
        """What was kept of the reader's work, and the nodes it names."""
        kept = load_groups(self.folder, self.data)
        names = [*kept["pinned"], *(name for one in kept["supernodes"] for name in one["nodes"])]
        numbers = torch.tensor([self.data.numbers[name] for name in names], dtype=torch.long)
        return {**kept, "nodes": self.data.columns(numbers)}

    def keep(self, content: Any) -> None:
        """Write the reader's work into the folder."""
        with self.writing:
            try:
                save_groups(self.folder, self.data, content)
            except OSError as error:
                reason = f"groups.json could not be written into {self.folder}: {error.strerror}."
                raise RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, reason) from error

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of readers who went away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def open_server(folder: str | Path, port: int) -> GraphServer:
    """The server of a folder's graph, not yet running. Port 0 takes a free one.

    Raises:
        InputError: the folder holds no graph, its graph or groups are damaged, or the port cannot be had.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} holds no {FILE}; give a folder that circuits graph made.")
    if not 0 <= port <= 65535:
        raise InputError(
            f"--port {port} is no port; give a number from 1 to 65535, or 0 for a free one."
        )
    graph = FeatureGraph.load(folder)
    data = GraphData.of(graph)
    load_groups(folder, data)
    try:
        return GraphServer(
            folder, data, port, title=graph.prompt or folder.name, details=_details(graph)
        )
    except OSError as error:
        reason = (
            "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        )
        raise InputError(
            f"port {port} {reason}; choose another with --port, or 0 for a free one."
        ) from error


def _details(graph: FeatureGraph) -> dict[str, str]:
    made = {
        "model": graph.model and graph.model.name,
        "transcoders": graph.transcoders and graph.transcoders.name,
    }
    return {name: text for name, text in made.items() if text}


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: GraphServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "circuits", ""
    timeout = SECONDS

    def do_GET(self) -> None:
        """The page, or what it asks for."""
        with self._refusals():
            self._check_host()
            path, _, query = self.path.partition("?")
            if path == PAGE:
                self._send(
                    HTTPStatus.OK, self.server.page, "text/html; charset=utf-8", self.server.policy
                )
            elif path == GROUPS:
                self._send_json(self.server.groups())
            elif path in QUERIES:
                self._send_json(QUERIES[path](self.server.data, query))
            else:
                raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address.")

    def do_POST(self) -> None:
        """Groups to be kept."""
        with self._refusals():
            self._check_host()
            if self.path != GROUPS:
                self._refuse_method()
            self._check_origin()
            self.server.keep(self._body())
            self._send_json({"saved": True})

    def do_other(self) -> None:
        """Any other method."""
        with self._refusals():
            self._check_host()
            self._refuse_method()

    def __getattr__(self, name: str) -> Any:
        # How the base class looks up what handles a method.
        if name.startswith("do_"):
            return self.do_other
        raise AttributeError(name)

    def _refuse_method(self) -> None:
        if self.path.partition("?")[0] in {PAGE, GROUPS, *QUERIES}:
            raise RefusedError(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command[:20]} is not for this address."
            )
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing at this address.")

    def _check_host(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or hosts[0].strip().lower() not in self.server.hosts:
            raise RefusedError(
                HTTPStatus.FORBIDDEN, f"this server answers at {self.server.url} only."
            )

    def _check_origin(self) -> None:
        """Browsers name the page that a write comes from; programs, which name none, cannot be misled by a page."""
        origins = self.headers.get_all("Origin") or []
        if any(
            origin.strip().lower() not in {f"http://{host}" for host in self.server.hosts}
            for origin in origins
        ):
            raise RefusedError(HTTPStatus.FORBIDDEN, "another page may not write here.")
        if self.headers.get_content_type() != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json.")

    def _body(self) -> Any:
        """What was sent, if its length was said and is not too large."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or not lengths:
            raise RefusedError(
                HTTPStatus.LENGTH_REQUIRED, "send the body in one piece, with Content-Length."
            )
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "Content-Length is not a number.")
        if len(lengths[0]) > 18 or int(lengths[0]) > LARGEST_BODY:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body is larger than {LARGEST_BODY:,} bytes.",
            )
        try:
            return json.loads(self.rfile.read(int(lengths[0])))
        except (ValueError, RecursionError) as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is not JSON.") from error

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except RefusedError as refused:
            self._refuse(refused.status, refused.reason)
        except InputError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # What was not read of the request must not be taken for the next one.
        self.close_connection = True
        self._send(status, f"{reason}\n".encode(errors="replace"), "text/plain; charset=utf-8")
        if self.command != "GET":
            self._let_go()

    def _let_go(self) -> None:
        """Take in what is still being sent, for a while: closing in the midst of it would lose the answer on its way."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LET_GO_SECONDS)
            left = LET_GO_BYTES
            while left > 0 and (part := self.connection.recv(1 << 16)):
                left -= len(part)

    def _send_json(self, content: Any) -> None:
        self._send(
            HTTPStatus.OK,
            json.dumps(content, allow_nan=False, separators=(",", ":")).encode(),
            "application/json",
        )

    def _send(
        self, status: HTTPStatus, body: bytes, kind: str, policy: str = NOTHING_ALLOWED
    ) -> None:
        self.send_response(status)
        headers = {
            **HEADERS,
            "Content-Security-Policy": policy,
            "Content-Type": kind,
            "Content-Length": str(len(body)),
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, POST" if self.path == GROUPS else "GET"
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, such as a first line that is no request, in the same form as our own refusals."""
        self.path, self.command = getattr(self, "path", ""), self.command or ""
        self.request_version = getattr(self, "request_version", "") or self.protocol_version
        self.close_connection = True
        self._send(
            HTTPStatus(code), f"{HTTPStatus(code).phrase}\n".encode(), "text/plain; charset=utf-8"
        )

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the command's own line is what people read."""
