"""The Serve deployment: one vLLM engine per replica behind the door."""

import asyncio
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

import adaptfleet
from adaptfleet.contracts.home import home
from adaptfleet.contracts.serving import ReplicaRange, ServingSpec
from adaptfleet.on_ray.cluster.ingress import USE_HAPROXY
from adaptfleet.on_ray.serve.autoscaling import Policy
from adaptfleet.on_ray.serve.embedding import embedder
from adaptfleet.on_ray.serve.engine import argv, end_engine
from adaptfleet.on_ray.serve.router import AffinityRouter, router
from adaptfleet.on_ray.serve.way_in import wait_for_proxy

if TYPE_CHECKING:
    from adaptfleet.on_ray.serve.adapters import Adapters
    from adaptfleet.on_ray.serve.policy_file import PolicyFile

APPLICATION = "adaptfleet"
_WATCH_S = 0.1
_LAST_WORDS_S = 3.0
"""How long the requests of a dead engine may take to be told."""
_ENGINE_DIED = 70
_REPORT_S = 1.0
"""How often a replica tells the router of its adapters and requests."""

_IN_THE_REPLICA = {
    # One event loop for HTTP, the door and vLLM's front end: a token takes no hop between threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}

log = logging.getLogger("ray.serve")


@serve.deployment(name="endpoint", health_check_period_s=5)
@serve.ingress()
class Endpoint:
    """Serve asks for the ASGI application after `__init__` (`__serve_build_asgi_app__`, Ray 2.60)."""

    async def __init__(self, spec: ServingSpec, num_cpus: int, embedder: Any = None) -> None:  # type: ignore[misc]
        from adaptfleet.core.models.device import device, model_dtype
        from adaptfleet.core.models.loading import base_revision, resolve_model_folder
        from adaptfleet.on_ray.published_models import at_hand
        from adaptfleet.on_ray.serve.engine import parse, set_environment, start_engine
        from adaptfleet.on_ray.serve.workload import Workload

        self._spec = spec
        self._embedder = embedder
        self._folder = folder = await asyncio.to_thread(lambda: resolve_model_folder(at_hand(spec.model)))
        self._revision = await asyncio.to_thread(base_revision, folder)
        set_environment(spec, num_cpus, device().type)
        self._arguments = parse(argv(spec, folder, str(model_dtype(spec.model)).removeprefix("torch.")))
        self._workload = Workload()
        self._adapters: Adapters | None = None
        self._policies: PolicyFile | None = None
        self._engine = start_engine(self._arguments, self._workload)
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def __serve_build_asgi_app__(self) -> Any:
        from adaptfleet.on_ray.published_models import adapters_taken
        from adaptfleet.on_ray.serve.adapters import Adapters
        from adaptfleet.on_ray.serve.api_keys import ApiKeys, ensure_keys
        from adaptfleet.on_ray.serve.beside import put_beside
        from adaptfleet.on_ray.serve.catalog import Catalog
        from adaptfleet.on_ray.serve.door import Door
        from adaptfleet.on_ray.serve.engine import application
        from adaptfleet.on_ray.serve.guard import Guard
        from adaptfleet.on_ray.serve.metered_engine import meter
        from adaptfleet.on_ray.serve.policy_file import PolicyFile
        from adaptfleet.on_ray.serve.prefetch import Prefetch
        from adaptfleet.on_ray.serve.slots import Slots
        from adaptfleet.on_ray.serve.tenancy import Tenancy
        from adaptfleet.on_ray.serve.tracing import Traces
        from adaptfleet.store.registry import Registry

        spec = self._spec
        registry = Registry.open()
        catalog = Catalog(registry, spec.base_id(), self._revision, await asyncio.to_thread(adapters_taken, spec.model, registry))
        kept = max(spec.max_cpu_loras, spec.max_loras)
        cache = home() / "cache" / "adapters"
        slots = Slots(spec.max_loras - len(spec.pinned))
        self._adapters = Adapters(registry, cache, self._engine, self._folder, spec.max_lora_rank, kept, slots)
        prefetch = Prefetch(registry, catalog, self._adapters, spec.pinned)
        await prefetch.pin()
        self._prefetch = asyncio.create_task(prefetch.follow())
        keys = None
        if spec.auth == "api-key":
            log.info("API keys: %s", ensure_keys())
            keys = ApiKeys()
        self._policies = PolicyFile()
        tenancy = Tenancy(keys, self._policies, spec.max_num_seqs + spec.max_waiting)
        meter(self._engine)
        app = await application(self._engine, self._arguments, catalog)
        guarded = Guard(
            app,
            self._adapters,
            self._workload,
            lambda: not self._engine.errored,
            spec.max_num_seqs + spec.max_waiting,
            serve.get_replica_context().replica_id.unique_id,
        )
        traces = Traces(spec.traces_endpoint) if spec.traces_endpoint else None
        door = Door(guarded, catalog, self._adapters, tenancy, spec.max_request_bytes, lambda: not self._engine.errored, traces)
        door.embedder = self._embedder
        put_beside(door, spec, tenancy, catalog)
        await wait_for_proxy()
        return door

    async def check_health(self) -> None:
        await self._engine.check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """For the router: `router.AffinityRouter`."""
        names = set(self._adapters.names()) if self._adapters is not None else set()
        if self._policies is not None:
            names |= self._policies.now.aliases_of(names)
        now, taking = self._workload, not self._engine.errored
        return {"at": time.time(), "requests": now.requests, "stay_s": now.stay_s, "adapters": sorted(names), "taking": taking}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `autoscaling.Policy`."""
        now = self._workload.pressure()
        return {"requests": now.requests, "waiting": now.waiting, "kv_usage": now.kv_usage, "ttft_s": now.ttft_s}

    async def _end_with_the_engine(self) -> None:
        """A replica without an engine answers errors at once and so draws requests. It leaves instead; Serve starts another."""
        while not self._engine.errored:
            if not self._engine.output_processor.has_unfinished_requests():
                self._workload.began_after_idling()
            elif self._workload.stalled_s() > self._spec.stall_s:
                log.error("the engine has requests and took no step for %.0f s; it is ended.", self._workload.stalled_s())
                end_engine(self._engine)
                self._workload.began_after_idling()
            await asyncio.sleep(_WATCH_S)
        log.error("the engine died; this replica ends.")
        until = time.monotonic() + _LAST_WORDS_S
        while self._workload.requests and time.monotonic() < until:
            await asyncio.sleep(_WATCH_S)
        await asyncio.sleep(_WATCH_S)  # what was written last leaves the sockets
        os._exit(_ENGINE_DIED)

    async def __del__(self) -> None:
        for task in (getattr(self, "_watch", None), getattr(self, "_prefetch", None)):
            if task is not None:
                task.cancel()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()


def build(spec: ServingSpec) -> Application:
    """The application for `serve.run`. ServingError, before anything is started, where `engine_args` cannot be."""
    argv(spec, Path(), "auto")
    num_cpus = spec.cpus_per_replica or max(1, (len(os.sched_getaffinity(0)) - 1) // spec.max_replicas())
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": _places() | _IN_THE_REPLICA}}
    num_gpus = _gpus(spec)
    if num_gpus:
        options["num_gpus"] = num_gpus
    lasting = spec.model_copy(update={"replicas": 1})  # a replica is to go on when only their number changes
    endpoint: Application = Endpoint.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        # The engine queues and batches by itself, and the door sends away what is too much: Serve is to hand on everything.
        max_ongoing_requests=2 * (spec.max_num_seqs + spec.max_waiting),
        graceful_shutdown_timeout_s=spec.drain_s,
        version=_version(lasting, num_cpus),
        _internal=True,  # Serve keeps `version` to itself (Ray 2.60); without one it replaces every replica at each deployment
        **_scaling(spec),
        **_routing(),
    ).bind(
        lasting,
        num_cpus,
        embedder(spec, _places()) if spec.embeddings else None,
    )
    if not _streams_through_haproxy():
        return endpoint
    return endpoint._with_ingress_request_router(router(endpoint, spec.base_id(), _places(), _version(spec.base_id())))


def _version(*settings: Any) -> str:
    """Of the settings and of this code: replicas of another version are replaced, others go on."""
    told = hashlib.sha256(repr([setting.fingerprint() if isinstance(setting, ServingSpec) else setting for setting in settings]).encode())
    told.update(repr(sorted(_places().items())).encode())
    for file in sorted(Path(adaptfleet.__file__).parent.rglob("*.py")):
        told.update(file.read_bytes())
    return told.hexdigest()[:16]


def _streams_through_haproxy() -> bool:
    """Whether the cluster was started for it. Else Serve's own proxy carries every token, and knows no adapter of a request."""
    return os.environ.get(USE_HAPROXY) == "1"


def _routing() -> dict[str, Any]:
    if not _streams_through_haproxy():
        return {}
    settings: dict[str, Any] = {
        "request_router_class": AffinityRouter,
        "request_routing_stats_period_s": _REPORT_S,
        "request_routing_stats_timeout_s": 10.0,
    }
    return {"request_router_config": RequestRouterConfig(**settings)}


def _scaling(spec: ServingSpec) -> dict[str, Any]:
    wanted = spec.replicas
    if not isinstance(wanted, ReplicaRange):
        return {"num_replicas": wanted}
    each = wanted.requests_per_replica or max(1.0, 0.75 * spec.max_num_seqs)
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=wanted.min,
            max_replicas=wanted.max,
            target_ongoing_requests=each,
            upscale_delay_s=wanted.upscale_delay_s,
            downscale_delay_s=wanted.downscale_delay_s,
            metrics_interval_s=1.0,
            look_back_period_s=5.0,
            policy=AutoscalingPolicy(
                policy_function=Policy,
                policy_kwargs={"requests_per_replica": each, "ttft_s": wanted.ttft_s, "kv_usage": wanted.kv_usage},
            ),
        )
    }


def _places() -> dict[str, str]:
    """Where the home and the store are, as this process knows it. Keys and credentials come from the cluster's own environment."""
    return {name: os.environ[name] for name in ("ADAPTFLEET_HOME", "ADAPTFLEET_STORE", "ADAPTFLEET_TENANTS") if os.environ.get(name)}


def _gpus(spec: ServingSpec) -> int:
    """What the spec says, else as many as the engine is split over, where the cluster has any."""
    import ray

    if spec.gpus_per_replica is not None:
        return spec.gpus_per_replica
    if not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return 0
    given = {key.replace("-", "_"): value for key, value in spec.engine_args.items()}
    return int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
