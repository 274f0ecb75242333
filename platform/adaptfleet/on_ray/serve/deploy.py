"""Starts and stops the endpoint on the cluster that the environment names."""

import os
import ssl
import time
import urllib.error
import urllib.request

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.serving import ServingSpec, TlsSpec
from adaptfleet.on_ray.serve.deployment import APPLICATION, build, cores_of

START_TIMEOUT_S = 900.0


def deploy(spec: ServingSpec, host: str = "127.0.0.1", port: int = 8000, timeout_s: float = START_TIMEOUT_S) -> str:
    """Runs the endpoint and returns its base URL, without `/v1`, once it answers. ServingError says why it did not start."""
    trusting = None if spec.tls is None else check_tls(spec.tls)
    _connect()
    _check_cores(spec)
    files = {} if spec.tls is None else {"ssl_certfile": spec.tls.certificate, "ssl_keyfile": spec.tls.key}
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port, **files))
    try:
        serve.run(build(spec), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise ServingError(f"the endpoint did not start: {error} {_details()}") from None
    url = f"http{'s' if spec.tls else ''}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _await_healthy(url, timeout_s, trusting)
    return url


def undeploy() -> None:
    """Stops the endpoint, and Serve with it where nothing else is served. Fine when nothing runs."""
    _connect()
    serve.delete(APPLICATION)
    if not serve.status().applications:
        serve.shutdown()


def check_tls(tls: TlsSpec) -> ssl.SSLContext:
    """A client's context that trusts this certificate alone. ServingError, before anything starts, where the files do not do."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ServingError("tls is Serve's own proxy's, and this cluster streams through HAProxy. Leave one of both out.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
        context = ssl.create_default_context(cafile=tls.certificate)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ServingError(f"tls: {tls.certificate} and {tls.key} are no certificate with its private key in PEM form: {error}.") from None
    # This machine asks by an address; what counts here is that it is this very certificate.
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _check_cores(spec: ServingSpec) -> None:
    """Several bases share a machine's cores as far as they go. ServingError, before anything starts, unless nodes come when asked for."""
    bases = spec.bases()
    if len(bases) == 1:
        return
    from adaptfleet.on_ray.autoscaler import autoscaler_limits

    limits = autoscaler_limits()
    if limits is None:
        return
    wanted = [(base.base_id(), base.min_replicas(), num_cpus) for base, num_cpus in zip(bases, cores_of(bases), strict=True)]
    if spec.embeddings is not None:
        wanted.append(("embeddings", spec.embeddings.min_replicas, spec.embeddings.cpus))
    needed = sum(num_replicas * num_cpus for _, num_replicas, num_cpus in wanted)
    there = max(ray.cluster_resources().get("CPU", 0.0), limits.get("CPU", 0.0))
    if needed > there:
        each = ", ".join(f"{name} {num_replicas} x {num_cpus}" for name, num_replicas, num_cpus in wanted)
        raise ServingError(
            f"the replicas need {needed} cores ({each}), and the cluster has {there:g}. "
            f"Lower cpus_per_replica or replicas, or let a base sleep until it is asked (replicas: {{min: 0, max: 1}})."
        )


def _connect() -> None:
    if not ray.is_initialized():
        ray.init(address="auto", namespace="serve", log_to_driver=False)


def _details() -> str:
    """What Serve says of the application; the replica's own error is in it."""
    state = serve.status().applications.get(APPLICATION)
    return "" if state is None else "; ".join([state.message, *(part.message for part in state.deployments.values())])


def _await_healthy(url: str, timeout_s: float, trusting: ssl.SSLContext | None) -> None:
    until = time.monotonic() + timeout_s
    while True:
        state = serve.status().applications.get(APPLICATION)
        if state is not None and state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ServingError(f"the endpoint did not start: {_details()}")
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5, context=trusting) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        if time.monotonic() > until:
            raise ServingError(f"the endpoint at {url} did not answer within {timeout_s:.0f} s: {last}. See `serve status`.")
        time.sleep(0.2)
