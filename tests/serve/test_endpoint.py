"""The whole endpoint over HTTP: a private Ray cluster, Serve, the door and a real engine, asked with OpenAI's own client."""

import concurrent.futures
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import ServingSpec
from tests.serve.greedy import disagreements
from tests.serve.tiny_llama import VOCABULARY, load_adapted, make_adapter, make_base

MAX_LEN = 256
MAX_BYTES = 20_000
RANKS = {"streets": 8, "people": 16, "cities": 4}


@dataclass(frozen=True)
class Endpoint:
    url: str
    key: str
    root: Path
    base: Path
    revision: str

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=120)

    def post(self, path: str = "/v1/completions", key: str | None = None, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, headers={"Authorization": f"Bearer {key or self.key}"}, timeout=120)

    def publish(self, name: str, folder: Path, alias: str | None = "prod", **changes: Any) -> Manifest:
        from adaptfleet.store.registry import Registry

        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        draft = Draft(kind="adapter", name=name, base="tiny", base_revision=self.revision, method={"kind": "lora", "rank": rank})
        return Registry.open().publish(draft.model_copy(update=changes), folder, alias)

    def adapter(self, name: str, rank: int = 8, seed: int = 1, **kind: Any) -> Path:
        return make_adapter(self.base, self.root / name, rank, seed=seed, **kind)

    def answer(self, model: str, prompt: str = "Where is it? ", num_tokens: int = 12) -> list[int]:
        """Greedy token ids."""
        reply = self.post(model=model, prompt=prompt, max_tokens=num_tokens, temperature=0, ignore_eos=True, return_token_ids=True)
        assert reply.status_code == 200, reply.text
        assert reply.json()["model"] == model
        return list(reply.json()["choices"][0]["token_ids"])


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("endpoint")
    before = dict(os.environ)
    for name in ("ADAPTFLEET_STORE", "ADAPTFLEET_API_KEYS", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ["ADAPTFLEET_HOME"] = str(root / "home")
    import ray
    from ray._raylet import AuthenticationTokenLoader

    from adaptfleet.core.models.loading import base_revision
    from adaptfleet.on_ray.local_cluster import LocalCluster
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy, undeploy

    base = make_base(root / "base")
    spec = ServingSpec(
        model=ModelSpec(source=str(base), dtype="float32"),
        served_name="tiny",
        max_loras=3,
        max_lora_rank=16,
        max_model_len=MAX_LEN,
        max_request_bytes=MAX_BYTES,
        cpus_per_replica=1,
    )
    try:
        with LocalCluster.start(num_cpus=2, logs_to=root / "logs") as cluster:
            os.environ.update(cluster.env)
            # Ray reads a process's token once; a test before these may have joined the shared cluster with another
            AuthenticationTokenLoader.instance().reset_cache()
            try:
                url = deploy(spec, port=_free_port())
                made = Endpoint(url, first_key(), root, base, base_revision(base))
                for seed, (name, rank) in enumerate(RANKS.items()):
                    made.publish(name, made.adapter(name, rank, seed + 1))
                yield made
                undeploy()
            finally:
                ray.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)
        AuthenticationTokenLoader.instance().reset_cache()


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wrong(endpoint: Endpoint, adapter: Path | None, prompt: str, answer: list[int]) -> list[str]:
    ids = AutoTokenizer.from_pretrained(endpoint.base)(prompt).input_ids
    return disagreements(load_adapted(endpoint.base, adapter), ids, answer)


# what is served, and under which names


def test_chat_completion_and_stream_with_usage(endpoint: Endpoint) -> None:
    client = endpoint.client()
    messages: Any = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model="streets", messages=messages, max_tokens=8, temperature=0)
    assert whole.model == "streets"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    text, usage, models = "", None, set()
    for chunk in client.chat.completions.create(
        model="streets", messages=messages, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        models.add(chunk.model)
        usage = chunk.usage or usage
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 8
    assert models == {"streets"}


def test_other_apis_of_vllm(endpoint: Endpoint) -> None:
    client = endpoint.client()
    assert client.responses.create(model="people", input="hello", max_output_tokens=4).model == "people"
    message = endpoint.post("/v1/messages", model="people", max_tokens=4, messages=[{"role": "user", "content": "hello"}])
    assert (message.status_code, message.json()["model"]) == (200, "people")
    tokens = endpoint.post("/tokenize", model="people", prompt="hello").json()["tokens"]
    assert endpoint.post("/detokenize", model="people", tokens=tokens).json()["prompt"] == "hello"


@pytest.mark.parametrize("name", ["streets", "streets@1", "streets@prod", "tiny:streets", "tiny:streets@1"])
def test_every_form_of_a_name_is_the_same_adapter(endpoint: Endpoint, name: str) -> None:
    assert not _wrong(endpoint, endpoint.root / "streets", "Where is it? ", endpoint.answer(name))
    assert endpoint.answer(name) != endpoint.answer("tiny")


def test_models_lists_the_base_and_every_published_adapter(endpoint: Endpoint) -> None:
    endpoint.publish("streets-canary-only", endpoint.adapter("canary-only", seed=21), alias="canary")
    time.sleep(0.5)
    ids = [model.id for model in endpoint.client().models.list()]
    assert ids[0] == "tiny"
    assert {"streets", "streets@1", "people", "cities", "streets-canary-only@canary", "streets-canary-only@1"} <= set(ids)
    assert "streets-canary-only" not in ids, "a bare name is its alias prod"


def test_a_missing_model_is_the_base(endpoint: Endpoint) -> None:
    assert endpoint.post(prompt="x", max_tokens=1).json()["model"] == "tiny"


# parity


def test_greedy_answers_alone_and_in_concurrent_mixed_batches(endpoint: Endpoint) -> None:
    asked = [(name, f"Number {i}, or {i * i}: " + "word " * (i % 4 * 8)) for i, name in enumerate(["tiny", *RANKS] * 4)]
    alone = [endpoint.answer(name, prompt) for name, prompt in asked[:4]]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda ask: endpoint.answer(*ask), asked))
    wrong: list[str] = []
    for (name, prompt), answer in [*zip(asked[:4], alone, strict=True), *zip(asked, together, strict=True)]:
        wrong += _wrong(endpoint, None if name == "tiny" else endpoint.root / name, prompt, answer)
    assert not wrong, "\n".join(wrong)


# a moving registry


def test_publishing_while_requests_are_in_flight(endpoint: Endpoint, record_property: Callable[[str, object], None]) -> None:
    stop, failures, num_done = threading.Event(), [], [0]

    def keep_asking(model: str) -> None:
        while not stop.is_set():
            reply = endpoint.post(model=model, prompt="go on", max_tokens=16, temperature=0)
            num_done[0] += 1
            if reply.status_code != 200:
                failures.append(reply.text)

    threads = [threading.Thread(target=keep_asking, args=(model,)) for model in ["tiny", *RANKS]]
    for thread in threads:
        thread.start()
    try:
        for seed in range(3):
            folder = endpoint.adapter(f"fresh-{seed}", seed=30 + seed)
            endpoint.publish(f"fresh-{seed}", folder)
            published = time.monotonic()
            reply = endpoint.post(model=f"fresh-{seed}", prompt="Where is it? ", max_tokens=1)
            while reply.status_code == 404 and time.monotonic() - published < 60:
                reply = endpoint.post(model=f"fresh-{seed}", prompt="Where is it? ", max_tokens=1)
            record_property(f"publish_to_first_answer_s_{seed}", round(time.monotonic() - published, 2))
            assert reply.status_code == 200, reply.text
            assert not _wrong(endpoint, folder, "Where is it? ", endpoint.answer(f"fresh-{seed}"))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert num_done[0] > 4


def test_promotion_and_rollback_take_effect_without_stale_weights(endpoint: Endpoint) -> None:
    from adaptfleet.store.registry import Registry

    first, second = endpoint.adapter("moving-1", seed=41), endpoint.adapter("moving-2", rank=16, seed=42)
    endpoint.publish("moving", first)
    prompt = "The same long prompt, so that a cached prefix would be used again if versions shared one. " * 2
    _until(endpoint, "moving@1")
    before = endpoint.answer("moving", prompt)
    assert not _wrong(endpoint, first, prompt, before)
    endpoint.publish("moving", second, alias="canary")
    _until(endpoint, "moving@canary")
    assert endpoint.answer("moving", prompt) == before
    assert not _wrong(endpoint, second, prompt, endpoint.answer("moving@canary", prompt))
    Registry.open().set_alias("moving", "prod", 2)
    time.sleep(1)
    after = endpoint.answer("moving", prompt)
    assert after != before
    assert not _wrong(endpoint, second, prompt, after)
    Registry.open().rollback("moving")
    time.sleep(1)
    assert endpoint.answer("moving", prompt) == before


def _until(endpoint: Endpoint, model: str) -> None:
    """A publication is seen within the catalog's view age."""
    deadline = time.monotonic() + 60
    while endpoint.post(model=model, prompt="x", max_tokens=1).status_code == 404 and time.monotonic() < deadline:
        time.sleep(0.05)


# bad input: a clear error each, and the service stays up


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
    _until(endpoint, "foreign")
    error = _error(endpoint.post(model="foreign", prompt="x"), 400)
    assert error["code"] == "wrong_base"
    assert "elsewhere" in error["message"]
    assert "foreign" not in {model.id for model in endpoint.client().models.list()}


def test_an_adapter_of_too_high_a_rank(endpoint: Endpoint, still_up: None) -> None:
    endpoint.publish("too-high", endpoint.adapter("too-high", rank=32, seed=52))
    _until(endpoint, "too-high")
    error = _error(endpoint.post(model="too-high", prompt="x"), 400)
    assert error["code"] == "rank_too_high"
    assert "32" in error["message"]
    assert "16" in error["message"]


def test_an_adapter_of_the_output_head(endpoint: Endpoint, still_up: None) -> None:
    folder = endpoint.adapter("head", rank=8, seed=53)
    head = {"lora_A": torch.ones(8, 128), "lora_B": torch.ones(VOCABULARY, 8)}
    _rewrite(folder, lambda weights: weights | {f"base_model.model.lm_head.{side}.weight": tensor for side, tensor in head.items()})
    endpoint.publish("head", folder)
    _until(endpoint, "head")
    assert _error(endpoint.post(model="head", prompt="x"), 400)["code"] == "unserved_modules"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), folder / "changed")
    (folder / "changed").replace(file)


def test_a_file_that_was_truncated_in_the_store(endpoint: Endpoint, still_up: None) -> None:
    manifest = endpoint.publish("damaged", endpoint.adapter("damaged", seed=54))
    stored = _stored_weights(endpoint, manifest)
    stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    _until(endpoint, "damaged")
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
    _until(endpoint, name)
    error = _error(endpoint.post(model=name, prompt="x"), 400)
    assert error["code"] == "misfit_adapter"
    assert said in error["message"]


def test_a_full_disk_under_the_cache(endpoint: Endpoint, still_up: None) -> None:
    """The cache's place is taken by a file, which fails as a full disk does: the folder cannot be written."""
    endpoint.publish("no-room", endpoint.adapter("no-room", seed=56))
    _until(endpoint, "streets")
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


# what operators see


def test_metrics_by_model_tenant_and_code(endpoint: Endpoint) -> None:
    endpoint.post(model="streets", prompt="x", max_tokens=2)
    endpoint.post(model="nowhere-to-be-found", prompt="x")
    list(endpoint.client().completions.create(model="people", prompt="x", max_tokens=2, stream=True))
    text = httpx.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {endpoint.key}"}, follow_redirects=True).text
    assert 'adaptfleet_requests_total{code="200",model="streets@1",tenant="default"}' in text
    assert 'adaptfleet_errors_total{code="404",model="unknown",tenant="default"}' in text
    assert 'adaptfleet_request_duration_seconds_count{code="200",model="streets@1",tenant="default"}' in text
    assert 'adaptfleet_time_to_first_token_seconds_count{code="200",model="people@1",tenant="default"}' in text
    assert "vllm:" in text
    assert "nowhere-to-be-found" not in text, "clients' texts are no labels"


def test_the_key_file_is_private_and_the_key_is_nowhere_else(endpoint: Endpoint) -> None:
    file = endpoint.root / "home" / "api-keys"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    copies = [path for path in endpoint.root.rglob("*") if path.is_file() and path != file and endpoint.key.encode() in path.read_bytes()]
    assert not copies


def test_a_new_tenant_needs_no_restart(endpoint: Endpoint) -> None:
    file = endpoint.root / "home" / "api-keys"
    before = file.read_text()
    file.write_text(before + "second:another-key-of-enough-length\n")
    try:
        time.sleep(1.5)
        assert endpoint.post(key="another-key-of-enough-length", model="tiny", prompt="x", max_tokens=1).status_code == 200
    finally:
        file.write_text(before)
    time.sleep(1.5)
    assert endpoint.post(key="another-key-of-enough-length", model="tiny", prompt="x").status_code == 401


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
    """Last in this module: it starts the engine anew."""
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
    """vLLM's engine processes of this test's own cluster, by its home."""
    found = []
    for process in psutil.process_iter():
        try:
            if "EngineCore" in " ".join(process.cmdline()) and process.environ().get("ADAPTFLEET_HOME") == os.environ["ADAPTFLEET_HOME"]:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
