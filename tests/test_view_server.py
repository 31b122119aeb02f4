"""The server behind `circuits view`: what it answers, what it refuses, and that very large graphs
stay usable in a real browser.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import tyro
from browser import Browser, wait_for
from synthetic_feature_graph import SENTENCE, synthetic_graph

from circuits.attribution.feature_graph import EMBEDDING, TARGET, FeatureGraph
from circuits.attribution.influence import prune
from circuits.cli.main import main
from circuits.cli.view import command
from circuits.plotting.graph_page.data import GraphData
from circuits.plotting.graph_page.server import LARGEST_BODY, GraphServer, open_server
from circuits.system.errors import InputError

GROUPS = {
    "pinned": ["f3.7185@12"],
    "supernodes": [{"name": "say a capital", "nodes": ["f0.2173@3", "f0.6007@3"]}],
    "node_threshold": 0.7,
}
JSON = {"Content-Type": "application/json"}
Start = Callable[[FeatureGraph], GraphServer]


@pytest.fixture(scope="module")
def graph() -> FeatureGraph:
    return synthetic_graph()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[GraphServer] = []

    def started(graph: FeatureGraph) -> GraphServer:
        graph.save(tmp_path)
        running.append(open_server(tmp_path, 0))
        threading.Thread(
            target=running[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return running[-1]

    yield started
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(start: Start, graph: FeatureGraph) -> GraphServer:
    return start(graph)


def ask(
    server: GraphServer,
    path: str,
    *,
    method: str = "GET",
    body: bytes | None = None,
    **headers: str,
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    try:
        connection.request(
            method,
            path,
            body=body,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        response = connection.getresponse()
        return (
            response.status,
            response.read(),
            {name.lower(): value for name, value in response.getheaders()},
        )
    finally:
        connection.close()


def answer(server: GraphServer, path: str) -> Any:
    status, body, _ = ask(server, path)
    assert status == 200, body
    return json.loads(body)


def send(server: GraphServer, content: Any, **headers: str) -> tuple[int, str]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    status, text, _ = ask(
        server,
        "/api/groups",
        method="POST",
        body=body,
        **{"Content-Type": "application/json", **headers},
    )
    return status, text.decode()


def raw(server: GraphServer, request: bytes) -> bytes:
    """The answer to a request as it is, which clients would not send."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
            if b"Connection: close" not in part and part.endswith(b"\n"):
                break
        return b"".join(parts)


def status_of(server: GraphServer, target: bytes) -> int:
    host = f"127.0.0.1:{server.server_port}".encode()
    return int(
        raw(
            server,
            b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n",
        ).split(b" ")[1]
    )


# What it answers


def test_the_page_and_the_data_come_with_headers_that_keep_other_pages_out(
    server: GraphServer,
) -> None:
    for path, kind in (
        ("/", "text/html; charset=utf-8"),
        ("/api/nodes", "application/json"),
        ("/nothing", "text/plain; charset=utf-8"),
    ):
        _, body, headers = ask(server, path)
        assert headers["content-type"] == kind and int(headers["content-length"]) == len(body)
        assert (
            headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        )
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert (
            "frame-ancestors 'none'" in headers["content-security-policy"]
            and "unsafe" not in headers["content-security-policy"]
        )
        assert (
            headers["cross-origin-resource-policy"] == "same-origin"
            and "access-control-allow-origin" not in headers
        )
        assert "python" not in headers["server"].lower()


def test_it_listens_on_this_machine_only(server: GraphServer) -> None:
    assert (
        server.server_address[0] == "127.0.0.1"
        and server.url == f"http://127.0.0.1:{server.server_port}/"
    )


def test_nodes_are_what_prune_keeps_up_to_the_limits(
    server: GraphServer, graph: FeatureGraph
) -> None:
    kept = prune(graph, node_threshold=0.6, edge_threshold=0.9)
    found = answer(server, "/api/nodes?node_threshold=0.6&edge_threshold=0.9")
    assert found["nodes"]["id"] == kept.nodes.nonzero().flatten().tolist()
    assert found["kept"] == {"nodes": int(kept.nodes.sum()), "edges": int(kept.edges.sum())}
    fewer = answer(
        server, "/api/nodes?node_threshold=0.6&edge_threshold=0.9&max_nodes=30&max_edges=5"
    )
    assert (
        len(fewer["nodes"]["id"]) == 30
        and len(fewer["edges"]["source"]) == 5
        and fewer["kept"] == found["kept"]
    )


def test_edges_of_a_node_go_by_name_or_number(server: GraphServer, graph: FeatureGraph) -> None:
    by_name = answer(server, "/api/edges?node=f3.7185@12&most=6")
    assert by_name == answer(server, f"/api/edges?node={graph.find('f3.7185@12')}&most=6")
    names = dict(zip(by_name["nodes"]["id"], by_name["nodes"]["name"], strict=True))
    assert [names[number] for number in by_name["incoming"]["node"]] == graph.incoming(
        "f3.7185@12", 6
    )["node"].tolist()
    assert by_name["outgoing"]["weight"] == pytest.approx(
        graph.outgoing("f3.7185@12", 6)["weight"].tolist(), rel=1e-6
    )


def test_edges_between_nodes_and_search(server: GraphServer, graph: FeatureGraph) -> None:
    target, source = (
        len(graph.nodes) - 1,
        graph.find(graph.incoming(str(graph.node(len(graph.nodes) - 1)), 1)["node"][0]),
    )
    between = answer(server, f"/api/between?node={target},{source}")
    assert (between["source"], between["target"]) == ([source], [target])
    assert answer(server, f"/api/search?text={quote('Dallas')}&most=3") == GraphData.of(
        graph
    ).search("Dallas", 3)


@pytest.mark.parametrize(
    "path, said",
    [
        ("/api/nodes?node_threshold=2", "node_threshold='2'"),
        ("/api/nodes?node_threshold=nan", "from 0 to 1"),
        ("/api/nodes?max_nodes=-1", "max_nodes='-1'"),
        ("/api/nodes?folder=/etc", "cannot be given here"),
        ("/api/nodes?max_nodes=1&max_nodes=2", "not twice"),
        ("/api/nodes?%ff=1", "query"),
        ("/api/nodes?" + "&".join(f"a{number}=1" for number in range(99)), "query"),
        ("/api/edges", "no such node"),
        ("/api/edges?node=f9.9@9", "no such node"),
        ("/api/edges?node=168", "no such node"),
        ("/api/edges?node=" + "1," * 3 + "%00", "no such node"),
    ],
)
def test_values_that_cannot_be_used_are_told(server: GraphServer, path: str, said: str) -> None:
    status, body, _ = ask(server, path)
    assert status == 400 and said in body.decode() and len(body) < 400


SERVER = "circuits.plotting.graph_page.server"
POST = b"POST /api/groups HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("part", ["request line", "headers", "body"])
def test_a_client_that_sends_byte_by_byte_is_cut_off(
    server: GraphServer, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(f"{SERVER}.REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(f"{SERVER}.DRAIN_SECONDS", 0.1)
    host = f"127.0.0.1:{server.server_port}".encode()
    sent = {"request line": b"GET /", "headers": POST % host + b"X: ", "body": POST % host}[part]
    if part == "body":
        sent += b"Content-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as connection:
        connection.sendall(sent)
        connection.settimeout(0.02)
        said = b""
        for _ in range(400):
            try:
                connection.send(b"x")
                piece = connection.recv(1 << 16)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            said += piece
            if not piece:
                break
        else:
            pytest.fail("the connection is still open")
    assert (b" 408 " in said) == (part == "body")
    assert ask(server, "/api/groups")[0] == 200


def test_the_number_of_open_connections_is_limited(
    start: Start, graph: FeatureGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{SERVER}.MOST_CONNECTIONS", 2)
    server = start(graph)
    address = ("127.0.0.1", server.server_port)
    with socket.create_connection(address), socket.create_connection(address):
        with pytest.raises(ConnectionError):
            ask(server, "/api/groups")
    # The two are closed, and their threads will notice.
    for _ in range(200):
        try:
            assert ask(server, "/api/groups")[0] == 200
            break
        except ConnectionError:
            threading.Event().wait(0.02)
    else:
        pytest.fail("closed connections are still counted")


def test_many_requests_at_once_get_their_own_answers(
    server: GraphServer, graph: FeatureGraph
) -> None:
    paths = [f"/api/edges?node={number}&most=5" for number in range(60)] + [
        f"/api/nodes?node_threshold=0.{tenth}" for tenth in range(1, 10)
    ]
    expected = {path: answer(server, path) for path in paths}
    with ThreadPoolExecutor(16) as pool:
        assert (
            dict(
                zip(paths * 3, pool.map(lambda path: answer(server, path), paths * 3), strict=True)
            )
            == expected
        )


# What it refuses

PATHS = [
    b"/../graph.safetensors",
    b"/graph.safetensors",
    b"/groups.json",
    b"/%2e%2e/%2e%2e/etc/passwd",
    b"/api/../../etc/passwd",
    b"//etc/passwd",
    b"/./",
    b"/..%2f..%2fetc%2fpasswd",
    b"/etc/passwd",
    b"/..\\..\\etc\\passwd",
    b"/%00",
    b"/api/nodes%00",
    b"/api/nodes/",
    b"/API/nodes",
    b"/\x00",
    b"/static/",
    b"/api/",
    b"http://127.0.0.1/etc/passwd",
    b"file:///etc/passwd",
    b"*",
    b"/favicon.ico",
    b"/;/",
    b"/%2f",
]


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_only_the_listed_addresses_answer(server: GraphServer, path: bytes) -> None:
    assert status_of(server, path) in (400, 404)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "localhost",
        "localhost:1",
        "127.0.0.1.evil.example:{port}",
        "localhost:{port}.evil.example",
        "[::1]",
        "",
    ],
)
def test_another_host_is_refused_even_by_those_who_know_the_port(
    server: GraphServer, host: str
) -> None:
    for path in ("/", "/api/nodes", "/api/groups"):
        assert ask(server, path, Host=host.format(port=server.server_port))[0] == 403
    assert send(server, GROUPS, Host=host.format(port=server.server_port))[0] == 403
    assert not (server.folder / "groups.json").exists()


def test_the_three_names_of_this_machine_are_answered(server: GraphServer) -> None:
    for host in ("localhost", "LOCALHOST", "127.0.0.1", "[::1]"):
        assert ask(server, "/api/groups", Host=f"{host}:{server.server_port}")[0] == 200
    host = f"127.0.0.1:{server.server_port}".encode()
    twice = (
        b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    )
    assert raw(server, twice).startswith(b"HTTP/1.1 403")
    assert raw(server, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "method", ["PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "NONSENSE"]
)
def test_other_methods_are_refused(server: GraphServer, method: str) -> None:
    status, _, headers = ask(server, "/api/groups", method=method)
    assert status == 405 and headers["allow"] == "GET, POST"
    assert ask(server, "/nothing", method=method)[0] == 404


def test_only_groups_can_be_posted(server: GraphServer) -> None:
    assert (
        ask(server, "/api/nodes", method="POST", body=b"{}", Content_Type="application/json")[0]
        == 405
    )
    assert (
        ask(
            server, "/graph.safetensors", method="POST", body=b"{}", Content_Type="application/json"
        )[0]
        == 404
    )


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://localhost",
        "http://127.0.0.1:1",
        "https://127.0.0.1:{port}",
    ],
)
def test_another_page_may_not_write(server: GraphServer, origin: str) -> None:
    assert send(server, GROUPS, Origin=origin.format(port=server.server_port))[0] == 403
    assert not (server.folder / "groups.json").exists()
    for host in ("127.0.0.1", "localhost"):
        assert send(server, GROUPS, Origin=f"http://{host}:{server.server_port}")[0] == 200


def test_a_form_of_another_page_cannot_write_either(server: GraphServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert send(server, GROUPS, **{"Content-Type": kind})[0] == 415


def test_a_body_too_large_chunked_or_without_length_is_refused(server: GraphServer) -> None:
    host = f"127.0.0.1:{server.server_port}"
    start = (
        f"POST /api/groups HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n".encode()
    )
    assert send(server, b" " * (LARGEST_BODY + 1)) == (
        413,
        f"the body is larger than {LARGEST_BODY:,} bytes.\n",
    )
    for rest, status in (
        (b"\r\n", 411),
        (b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", 411),
        (b"Content-Length: 99999999999999999999999\r\n\r\n", 413),
        (b"Content-Length: -2\r\n\r\n", 400),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
        (b"Content-Length: \xb2\r\n\r\n{}", 400),
    ):
        assert raw(server, start + rest).startswith(f"HTTP/1.1 {status} ".encode()), rest
    assert ask(server, "/")[0] == 200 and not (server.folder / "groups.json").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "expected an object"),
        ({}, "expected an object"),
        ({**GROUPS, "more": 1}, "expected an object"),
        ({**GROUPS, "pinned": "f3.7185@12"}, "list of nodes' names"),
        ({**GROUPS, "pinned": ["f9.9@9"]}, "no node 'f9.9@9'"),
        ({**GROUPS, "supernodes": [{"name": "", "nodes": []}]}, "name of 1 to"),
        ({**GROUPS, "supernodes": [{"name": "x" * 201, "nodes": []}]}, "name of 1 to"),
        ({**GROUPS, "supernodes": GROUPS["supernodes"] * 2}, "in two supernodes"),
        ({**GROUPS, "node_threshold": 2}, "from 0 to 1"),
        (b'{"pinned": [], "supernodes": [], "edge_threshold": NaN}', "from 0 to 1"),
    ],
)
def test_groups_of_another_form_are_refused_and_nothing_is_written(
    server: GraphServer, content: Any, said: str
) -> None:
    status, text = send(server, content)
    assert status == 400 and said in text
    assert not (server.folder / "groups.json").exists()


# Groups


def test_groups_are_kept_in_the_folder_and_come_back(
    server: GraphServer, graph: FeatureGraph
) -> None:
    assert answer(server, "/api/groups")["pinned"] == []
    assert send(server, GROUPS)[0] == 200
    written = json.loads((server.folder / "groups.json").read_text())
    assert written.pop("digest").startswith("circuits-sha256:")
    assert written == {"format": "circuits.graph_groups", "format_version": 1, **GROUPS}
    found = answer(server, "/api/groups")
    assert found == {**GROUPS, "nodes": found["nodes"]}
    assert found["nodes"]["id"] == [
        graph.find(name) for name in ("f3.7185@12", "f0.2173@3", "f0.6007@3")
    ]
    assert not [path for path in server.folder.iterdir() if path.name.startswith(".")]


def test_groups_written_at_once_leave_a_whole_file(server: GraphServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert {
            status
            for status, _ in pool.map(
                lambda tenth: send(server, {**GROUPS, "node_threshold": tenth / 40}), range(40)
            )
        } == {200}
    assert 0 <= json.loads((server.folder / "groups.json").read_text())["node_threshold"] <= 1


def test_nodes_that_a_new_graph_does_not_have_leave_its_groups(
    start: Start, graph: FeatureGraph
) -> None:
    server = start(graph)
    send(server, GROUPS)
    kept = graph.subgraph(graph.is_kind(EMBEDDING, TARGET) | (graph.nodes.index == 6007))
    found = answer(start(kept), "/api/groups")
    assert found["pinned"] == [] and found["supernodes"] == [
        {"name": "say a capital", "nodes": ["f0.6007@3"]}
    ]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"format": "circuits.graph_groups", "format_version": 99}',
        '{"format": "circuits.graph_groups", "format_version": 1}',
    ],
)
def test_damaged_groups_are_not_served_over(
    tmp_path: Path, graph: FeatureGraph, content: str
) -> None:
    graph.save(tmp_path)
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(InputError, match=r"groups\.json"):
        open_server(tmp_path, 0)
    assert (tmp_path / "groups.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_told(
    server: GraphServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("circuits.plotting.graph_page.groups.write_json", full)
    status, text = send(server, GROUPS)
    assert status == 500 and "groups.json could not be written" in text and "No space left" in text


# The command


def test_a_folder_without_a_graph_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no graph\.safetensors") as told:
        tyro.cli(command, args=[str(tmp_path / "nowhere"), "--no-browser"])
    assert "\n" not in str(told.value)


def test_a_taken_port_is_told_in_one_line(server: GraphServer) -> None:
    with pytest.raises(
        InputError, match=f"port {server.server_port} is taken; choose another with --port"
    ) as told:
        words = [str(server.folder), "--port", str(server.server_port), "--no-browser"]
        tyro.cli(command, args=words)
    assert "\n" not in str(told.value)
    for port in ("-1", "65536"):
        with pytest.raises(InputError, match="is no port"):
            tyro.cli(command, args=[str(server.folder), "--port", port])


def test_the_command_opens_the_page_and_ends_quietly(
    tmp_path: Path,
    graph: FeatureGraph,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(_: GraphServer) -> None:
        raise KeyboardInterrupt

    pages: list[str] = []
    monkeypatch.setattr(GraphServer, "serve_forever", stopped)
    monkeypatch.setattr("webbrowser.open", pages.append)
    graph.save(tmp_path)
    tyro.cli(command, args=[str(tmp_path), "--port", "0"])
    output = capsys.readouterr()
    assert len(pages) == 1 and pages[0] in output.out and output.err == ""
    tyro.cli(command, args=[str(tmp_path), "--port", "0", "--no-browser"])
    assert len(pages) == 1


def serve(folder: Path, output: Path, errors: Path) -> None:
    """Run the command, and write what it says into files."""
    os.environ["COLUMNS"] = "200"
    # Where this test is itself a background job, its children would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with output.open("w", buffering=1) as out, errors.open("w") as error:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            main(["view", str(folder), "--port", "0", "--no-browser"])
            out.write("ended\n")


def test_ctrl_c_ends_a_running_server_quietly(
    tmp_path: Path, graph: FeatureGraph, new_process: Callable[..., Any]
) -> None:
    graph.save(tmp_path)
    output, errors = tmp_path / "output", tmp_path / "errors"
    process = new_process(target=serve, args=(tmp_path, output, errors))
    process.start()
    try:
        while process.is_alive() and not (output.exists() and output.read_text().endswith("\n")):
            time.sleep(0.01)
        address = output.read_text().split("http://127.0.0.1:")[1].split("/")[0]
        connection = http.client.HTTPConnection("127.0.0.1", int(address), timeout=20)
        connection.request("GET", "/api/groups")
        assert connection.getresponse().status == 200
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=20)
    finally:
        process.kill()
    connection.close()
    said = [line for line in errors.read_text().splitlines() if not line.endswith(" ...")]
    _, *rest = output.read_text().splitlines()
    assert process.exitcode == 0 and rest == ["ended"] and said == []


# In the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.close()


@pytest.mark.browser
def test_a_served_page_keeps_groups_in_the_folder(browser: Browser, server: GraphServer) -> None:
    browser.open(server.url)
    for name in ("f1.4736@3", "f3.7185@12"):
        browser.click(f'#stage .node[aria-label^="feature {name},"]', shift=True)
        browser.wait(f"document.querySelector('.marked p')?.textContent.includes('{name}')")
    browser.press("g")
    browser.wait("document.activeElement.matches('.supernodes input')")
    browser.write("</script><b>say</b>")
    browser.press("Enter")
    written = wait_for(
        browser,
        lambda: (
            (path := server.folder / "groups.json").exists()
            and "say" in path.read_text()
            and json.loads(path.read_text())
        ),
    )
    assert written["supernodes"] == [
        {"name": "</script><b>say</b>", "nodes": ["f1.4736@3", "f3.7185@12"]}
    ]
    browser.reload()
    assert browser.js("document.querySelector('.supernodes input').value") == "</script><b>say</b>"
    browser.slide("#edge-threshold", 0.5)
    wait_for(
        browser,
        lambda: json.loads((server.folder / "groups.json").read_text())["edge_threshold"] == 0.5,
    )
    assert browser.errors() == [] and all(
        address.startswith(server.url) for address in browser.requests()
    )
    assert browser.js("localStorage.length") == 0


@pytest.mark.browser
def test_a_page_says_when_its_server_has_gone_and_keeps_on_when_it_is_back(
    browser: Browser, server: GraphServer
) -> None:
    browser.open(server.url)
    browser.page.context.set_offline(True)
    browser.slide("#node-threshold", 0.3)
    browser.wait(
        "document.getElementById('kept').textContent.startsWith('Not kept in groups.json: The "
        "server does not answer')"
    )
    browser.page.context.set_offline(False)
    browser.slide("#node-threshold", 0.4)
    browser.wait(
        "document.getElementById('kept').textContent === 'Pins, supernodes and thresholds are kept "
        "in groups.json.'"
    )
    assert json.loads((server.folder / "groups.json").read_text())["node_threshold"] == 0.4


@pytest.mark.browser
def test_ten_thousand_nodes_and_a_million_edges_stay_usable(browser: Browser, start: Start) -> None:
    graph = synthetic_graph(
        words=(SENTENCE * 4)[:64],
        layers=26,
        features=8270,
        edges=1_000_000,
        labels=[" Sacramento", " Austin"],
    )
    assert len(graph.nodes) == 10_000 and len(graph) == 1_000_000
    browser.open(start(graph).url)
    kept = prune(graph)
    shown = (
        f"Drawn: {int(kept.nodes.sum()):,} of 10,000 nodes, the 1,000 most influential of "
        f"{int(kept.edges.sum()):,} kept edges (1,000,000 in all)"
    )
    assert browser.js("document.getElementById('shown').textContent") == shown
    assert browser.js("document.querySelectorAll('#stage .edge').length") == 1000
    name = browser.js("document.querySelector('#selection tbody tr button .name').textContent")
    browser.click("#selection tbody tr button")
    browser.wait(
        f"document.querySelector('#selection h2').textContent.startsWith('{name}') && "
        f"document.querySelector('.edges-of[data-side]')"
    )
    node = graph.node(
        int(browser.js("document.querySelector('#stage .node[aria-pressed=true]').dataset.id"))
    )
    for side, expected in (("inputs", graph.incoming(node)), ("outputs", graph.outgoing(node))):
        rows = browser.js(
            f"[...document.querySelectorAll('.edges-of[data-side={side}] tbody tr')].map((row) => "
            f"row.dataset.node)"
        )
        assert rows == expected["node"].tolist()
    browser.slide("#node-threshold", 1)
    browser.wait(
        "document.getElementById('shown').textContent.includes('the 3,000 most influential of')"
    )
    assert (
        browser.js("document.querySelectorAll('#stage .nodes:not(.guests) .node').length") == 3000
    )
    assert browser.errors() == []
