"""The gateway between real HTTP servers: weights, a refused connection, a switch under way, an answer cut short."""

import http.client
import http.server
import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest

from adaptfleet.on_ray.kuberay.gateway import Backend, Gateway
from adaptfleet.on_ray.kuberay.place import free_ports


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, word: str) -> None:
        self.word = word
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        word = self.server.word  # type: ignore[attr-defined]
        if self.path == "/slow":
            time.sleep(1.0)
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.wfile.flush()
            self.connection.close()
            return
        self.send_header("Content-Length", str(len(word)))
        self.end_headers()
        self.wfile.write(word.encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps({"path": self.path, "key": self.headers.get("Authorization"), "body": body.decode()}).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    made.start()
    yield made
    made.drop(made.names())
    made.stop()


def _get(port: int, path: str = "/") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return str(reply.read().decode())


def test_requests_follow_the_weights_and_pass_whole(gateway: Gateway) -> None:
    one, two, port = _Server("one"), _Server("two"), free_ports(1)[0]
    gateway.route("s", port, (Backend(75, (one.port,)), Backend(25, (two.port,))))
    assert Counter(_get(port) for _ in range(40)) == {"one": 30, "two": 10}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/a%20b?q=1", data=b"{}", headers={"Authorization": "Bearer x"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert reply.status == 201
        assert json.load(reply) == {"path": "/a%20b?q=1", "key": "Bearer x", "body": "{}"}
    gateway.route("s", port, (Backend(0, (one.port,)), Backend(100, (two.port,))))
    assert {_get(port) for _ in range(5)} == {"two"}


def test_a_proxy_that_refuses_is_passed_over_and_none_at_all_is_said(gateway: Gateway) -> None:
    one, gone, port = _Server("one"), free_ports(1)[0], free_ports(1)[0]
    gateway.route("s", port, (Backend(100, (gone, one.port)),))
    assert {_get(port) for _ in range(6)} == {"one"}
    gateway.route("s", port, (Backend(100, (gone,)),))
    with pytest.raises(urllib.error.HTTPError, match="503"):
        _get(port)


def test_a_switch_leaves_the_request_under_way_where_it_is(gateway: Gateway) -> None:
    old, new, port = _Server("old"), _Server("new"), free_ports(1)[0]
    gateway.route("s", port, (Backend(100, (old.port,)),))
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_get(port, "/slow")))
    thread.start()
    time.sleep(0.3)
    gateway.route("s", port, (Backend(100, (new.port,)),))
    assert _get(port) == "new"
    thread.join(timeout=10)
    assert found == ["old"]


def test_an_answer_cut_short_is_not_passed_on_as_whole(gateway: Gateway) -> None:
    one, port = _Server("one"), free_ports(1)[0]
    gateway.route("s", port, (Backend(100, (one.port,)),))
    with pytest.raises((http.client.HTTPException, urllib.error.URLError, OSError)):
        _get(port, "/cut")
