"""The Serve application: an endpoint's deployments, from a serving spec."""

import hashlib
import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

import adaptfleet
from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.serving import ReplicaRange, ServingSpec
from adaptfleet.on_ray.cluster.ingress import USE_HAPROXY
from adaptfleet.on_ray.serve.autoscaling import Policy
from adaptfleet.on_ray.serve.bases import Offer, deployment_name, offers, strange_pins
from adaptfleet.on_ray.serve.embedding import embedder
from adaptfleet.on_ray.serve.engine import argv
from adaptfleet.on_ray.serve.gateway import Gateway
from adaptfleet.on_ray.serve.replica import AddressedReplica, EngineReplica
from adaptfleet.on_ray.serve.router import AffinityRouter, router

APPLICATION = "adaptfleet"
_REPORT_S = 1.0
"""How often a replica tells the router of its adapters and requests."""
_GATEWAYS = 2
"""One that dies takes half the streams with it, and no new request."""
_GATEWAY_REQUESTS = 10_000

_IN_THE_REPLICA = {
    # One event loop for HTTP, the door and vLLM's front end: a token takes no hop between threads.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


class _Ingress(EngineReplica):
    """Serve asks for the ASGI application after `__init__` (`__serve_build_asgi_app__`, Ray 2.60)."""

    async def __serve_build_asgi_app__(self) -> Any:
        return await self.door()


Endpoint = serve.deployment(name="endpoint", health_check_period_s=5)(serve.ingress()(_Ingress))


def build(spec: ServingSpec) -> Application:
    """The application for `serve.run`. ServingError, before anything is started, where `engine_args` or `pinned` cannot be."""
    bases = spec.bases()
    _check(bases)
    cores = cores_of(bases)
    if len(bases) > 1:
        return _several(spec, bases, cores)
    endpoint: Application = Endpoint.options(**_engine_options(spec, cores[0]), **_routing(_streams_through_haproxy())).bind(
        _lasting(spec), cores[0], embedder(spec, _places()) if spec.embeddings else None
    )
    if not _streams_through_haproxy():
        return endpoint
    return endpoint._with_ingress_request_router(router(endpoint, spec.base_id(), _places(), _version(spec.base_id())))


def _several(spec: ServingSpec, bases: tuple[ServingSpec, ...], cores: list[int]) -> Application:
    """A deployment for each base, and the gateway before them."""
    offered = offers(spec)
    endpoints = [
        serve.deployment(name=deployment_name(base.base_id()), health_check_period_s=5)(AddressedReplica)
        .options(**_engine_options(base, num_cpus, offered), **_routing(True))
        .bind(_lasting(base), num_cpus, embedder(base, _places()) if base.embeddings else None, offered)
        for base, num_cpus in zip(bases, cores, strict=True)
    ]
    may_sleep = not any(base.min_replicas() for base in bases)
    settings = (offered, spec.auth == "api-key", may_sleep, spec.max_request_bytes, spec.max_file_bytes)
    gateway = serve.deployment(name="gateway", health_check_period_s=5)(serve.ingress()(Gateway)).options(
        num_replicas=_GATEWAYS,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _places() | _IN_THE_REPLICA}},
        max_ongoing_requests=_GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=max(base.drain_s for base in bases),
        version=_version(*settings),
        _internal=True,
    )
    application: Application = gateway.bind(*settings, *endpoints)
    return application


def _check(bases: tuple[ServingSpec, ...]) -> None:
    """ServingError tells of all bases at once."""
    faults = []
    for base in bases:
        try:
            argv(base, Path(), "auto")
        except ServingError as error:
            faults.append(str(error) if len(bases) == 1 else f"{base.base_id()}: {error}")
    if len(bases) > 1:
        faults += strange_pins(bases)
    if faults:
        raise ServingError(" ".join(faults))


def cores_of(bases: tuple[ServingSpec, ...]) -> list[int]:
    """Of one replica of each base: what its spec says, else an equal share of what the others leave, with one core for the rest."""
    said = sum((base.cpus_per_replica or 0) * base.max_replicas() for base in bases)
    sharing = sum(base.max_replicas() for base in bases if base.cpus_per_replica is None)
    share = max(1, (len(os.sched_getaffinity(0)) - 1 - said) // max(1, sharing))
    return [base.cpus_per_replica or share for base in bases]


def _lasting(spec: ServingSpec) -> ServingSpec:
    """A replica is to go on when only their number changes."""
    return spec.model_copy(update={"replicas": 1})


def _engine_options(spec: ServingSpec, num_cpus: int, offered: tuple[Offer, ...] = ()) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": {"env_vars": _places() | _IN_THE_REPLICA}}
    num_gpus = _gpus(spec)
    if num_gpus:
        options["num_gpus"] = num_gpus
    return {
        "ray_actor_options": options,
        # The engine queues and batches by itself, and the door sends away what is too much: Serve is to hand on everything.
        "max_ongoing_requests": 2 * (spec.max_num_seqs + spec.max_waiting),
        "graceful_shutdown_timeout_s": spec.drain_s,
        "version": _version(_lasting(spec), num_cpus, *offered),
        "_internal": True,  # Serve keeps `version` to itself (Ray 2.60); without one it replaces every replica at each deployment
        **_scaling(spec),
    }


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


def _routing(is_asked: bool) -> dict[str, Any]:
    """`is_asked`: something asks Serve's router for a replica: HAProxy, or the gateway."""
    if not is_asked:
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
