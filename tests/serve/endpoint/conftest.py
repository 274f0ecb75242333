"""One whole endpoint for all tests of this folder: a private Ray cluster, Serve, the door and a real engine."""

import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import EmbeddingsSpec, ServingSpec
from tests.serve.tiny_llama import make_adapter, make_base

MAX_LEN = 256
MAX_BYTES = 20_000
_NO_BLANKS = {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
"""Random weights may like blanks best, and a schema allows any number of them."""
RANKS = {"streets": 8, "people": 16, "cities": 4}


@dataclass(frozen=True)
class Endpoint:
    url: str
    key: str
    root: Path
    base: Path
    revision: str
    spec: ServingSpec
    cluster: Any
    """LocalCluster; its import is Ray's, which reads its environment then."""

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

    def wait_for(self, model: str) -> None:
        """A publication is seen within the catalog's view age."""
        deadline = time.monotonic() + 60
        while self.post(model=model, prompt="x", max_tokens=1).status_code == 404 and time.monotonic() < deadline:
            time.sleep(0.05)


class Collector:
    """An OpenTelemetry collector: takes spans over HTTP and keeps them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        """The service's name and the span."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                    collector.spans += [(names.get("service.name", ""), span) for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


class Tenants:
    """Keys and policies of the endpoint, as an operator edits them while it runs."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def key(self, tenant: str, **kwargs: Any) -> str:
        from adaptfleet.on_ray.serve.key_file import add_key

        return add_key(tenant, **kwargs)[0]

    def policies(self, text: str) -> None:
        """In force when this returns: the endpoint looks every second."""
        from adaptfleet.on_ray.serve.policy_file import policy_file

        whole = policy_file().with_name("new-tenants.yaml")
        whole.write_text(text)
        whole.replace(policy_file())
        time.sleep(1.6)


@pytest.fixture
def tenants(endpoint: Endpoint) -> Iterator[Tenants]:
    made = Tenants(endpoint)
    yield made
    made.policies("{}")


@pytest.fixture(scope="package")
def endpoint(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Endpoint]:
    tools = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    settings = {"embeddings": EmbeddingsSpec(), "traces_endpoint": collector.url, "engine_args": tools | _NO_BLANKS}
    with running_endpoint(tmp_path_factory.mktemp("endpoint"), **settings) as made:
        for seed, (name, rank) in enumerate(RANKS.items()):
            made.publish(name, made.adapter(name, rank, seed + 1))
        yield made


@contextmanager
def running_endpoint(root: Path, num_cpus: int = 2, prepare: Callable[[], None] = lambda: None, **settings: Any) -> Iterator[Endpoint]:
    """On a cluster of its own, with a home of its own; `prepare` is called once the home is there. `settings` are the spec's."""
    before = dict(os.environ)
    for name in ("ADAPTFLEET_STORE", "ADAPTFLEET_API_KEYS", "ADAPTFLEET_TENANTS", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ["ADAPTFLEET_HOME"] = str(root / "home")
    import ray
    from ray._raylet import AuthenticationTokenLoader

    from adaptfleet.core.models.loading import base_revision
    from adaptfleet.on_ray.local_cluster import LocalCluster
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy, undeploy

    base = make_base(root / "base")
    prepare()
    spec = ServingSpec(
        **{
            "model": ModelSpec(source=str(base), dtype="float32"),
            "served_name": "tiny",
            "max_loras": 3,
            "max_lora_rank": 16,
            "max_model_len": MAX_LEN,
            "max_request_bytes": MAX_BYTES,
            "cpus_per_replica": 1,
            "metrics_port": free_port(),
            **settings,
        }
    )
    try:
        with LocalCluster.start(num_cpus=num_cpus, logs_to=root / "logs") as cluster:
            os.environ.update(cluster.env)
            # Ray reads a process's token once; a test before these may have joined the shared cluster with another
            AuthenticationTokenLoader.instance().reset_cache()
            try:
                port = free_port()
                url = deploy(spec, port=port)
                yield Endpoint(url, first_key(), root, base, base_revision(base), spec, cluster)
                undeploy()
            finally:
                ray.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)
        AuthenticationTokenLoader.instance().reset_cache()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
