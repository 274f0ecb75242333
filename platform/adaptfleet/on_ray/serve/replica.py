"""A replica of the endpoint: one vLLM engine behind the door."""

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve

from adaptfleet.contracts.home import home
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.bases import Offer, ServedBase, served_bases
from adaptfleet.on_ray.serve.engine import argv, end_engine
from adaptfleet.on_ray.serve.way_in import wait_for_proxy

if TYPE_CHECKING:
    from adaptfleet.on_ray.serve.adapters import Adapters
    from adaptfleet.on_ray.serve.api_keys import Caller
    from adaptfleet.on_ray.serve.door import Door
    from adaptfleet.on_ray.serve.policy_file import PolicyFile
    from adaptfleet.on_ray.serve.routing import Wanted

_WATCH_S = 0.1
_LAST_WORDS_S = 3.0
"""How long the requests of a dead engine may take to be told."""
_ENGINE_DIED = 70

log = logging.getLogger("ray.serve")


class EngineReplica:
    async def __init__(  # type: ignore[misc]
        self, spec: ServingSpec, num_cpus: int, embedder: Any = None, offered: tuple[Offer, ...] = ()
    ) -> None:
        """`spec`: of this base alone. `offered`: all bases of the endpoint, in its order, where there are several."""
        from adaptfleet.core.models.device import device, model_dtype
        from adaptfleet.core.models.loading import base_revision, resolve_model_folder
        from adaptfleet.on_ray.published_models import at_hand
        from adaptfleet.on_ray.serve.engine import parse, set_environment, start_engine
        from adaptfleet.on_ray.serve.workload import Workload

        self._spec = spec
        self._embedder = embedder
        self._offered = offered
        self._folder = folder = await asyncio.to_thread(lambda: resolve_model_folder(at_hand(spec.model)))
        self._revision = await asyncio.to_thread(base_revision, folder)
        set_environment(spec, num_cpus, device().type)
        self._arguments = parse(argv(spec, folder, str(model_dtype(spec.model)).removeprefix("torch.")))
        self._workload = Workload()
        self._adapters: Adapters | None = None
        self._policies: PolicyFile | None = None
        self._engine = start_engine(self._arguments, self._workload)
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def door(self) -> "Door":
        """The ASGI application over the engine. Called once."""
        from adaptfleet.on_ray.published_models import adapters_taken
        from adaptfleet.on_ray.serve.adapters import Adapters
        from adaptfleet.on_ray.serve.api_keys import ApiKeys, ensure_keys
        from adaptfleet.on_ray.serve.beside import put_beside
        from adaptfleet.on_ray.serve.catalog import Catalog
        from adaptfleet.on_ray.serve.door import Door
        from adaptfleet.on_ray.serve.engine import application
        from adaptfleet.on_ray.serve.guard import Guard
        from adaptfleet.on_ray.serve.metered_engine import meter
        from adaptfleet.on_ray.serve.metrics_port import serve_metrics
        from adaptfleet.on_ray.serve.policy_file import PolicyFile
        from adaptfleet.on_ray.serve.prefetch import Prefetch
        from adaptfleet.on_ray.serve.siblings import Siblings
        from adaptfleet.on_ray.serve.slots import Slots
        from adaptfleet.on_ray.serve.tenancy import Tenancy
        from adaptfleet.on_ray.serve.tracing import Traces
        from adaptfleet.store.registry import Registry

        spec = self._spec
        registry = Registry.open()
        also = await asyncio.to_thread(adapters_taken, spec.model, registry)
        bases = await asyncio.to_thread(served_bases, self._offered)
        catalog = Catalog(registry, ServedBase(spec.base_id(), self._revision, also), bases)
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
        siblings = Siblings(spec.base_id(), [base.id for base in bases]) if bases else None
        if siblings is not None:
            door.elsewhere = siblings.inside
        self._status = put_beside(door, spec, tenancy, catalog, siblings)
        if spec.metrics_port is not None:
            self._metrics = asyncio.create_task(serve_metrics(door, spec.metrics_port))
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
        for task in (getattr(self, name, None) for name in ("_watch", "_prefetch", "_metrics")):
            if task is not None:
                task.cancel()
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()


class AddressedReplica(EngineReplica):
    """Of one base of several: the gateway sends requests to its own HTTP server, as Serve opens a port for one deployment alone."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]
        from adaptfleet.on_ray.serve.listener import Listener

        await super().__init__(*args)
        self._door = await self.door()
        self._listener = await Listener.open(self._door)

    async def place(self, wanted: "Wanted") -> tuple[str, str]:
        """This replica's id and its address, `host:port`. `wanted` is the router's (`router.AffinityRouter`)."""
        return serve.get_replica_context().replica_id.unique_id, self._listener.address

    async def inside(self, wanted: "Wanted", caller: "Caller", path: str, body: bytes, klass: str) -> tuple[int, bytes]:
        """For another base's replica: `Door.inside`."""
        return await self._door.inside_here(caller, path, body, klass)

    async def status(self, wanted: "Wanted", caller: "Caller") -> dict[str, Any]:
        """For another base's replica: `Status.here`."""
        return self._status.here(caller)

    async def __del__(self) -> None:
        if hasattr(self, "_listener"):
            await self._listener.close()
        await super().__del__()
