"""The server behind `circuits view`: one graph, for this machine only.

It answers a fixed list of addresses and derives no file path from a request.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import socket
import socketserver
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from circuits.attribution.feature_graph import FILE, FeatureGraph
from circuits.plotting.graph_page.data import GraphData, JsonObject
from circuits.plotting.graph_page.groups import grouped_names, load_groups, save_groups
from circuits.plotting.graph_page.page import compact_json, served_page
from circuits.plotting.graph_page.queries import QUERIES, answer
from circuits.system.errors import InputError, NotWrittenError
from circuits.system.files import is_file, path_of
from circuits.system.numbers import WholeNumber, whole

ADDRESS = "127.0.0.1"
HOST_NAMES = ("localhost", ADDRESS, "[::1]")
PAGE, GROUPS = "/", "/api/groups"
TEXT = "text/plain; charset=utf-8"
LARGEST_BODY = 1 << 20
# Python refuses to parse numbers of thousands of digits.
MAX_LENGTH_DIGITS = 18
# For the whole of a request, from the connection to the last byte of its body.
REQUEST_SECONDS = 20
MOST_CONNECTIONS = 512
DRAIN_SECONDS, DRAIN_BYTES = 2, 1 << 24
# Other pages may neither frame this one nor read its answers.
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    # So that the unread rest of a refused request is not taken for the next request.
    "Connection": "close",
}
NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"


class HttpError(Exception):
    """A request that is refused; the arguments are the HTTP status and the reason."""


class GraphServer(ThreadingHTTPServer):
    """Serves the graph of one run folder at `url`, once `serve_forever` runs."""

    daemon_threads = True

    def __init__(self, folder: Path, data: GraphData, port: int) -> None:
        self.folder, self.data = folder, data
        title = data.graph.prompt or folder.name
        details = _details(data.graph)
        page, policy = served_page(data, title, details)
        self.page = page.encode(errors="replace")
        self.free_connections = BoundedSemaphore(MOST_CONNECTIONS)
        self.policy = f"{policy}; frame-ancestors 'none'"
        super().__init__((ADDRESS, port), GraphRequestHandler)
        self.hosts = {f"{name}:{self.server_port}" for name in HOST_NAMES}
        if self.server_port == 80:
            # Browsers leave out the default port of HTTP.
            self.hosts.update(HOST_NAMES)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def groups(self) -> JsonObject:
        """Return the reader's groups and the table of the nodes in them."""
        groups = load_groups(self.folder, self.data)
        data = self.data
        numbers = [data.numbers[name] for name in grouped_names(groups)]
        return {**groups, "nodes": data.node_table(numbers)}

    def save(self, groups: Any) -> None:
        """Write the reader's groups into the folder."""
        try:
            save_groups(self.folder, self.data, groups)
        except (OSError, NotWrittenError) as error:
            reason = f"groups.json could not be written into {self.folder}: {error}"
            raise HttpError(HTTPStatus.INTERNAL_SERVER_ERROR, reason) from error

    def server_bind(self) -> None:
        """Bind without looking up this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own; close connections beyond the number that may be open."""
        if self.free_connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report readers who closed their connection."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def open_server(folder: str | Path, port: WholeNumber) -> GraphServer:
    """Open the server of a folder's graph, at a free port if it is 0; the caller runs it.

    Raises:
        InputError: there is no graph, graph or groups are damaged, or the port is not available.
    """
    folder = path_of(folder)
    if not is_file(folder / FILE):
        raise InputError(f"{folder} holds no {FILE}; give a folder that circuits graph made.")
    port = whole(port, "port")
    if not 0 <= port <= 65535:
        raise InputError(
            f"--port {port} is no port; give a number from 1 to 65535, or 0 for a free one."
        )
    data = GraphData.of(FeatureGraph.load(folder))
    # Damaged groups are refused now, before a reader's work could replace them.
    load_groups(folder, data)
    try:
        return GraphServer(folder, data, port)
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        reason = "is taken" if is_taken else f"is not available ({error.strerror})"
        raise InputError(
            f"port {port} {reason}; choose another with --port, or 0 for a free one."
        ) from error


def _details(graph: FeatureGraph) -> dict[str, str]:
    names = {
        "model": graph.model and graph.model.name,
        "transcoders": graph.transcoders and graph.transcoders.name,
    }
    return {label: name for label, name in names.items() if name}


class RequestReader(io.RawIOBase):
    """Reads from a connection until a deadline, however slowly the bytes come."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self.connection = connection
        self.allow(seconds)

    def allow(self, seconds: float) -> None:
        """Set the deadline, from now on."""
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        """As a buffer around this one asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what there is; raise TimeoutError at the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request takes too long")
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class GraphRequestHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: GraphServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "circuits", ""

    def setup(self) -> None:
        """Read with a deadline for the whole request."""
        super().setup()
        self.rfile.close()
        self.reader = RequestReader(self.connection, REQUEST_SECONDS)
        self.rfile = io.BufferedReader(self.reader)

    def do_GET(self) -> None:
        """Send the page or the answer to one of its queries."""
        with self._refusals():
            self._check_host()
            path, _, query = self.path.partition("?")
            if path == PAGE:
                page, policy = self.server.page, self.server.policy
                self._send(HTTPStatus.OK, page, "text/html; charset=utf-8", policy)
            elif path == GROUPS:
                self._send_json(self.server.groups())
            elif path in QUERIES:
                found = answer(self.server.data, path, query)
                self._send_json(found)
            else:
                self._refuse_address()

    def do_POST(self) -> None:
        """Save groups."""
        with self._refusals():
            self._check_host()
            if self.path != GROUPS:
                self._refuse_address()
            self._check_origin()
            self.server.save(self._json_body())
            self._send_json({"saved": True})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the base class refuses: other methods, and requests it cannot parse."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            with self._refusals():
                self._check_host()
                self._refuse_address()
            return
        # The base class may not have set these yet: it reports a request line that it cannot parse.
        self.path, self.command = "", ""
        self.request_version = self.protocol_version
        status = HTTPStatus(code)
        self._refuse(status, status.phrase)

    def _refuse_address(self) -> None:
        path, *_ = self.path.partition("?")
        exists = path in {PAGE, GROUPS, *QUERIES}
        reason = f"{self.command[:20]} is not for this address."
        _require(not exists, HTTPStatus.METHOD_NOT_ALLOWED, reason)
        raise HttpError(HTTPStatus.NOT_FOUND, "there is nothing at this address.")

    def _check_host(self) -> None:
        # A page elsewhere could make its own name point here. A request with two hosts could mean
        # either, so it names none of ours.
        hosts = self._all("Host")
        known = self.server.hosts
        is_ours = len(hosts) == 1 and hosts[0] in known
        reason = f"this server answers at {self.server.url} only."
        _require(is_ours, HTTPStatus.FORBIDDEN, reason)

    def _check_origin(self) -> None:
        # Browsers name the page that a write comes from. Programs name none, and no page can
        # mislead them.
        allowed = {f"http://{host}" for host in self.server.hosts}
        origins = set(self._all("Origin"))
        _require(origins <= allowed, HTTPStatus.FORBIDDEN, "another page may not write here.")
        is_json = self.headers.get_content_type() == "application/json"
        _require(is_json, HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json.")

    def _json_body(self) -> Any:
        try:
            body = self.rfile.read(self._body_length())
            return json.loads(body)
        except TimeoutError as error:
            reason = f"the request took longer than {REQUEST_SECONDS} seconds."
            raise HttpError(HTTPStatus.REQUEST_TIMEOUT, reason) from error
        except (ValueError, RecursionError) as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, "the body is not JSON.") from error

    def _body_length(self) -> int:
        lengths = self._all("Content-Length")
        is_whole = bool(lengths) and "Transfer-Encoding" not in self.headers
        reason = "send the body in one piece, with Content-Length."
        _require(is_whole, HTTPStatus.LENGTH_REQUIRED, reason)
        digits = lengths[0]
        is_number = digits.isascii() and digits.isdecimal()
        is_one = is_number and len(lengths) == 1
        _require(is_one, HTTPStatus.BAD_REQUEST, "Content-Length is not a number.")
        fits = len(digits) <= MAX_LENGTH_DIGITS and int(digits) <= LARGEST_BODY
        reason = f"the body is larger than {LARGEST_BODY:,} bytes."
        _require(fits, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, reason)
        return int(digits)

    def _all(self, name: str) -> list[str]:
        """Every value of a header, which a request may repeat."""
        values = self.headers.get_all(name) or []
        return [value.strip().lower() for value in values]

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Answer errors with their status and reason."""
        try:
            yield
        except HttpError as error:
            self._refuse(*error.args)
        except InputError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        line = f"{reason}\n".encode(errors="replace")
        self._send(status, line, TEXT)
        if self.command not in ("", "GET"):
            self._drain()

    def _drain(self) -> None:
        """Read what the client still sends, for a while; closing now could lose the answer."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.allow(DRAIN_SECONDS)
            self.rfile.read(DRAIN_BYTES)

    def _send_json(self, content: JsonObject) -> None:
        body = compact_json(content).encode()
        self._send(HTTPStatus.OK, body, "application/json")

    def _send(
        self, status: HTTPStatus, body: bytes, content_type: str, policy: str = NOTHING_ALLOWED
    ) -> None:
        headers = {
            **HEADERS,
            "Content-Security-Policy": policy,
            "Content-Type": content_type,
            "Content-Length": str(len(body)),
        }
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = "GET, POST" if self.path == GROUPS else "GET"
        # The client may take its time again to read the answer.
        self.connection.settimeout(REQUEST_SECONDS)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no log: readers see the command's own line."""


def _require(holds: bool, status: HTTPStatus, reason: str) -> None:
    if not holds:
        raise HttpError(status, reason)
