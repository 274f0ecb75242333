"""The page at `/`: what it may load, and, where Chromium is installed (`apt-get install chromium`), what a real browser makes of it."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

from tests.serve.endpoint.conftest import Endpoint, Tenants

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOT = Path(__file__).resolve().parents[3] / "build" / "test-logs" / "page.png"


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(endpoint: Endpoint) -> None:
    reply = httpx.get(f"{endpoint.url}/")
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    for path in ("/", "/page.js", "/page.css"):
        text = httpx.get(f"{endpoint.url}{path}").text
        assert "http://" not in text and "https://" not in text and endpoint.key not in text
    assert httpx.get(f"{endpoint.url}/status").status_code == 401


class Browser:
    """A page in Chromium, spoken to by its debugging protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def run(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        deadline = time.monotonic() + 90
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} stays {value!r}; the page says {self.run('document.body.innerText')!r}"
            time.sleep(0.1)
        return value


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900", "--no-first-run"]
    # Its own services call nobody.
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"]
    command = [program, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        active = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 90
        while not active.exists() or len(active.read_text().split()) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.1)
        port = active.read_text().split()[0]
        pages = [target for target in httpx.get(f"http://127.0.0.1:{port}/json", timeout=30).json() if target["type"] == "page"]
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.terminate()
        process.wait(timeout=30)


def look_at_the_page(endpoint: Endpoint, tenants: Tenants, tmp_path: Path) -> None:
    from adaptfleet.store.registry import Registry

    acme = tenants.key("acme")
    tenants.policies("aliases: {support: streets}\ntenants: {acme: {owns: ['acme-*'], requests_per_min: 600, priority: high}}")
    endpoint.publish("people", endpoint.adapter("people-2", rank=16, seed=91), alias=None)
    Registry.open().split("people", {1: 90, 2: 10})
    assert endpoint.post(key=acme, model="streets", prompt="x", max_tokens=3, ignore_eos=True).status_code == 200
    with browser(str(CHROMIUM), tmp_path / "profile") as page:
        page.call("Page.navigate", url=f"{endpoint.url}/")
        page.wait_for("document.getElementById('health')?.textContent === 'healthy'")
        assert page.run("document.querySelector('main').hidden"), "nothing is shown without a key"
        _type(page, "key", "wrong-key-of-enough-length")
        page.run("document.querySelector('#signin button').click()")
        page.wait_for("document.getElementById('said').textContent.includes('not known here')")
        _type(page, "key", endpoint.key)
        page.run("document.querySelector('#signin button').click()")
        page.wait_for("!document.querySelector('main').hidden")
        text = page.run("document.body.innerText")
        for said in ("tiny", "streets@1", "support", "v1 90%, v2 10%", "acme", "600 requests/min", "requests running"):
            assert said in text, text
        page.run("document.getElementById('model').value = 'streets'")
        _type(page, "prompt", "Where is it? <b>bold</b>")
        page.run("document.querySelector('#try button').click()")
        page.wait_for("document.getElementById('answer').dataset.done")
        assert page.run("document.getElementById('answer').dataset.done") == "true", page.run(
            "document.getElementById('answer').textContent"
        )
        assert page.run("document.getElementById('answer').textContent")
        assert page.run("document.querySelectorAll('#answer *').length") == 0, "an answer is text, never markup"
        SCREENSHOT.parent.mkdir(parents=True, exist_ok=True)
        SCREENSHOT.write_bytes(base64.b64decode(page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))
        _type(page, "key", acme)
        page.run("document.querySelector('#signin button').click()")
        page.wait_for("document.querySelectorAll('#tenants tbody tr').length === 1")
        assert page.run("document.querySelector('#tenants tbody').innerText").startswith("acme")
        assert page.run("document.getElementById('tiles').childElementCount") == 0, "the engine is for operators"
        asked = {event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"}
        assert all(url.startswith((endpoint.url, "about:")) for url in asked), asked
        assert not [event for event in page.events if event["method"] == "Runtime.exceptionThrown"]
    Registry.open().rollback("people")


def _type(page: Browser, field: str, text: str) -> None:
    page.run(f"document.getElementById('{field}').value = ''; document.getElementById('{field}').focus()")
    page.call("Input.insertText", text=text)


if CHROMIUM:  # a test runs or is not there
    test_the_page_in_chromium: Callable[..., None] = look_at_the_page
