"""`adaptfleet keys` and `adaptfleet top` as their users call them."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from adaptfleet.cli import main
from adaptfleet.on_ray.serve.key_file import keys_file, read_keys, sha256_of

pytestmark = pytest.mark.usefixtures("fresh_home")


def _made(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    """The key and what was said beside it."""
    assert main(["keys", *words]) == 0
    printed = capsys.readouterr()
    return printed.out.strip(), printed.err


def test_a_keys_life(capsys: pytest.CaptureFixture[str]) -> None:
    key, said = _made(capsys, "add", "acme", "--models", "acme-*", "base", "--expires", "30d", "--note", "nightly")
    record = read_keys()[sha256_of(key)]
    assert (record.tenant, record.models, record.note) == ("acme", ("acme-*", "base"), "nightly")
    assert record.expires_at is not None
    assert timedelta(days=29) < record.expires_at - datetime.now(UTC) < timedelta(days=31)
    assert record.id in said and key not in said
    new, said = _made(capsys, "rotate", record.id, "--grace", "0s")
    assert "is good until" in said
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("acme-* base") == 2
    assert "(expired)" in listed
    assert key not in listed and new not in listed and sha256_of(key) not in listed
    assert main(["keys", "revoke", read_keys()[sha256_of(new)].id, "--json"]) == 0
    assert sha256_of(new) not in read_keys()


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", "acme", "--json", "--save"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert sha256_of(made["key"]) in read_keys()
    assert "sha256" not in made
    assert keys_file().with_name("client-key").read_text().strip() == made["key"]
    assert main(["keys", "list", "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)] == [made["id"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "../x"], "safe name"),
        (["add", "acme", "--models", "a/b"], "models"),
        (["add", "acme", "--expires", "soon"], "--expires 'soon'"),
        (["add", "acme", "--expires", "2001-01-01"], "is past"),
        (["rotate", "k-0000000000"], "is not there"),
        (["add", "acme", "--note", "x" * 300], "note"),
    ],
)
def test_bad_words_write_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", *words]) == 2
    assert said in capsys.readouterr().err
    assert not keys_file().exists()


STATUS = {
    "base": "tiny",
    "replica": "abc",
    "engine": {"requests running": 2.0},
    "models": [{"id": "streets", "kind": "adapter", "traffic": "v1 95%, v2 5%", "requests": 7, "errors": 1, "output_tokens": 90}],
    "tenants": [
        {
            "tenant": "acme",
            "priority": "high",
            "in_flight": 1,
            "requests_today": 7,
            "tokens_today": 120,
            "tokens_this_month": 900,
            "limits": "none",
        }
    ],
}


@pytest.fixture
def status_url() -> Iterator[str]:
    """What an endpoint says at /status, for the drawing alone; the real one is asked in tests/serve/endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers["Authorization"] == "Bearer right-key" and self.path == "/status"
            self.send_response(200 if good else 401)
            self.end_headers()
            self.wfile.write(json.dumps(STATUS if good else {"error": {"message": "The API key is not known here."}}).encode())

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_top_is_plain_where_it_is_piped(status_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right-key")
    assert main(["top", "--url", status_url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "requests running\t2" in lines
    assert "streets\tadapter\tv1 95%, v2 5%\t7\t1\t90" in lines
    assert "acme\thigh\t1\t7\t120\t900\tnone" in lines
    assert main(["top", "--url", status_url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_top_says_why_it_shows_nothing(status_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    assert main(["top", "--url", status_url]) == 2
    assert "401: The API key is not known here." in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(["top", "--url", "http://127.0.0.1:9"]) == 2
    assert "--url names another" in capsys.readouterr().err
    assert not keys_file().exists(), "looking makes no key"


def test_tenants_shows_what_each_has_and_who_sees_what(fresh_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fresh_home / "new.yaml"
    file.write_text(
        "defaults: {requests_per_min: 60}\ntenants: {acme: {owns: ['acme-*'], token_budget: {tokens: 5}}, ops: {operator: true}}"
    )
    assert main(["tenants", "--file", str(file), "--see", "acme-chat"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-1] == "may use acme-chat"
    assert {row[0]: (row[2], row[5], row[6]) for row in rows[1:]} == {
        "acme": ("requests_per_min=60 token_budget=5/month", "no", "yes"),
        "default": ("requests_per_min=60", "yes", "no"),
        "ops": ("requests_per_min=60", "yes", "no"),
    }
    assert main(["tenants", "--json"]) == 0, "without a file, the defaults"
    assert json.loads(capsys.readouterr().out)["default"]["requests_per_min"] is None
    file.write_text("tenants: {acme: {request_per_min: 5, weight: -1}}")
    assert main(["tenants", "--file", str(file)]) == 2
    said = capsys.readouterr().err
    assert "request_per_min" in said and "weight" in said
    assert main(["tenants", "--file", str(file.with_name("none.yaml"))]) == 2
