"""Starts and stops the endpoint on the cluster that the environment names."""

import time
import urllib.error
import urllib.request

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.on_ray.serve.deployment import APPLICATION, build

START_TIMEOUT_S = 900.0


def deploy(spec: ServingSpec, host: str = "127.0.0.1", port: int = 8000, timeout_s: float = START_TIMEOUT_S) -> str:
    """Runs the endpoint and returns its base URL, without `/v1`, once it answers. ServingError says why it did not start."""
    _connect()
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host=host, port=port))
    try:
        serve.run(build(spec), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        raise ServingError(f"the endpoint did not start: {error} {_details()}") from None
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    _await_healthy(url, timeout_s)
    return url


def undeploy() -> None:
    """Stops the endpoint, and Serve with it where nothing else is served. Fine when nothing runs."""
    _connect()
    serve.delete(APPLICATION)
    if not serve.status().applications:
        serve.shutdown()


def _connect() -> None:
    if not ray.is_initialized():
        ray.init(address="auto", namespace="serve", log_to_driver=False)


def _details() -> str:
    """What Serve says of the application; the replica's own error is in it."""
    state = serve.status().applications.get(APPLICATION)
    return "" if state is None else "; ".join([state.message, *(part.message for part in state.deployments.values())])


def _await_healthy(url: str, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while True:
        state = serve.status().applications.get(APPLICATION)
        if state is not None and state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            raise ServingError(f"the endpoint did not start: {_details()}")
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        if time.monotonic() > until:
            raise ServingError(f"the endpoint at {url} did not answer within {timeout_s:.0f} s: {last}. See `serve status`.")
        time.sleep(0.2)
