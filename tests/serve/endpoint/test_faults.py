"""Bad requests, bad adapters, a store that is away and an engine that dies: a clear error each, and the endpoint stays up."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.store.cache import content_digest
from tests.serve.endpoint.conftest import MAX_BYTES, MAX_LEN, Endpoint
from tests.serve.tiny_llama import VOCABULARY


@pytest.fixture
def still_up(endpoint: Endpoint) -> Iterator[None]:
    before = endpoint.answer("streets")
    yield
    assert endpoint.answer("streets") == before
    assert endpoint.answer("tiny")
    assert httpx.get(f"{endpoint.url}/healthz").json() == {"status": "ok"}


def _error(reply: httpx.Response, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return dict(error)


def test_unknown_names_get_near_matches(endpoint: Endpoint, still_up: None) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'streets'"):
        endpoint.client().completions.create(model="street", prompt="x")
    for name in ["streets@9", "streets@nowhere", "other:streets", "tiny:", "streets@", "", "STREETS", "a" * 5000]:
        assert _error(endpoint.post(model=name, prompt="x"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "streets/../people", "file:///etc", "streets@../1", "\u0000"])
def test_paths_are_no_names(endpoint: Endpoint, still_up: None, name: str) -> None:
    assert _error(endpoint.post(model=name, prompt="x"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("model", [7, ["streets"], {"a": 1}, True])
def test_a_model_that_is_no_string(endpoint: Endpoint, still_up: None, model: Any) -> None:
    assert _error(endpoint.post(model=model, prompt="x"), 400)["param"] == "model"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"streets"', b"\xff\xfe", b"[" * 15_000])
def test_a_body_that_is_no_json_object(endpoint: Endpoint, still_up: None, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}
    assert _error(httpx.post(f"{endpoint.url}/v1/completions", content=body, headers=headers), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-key-of-enough-length"}, {"Authorization": "Basic eA=="}])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/docs"])
def test_nothing_without_a_key(endpoint: Endpoint, path: str, headers: dict[str, str]) -> None:
    _error(httpx.request("POST" if path == "/v1/completions" else "GET", f"{endpoint.url}{path}", headers=headers), 401)


def test_the_official_client_sees_a_wrong_key(endpoint: Endpoint) -> None:
    with pytest.raises(openai.AuthenticationError):
        endpoint.client("wrong-key-of-enough-length").models.list()


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/scale_elastic_ep", "/docs", "/openapi.json", "/invocations"],
)
def test_other_routes_of_vllm_are_closed(endpoint: Endpoint, still_up: None, path: str) -> None:
    assert _error(endpoint.post(path, lora_name="x", lora_path="/tmp"), 404)["code"] == "unknown_route"


def test_an_oversized_prompt(endpoint: Endpoint, still_up: None) -> None:
    with pytest.raises(openai.BadRequestError, match="256"):
        endpoint.client().completions.create(model="streets", prompt="x" * (MAX_LEN + 50), max_tokens=1)


def test_an_oversized_body(endpoint: Endpoint, still_up: None) -> None:
    assert _error(endpoint.post(model="streets", prompt="x" * MAX_BYTES), 413)["code"] == "request_too_large"

    def unannounced() -> Iterator[bytes]:
        yield from [b" " * 1000] * (MAX_BYTES // 1000 + 2)

    headers = {"Authorization": f"Bearer {endpoint.key}"}
    assert httpx.post(f"{endpoint.url}/v1/completions", content=unannounced(), headers=headers).status_code == 413


def test_an_adapter_of_another_base(endpoint: Endpoint, still_up: None) -> None:
    endpoint.publish("foreign", endpoint.adapter("foreign", seed=51), base="elsewhere", base_revision="0" * 64)
    endpoint.wait_for("foreign")
    error = _error(endpoint.post(model="foreign", prompt="x"), 400)
    assert error["code"] == "wrong_base"
    assert "elsewhere" in error["message"]
    assert "foreign" not in {model.id for model in endpoint.client().models.list()}


def test_an_adapter_of_too_high_a_rank(endpoint: Endpoint, still_up: None) -> None:
    endpoint.publish("too-high", endpoint.adapter("too-high", rank=32, seed=52))
    endpoint.wait_for("too-high")
    error = _error(endpoint.post(model="too-high", prompt="x"), 400)
    assert error["code"] == "rank_too_high"
    assert "32" in error["message"]
    assert "16" in error["message"]


def test_an_adapter_of_the_output_head(endpoint: Endpoint, still_up: None) -> None:
    folder = endpoint.adapter("head", rank=8, seed=53)
    head = {"lora_A": torch.ones(8, 128), "lora_B": torch.ones(VOCABULARY, 8)}
    _rewrite(folder, lambda weights: weights | {f"base_model.model.lm_head.{side}.weight": tensor for side, tensor in head.items()})
    endpoint.publish("head", folder)
    endpoint.wait_for("head")
    assert _error(endpoint.post(model="head", prompt="x"), 400)["code"] == "unserved_modules"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), folder / "changed")
    (folder / "changed").replace(file)


def test_a_file_that_was_truncated_in_the_store(endpoint: Endpoint, still_up: None) -> None:
    manifest = endpoint.publish("damaged", endpoint.adapter("damaged", seed=54))
    stored = _stored_weights(endpoint, manifest)
    stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    # A new version is fetched ahead of any request, perhaps before it was truncated.
    shutil.rmtree(endpoint.root / "home" / "cache" / "adapters" / content_digest(manifest.files), ignore_errors=True)
    endpoint.wait_for("damaged")
    error = _error(endpoint.post(model="damaged", prompt="x"), 500)
    assert error["code"] == "adapter_corrupt"
    assert str(endpoint.root) not in error["message"], "no path of the server in an answer"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("narrow", lambda weights: {k: torch.zeros(8, 7) if "q_proj.lora_A" in k else v for k, v in weights.items()}, "takes 128 inputs"),
        ("short", lambda weights: {k: torch.zeros(7, 8) if "k_proj.lora_B" in k else v for k, v in weights.items()}, "gives 64 outputs"),
        ("elsewhere", lambda weights: {k.replace("layers.1", "layers.7"): v for k, v in weights.items()}, "no module model.layers.7"),
    ],
)
def test_weights_that_do_not_fit_the_base(endpoint: Endpoint, still_up: None, name: str, change: Any, said: str) -> None:
    """Whole by their hashes and of the rank they claim; vLLM would load them without a word and answer with something else."""
    folder = endpoint.adapter(name, seed=55)
    _rewrite(folder, change)
    endpoint.publish(name, folder)
    endpoint.wait_for(name)
    error = _error(endpoint.post(model=name, prompt="x"), 400)
    assert error["code"] == "misfit_adapter"
    assert said in error["message"]


def test_a_full_disk_under_the_cache(endpoint: Endpoint, still_up: None) -> None:
    """The cache's place is taken by a file, which fails as a full disk does: the folder cannot be written."""
    endpoint.publish("no-room", endpoint.adapter("no-room", seed=56))
    endpoint.wait_for("streets")
    cache = endpoint.root / "home" / "cache" / "adapters"
    aside = cache.with_name("aside")
    cache.rename(aside)
    cache.write_bytes(b"")
    try:
        deadline = time.monotonic() + 60
        reply = endpoint.post(model="no-room", prompt="x", max_tokens=1)
        while reply.status_code == 404 and time.monotonic() < deadline:
            reply = endpoint.post(model="no-room", prompt="x", max_tokens=1)
        assert _error(reply, 503)["code"] == "store_unavailable"
    finally:
        cache.unlink()
        aside.rename(cache)
    assert endpoint.answer("no-room")


def _stored_weights(endpoint: Endpoint, manifest: Manifest) -> Path:
    """The store's file of the weights, found by its SHA-256's size and content."""
    import hashlib

    wanted = manifest.files["adapter_model.safetensors"].sha256
    for file in (endpoint.root / "home" / "store").rglob("*"):
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == wanted:
            return file
    raise AssertionError("the store holds no file with the manifest's SHA-256")


def test_the_store_may_be_away_for_what_is_loaded(endpoint: Endpoint) -> None:
    store = endpoint.root / "home" / "store"
    before = endpoint.answer("streets")
    shutil.move(store, store.with_name("away"))
    try:
        time.sleep(0.5)
        assert endpoint.answer("tiny")
    finally:
        shutil.rmtree(store, ignore_errors=True)
        shutil.move(store.with_name("away"), store)
    time.sleep(0.5)
    assert endpoint.answer("streets") == before


def test_a_dead_engine_ends_its_replica_and_another_takes_over(endpoint: Endpoint) -> None:
    """Last in this folder: it starts the engine anew."""
    before = endpoint.answer("streets")
    engines = _engines(endpoint)
    assert len(engines) == 1
    engines[0].kill()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(1)
        try:
            if set(_engines(endpoint)) - set(engines) and httpx.get(f"{endpoint.url}/healthz", timeout=5).status_code == 200:
                break
        except httpx.HTTPError:
            continue
    assert endpoint.answer("streets") == before


def _engines(endpoint: Endpoint) -> list[psutil.Process]:
    """The processes of the engines that answer, of this test's own cluster, by its home; the embedder has another."""
    found = []
    for process in psutil.process_iter():
        try:
            if "EngineCore" not in " ".join(process.cmdline()) or process.environ().get("ADAPTFLEET_HOME") != os.environ["ADAPTFLEET_HOME"]:
                continue
            if (parent := process.parent()) is None or "embedder" not in " ".join(parent.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
