"""Embeddings from the chat model's own hidden states: a second engine of the same base and its adapters, in a deployment of its own.

vLLM runs a model either to generate or to pool; an engine cannot do both. So the door hands requests for embeddings, pooling and scores to
this deployment, which runs vLLM's pooling runner over the same weights. It scales by itself and, by default, to nothing while nobody asks:
the first request then waits for its engine. The vector is the mean (or the last) of the last layer's hidden states after the final norm,
of length 1.
"""

import asyncio
import logging
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.serving import EmbeddingsSpec, ServingSpec

ROUTES = ("/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank")
_WATCH_S = 0.25
_ENGINE_DIED = 70

log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Pooled:
    """An answer, as vLLM's application gave it."""

    status: int
    content_type: bytes
    body: bytes
    prompt_tokens: int


class Embedder:
    async def __init__(self, spec: ServingSpec, env: dict[str, str]) -> None:  # type: ignore[misc]
        from adaptfleet.core.models.device import device, model_dtype
        from adaptfleet.core.models.loading import base_revision, resolve_model_folder
        from adaptfleet.on_ray.published_models import adapters_taken, at_hand
        from adaptfleet.on_ray.serve.adapters import Adapters
        from adaptfleet.on_ray.serve.bases import ServedBase
        from adaptfleet.on_ray.serve.catalog import Catalog
        from adaptfleet.on_ray.serve.engine import application, argv, parse, set_environment
        from adaptfleet.on_ray.serve.metered_engine import meter
        from adaptfleet.on_ray.serve.slots import Slots
        from adaptfleet.store.registry import Registry

        given = spec.embeddings
        if given is None:
            raise ServingError("the spec asks for no embeddings.")
        folder = await asyncio.to_thread(lambda: resolve_model_folder(at_hand(spec.model)))
        set_environment(spec.model_copy(update={"kv_cache_gib": given.kv_cache_gib}), given.cpus, device().type)
        arguments = parse(argv(pooling_spec(spec), folder, str(model_dtype(spec.model)).removeprefix("torch.")))
        self._engine = _start(arguments)
        registry = Registry.open()
        also = await asyncio.to_thread(adapters_taken, spec.model, registry)
        revision = await asyncio.to_thread(base_revision, folder)
        self._catalog = Catalog(registry, ServedBase(spec.base_id(), revision, also))
        kept = max(spec.max_cpu_loras, spec.max_loras)
        self._adapters = Adapters(
            registry, home() / "cache" / "adapters", self._engine, folder, spec.max_lora_rank, kept, Slots(spec.max_loras)
        )
        meter(self._engine)
        self._application = await application(self._engine, arguments, self._catalog)
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def answer(self, path: str, body: bytes, requested: str, name: str | None, version: int | None, request_id: str) -> Pooled:
        """The door has checked who asks, and what `requested` means: the base, or this version of an adapter."""
        from adaptfleet.on_ray.serve.accounts import Grant
        from adaptfleet.on_ray.serve.asgi import posted_inside
        from adaptfleet.on_ray.serve.fair_order import FairOrder
        from adaptfleet.on_ray.serve.metered_engine import Meter, metered
        from adaptfleet.on_ray.serve.refusal import RefusalError
        from adaptfleet.on_ray.serve.served_models import Current, current

        grant, order = Grant("-", 0), FairOrder()
        metered.set(Meter(grant, order, order.ticket("-", "normal", 1, 1)))
        try:
            adapter = None
            if name is not None and version is not None:
                adapter = await self._adapters.request_for((await self._catalog.find(f"{name}@{version}")).adapter)  # type: ignore[arg-type]
        except RefusalError as refusal:
            return Pooled(refusal.status, b"application/json", refusal.body(), 0)
        current.set(Current(requested, adapter))
        status, content_type, parts = 500, b"application/json", []

        async def receive() -> dict[str, Any]:
            if not asked:
                asked.append(True)
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, content_type
            if message["type"] == "http.response.start":
                status = message["status"]
                content_type = next((value for key, value in message["headers"] if key.lower() == b"content-type"), content_type)
            else:
                parts.append(message.get("body", b""))

        asked: list[bool] = []
        headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
        try:
            async with nullcontext() if adapter is None else self._adapters.in_engine(adapter):
                await self._application(posted_inside(path, headers), receive, send)
        except RefusalError as refusal:
            return Pooled(refusal.status, b"application/json", refusal.body(), 0)
        return Pooled(status, content_type, b"".join(parts), grant.prompt_tokens)

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def _end_with_the_engine(self) -> None:
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_S)
        log.error("the embedding engine died; this replica ends.")
        os._exit(_ENGINE_DIED)

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()


def pooling_spec(spec: ServingSpec) -> ServingSpec:
    """The same model as a pooler. What `engine_args` says of generating does not concern it."""
    given = spec.embeddings or EmbeddingsSpec()
    pooler = {"seq_pooling_type": given.pooling.upper(), "use_activation": True}
    return spec.model_copy(
        update={"engine_args": {"runner": "pooling", "convert": "embed", "pooler_config": pooler}, "traces_endpoint": None}
    )


def embedder(spec: ServingSpec, env: dict[str, str]) -> Application:
    given = spec.embeddings or EmbeddingsSpec()
    scaling = {"min_replicas": given.min_replicas, "max_replicas": given.max_replicas, "target_ongoing_requests": 32}
    options: dict[str, Any] = {"num_cpus": given.cpus, "runtime_env": {"env_vars": env}}
    if ray.is_initialized() and ray.cluster_resources().get("GPU"):
        options["num_gpus"] = 1
    deployment = serve.deployment(
        name="embedder",
        ray_actor_options=options,
        autoscaling_config=scaling | {"upscale_delay_s": 0, "downscale_delay_s": given.idle_s},
        max_ongoing_requests=256,
        health_check_period_s=5,
    )
    return deployment(Embedder).bind(spec, env)


def _start(arguments: Any) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    context = UsageContext.OPENAI_API_SERVER
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config(usage_context=context)
    return AsyncLLM.from_vllm_config(config, usage_context=context)
