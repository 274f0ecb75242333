"""The Serve deployment: one vLLM engine per replica behind the door."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from adaptfleet.contracts.home import home
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.embedding import embedder
from adaptfleet.on_ray.serve.engine import argv

APPLICATION = "adaptfleet"
_WATCH_S = 0.25
_ENGINE_DIED = 70

log = logging.getLogger("ray.serve")


@serve.deployment(name="endpoint", health_check_period_s=5, graceful_shutdown_timeout_s=30)
@serve.ingress()
class Endpoint:
    """Serve asks for the ASGI application after `__init__` (`__serve_build_asgi_app__`, Ray 2.60)."""

    async def __init__(self, spec: ServingSpec, num_cpus: int, embedder: Any = None) -> None:  # type: ignore[misc]
        from adaptfleet.core.models.device import device, model_dtype
        from adaptfleet.core.models.loading import base_revision, resolve_model_folder
        from adaptfleet.on_ray.published_models import at_hand
        from adaptfleet.on_ray.serve.engine import parse, set_environment, start_engine

        self._spec = spec
        self._embedder = embedder
        self._folder = folder = await asyncio.to_thread(lambda: resolve_model_folder(at_hand(spec.model)))
        self._revision = await asyncio.to_thread(base_revision, folder)
        set_environment(spec, num_cpus, device().type)
        self._arguments = parse(argv(spec, folder, str(model_dtype(spec.model)).removeprefix("torch.")))
        self._engine = start_engine(self._arguments)
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def __serve_build_asgi_app__(self) -> Any:
        from adaptfleet.on_ray.published_models import adapters_taken
        from adaptfleet.on_ray.serve.adapters import Adapters
        from adaptfleet.on_ray.serve.api_keys import ApiKeys, ensure_keys
        from adaptfleet.on_ray.serve.beside import put_beside
        from adaptfleet.on_ray.serve.catalog import Catalog
        from adaptfleet.on_ray.serve.door import Door
        from adaptfleet.on_ray.serve.engine import application
        from adaptfleet.on_ray.serve.metered_engine import meter
        from adaptfleet.on_ray.serve.policy_file import PolicyFile
        from adaptfleet.on_ray.serve.tenancy import Tenancy
        from adaptfleet.on_ray.serve.tracing import Traces
        from adaptfleet.store.registry import Registry

        spec = self._spec
        registry = Registry.open()
        catalog = Catalog(registry, spec.base_id(), self._revision, await asyncio.to_thread(adapters_taken, spec.model, registry))
        kept = max(spec.max_cpu_loras, spec.max_loras)
        cache = home() / "cache" / "adapters"
        adapters = Adapters(registry, cache, self._engine, self._folder, spec.max_lora_rank, kept)
        keys = None
        if spec.auth == "api-key":
            log.info("API keys: %s", ensure_keys())
            keys = ApiKeys()
        tenancy = Tenancy(keys, PolicyFile(), max(256, 4 * spec.max_num_seqs))
        meter(self._engine)
        app = await application(self._engine, self._arguments, catalog)
        traces = Traces(spec.traces_endpoint) if spec.traces_endpoint else None
        door = Door(app, catalog, adapters, tenancy, spec.max_request_bytes, lambda: not self._engine.errored, traces)
        door.embedder = self._embedder
        put_beside(door, spec, tenancy, catalog)
        return door

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def _end_with_the_engine(self) -> None:
        """A replica without an engine answers errors at once and so draws requests. It leaves instead; Serve starts another."""
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_S)
        log.error("the engine died; this replica ends.")
        os._exit(_ENGINE_DIED)

    async def __del__(self) -> None:
        watch = getattr(self, "_watch", None)
        if watch is not None:
            watch.cancel()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()


def build(spec: ServingSpec) -> Application:
    """The application for `serve.run`. ServingError, before anything is started, where `engine_args` cannot be."""
    argv(spec, Path(), "auto")
    num_cpus = spec.cpus_per_replica or max(1, len(os.sched_getaffinity(0)) - 1)
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": _places()}}
    num_gpus = _gpus(spec)
    if num_gpus:
        options["num_gpus"] = num_gpus
    # The engine queues and batches by itself: Serve is to hand it everything.
    return Endpoint.options(  # type: ignore[attr-defined]
        ray_actor_options=options, max_ongoing_requests=max(256, 4 * spec.max_num_seqs)
    ).bind(spec, num_cpus, embedder(spec, _places()) if spec.embeddings else None)


def _places() -> dict[str, str]:
    """Where the home and the store are, as this process knows it. Keys and credentials come from the cluster's own environment."""
    return {name: os.environ[name] for name in ("ADAPTFLEET_HOME", "ADAPTFLEET_STORE", "ADAPTFLEET_TENANTS") if os.environ.get(name)}


def _gpus(spec: ServingSpec) -> int:
    """As many as the engine is split over, where the cluster has any."""
    import ray

    if not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return 0
    given = {key.replace("-", "_"): value for key, value in spec.engine_args.items()}
    return int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
