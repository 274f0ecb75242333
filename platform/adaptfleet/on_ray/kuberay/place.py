"""Where a bed is: its folder, its code, what every process of it gets."""

import os
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from adaptfleet.on_ray.cluster.launch import client_env
from adaptfleet.on_ray.cluster.processes import MARKER
from adaptfleet.on_ray.kuberay.certificates import Certificates

_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_RUNTIME_ENV_HOOK")
"""What the caller's shell says of another cluster must not reach this one."""
_LOW_PORTS = range(20000, 32000)
"""Below what Linux gives to outgoing connections: a port stays free while its head is down."""


@dataclass(frozen=True)
class Place:
    folder: Path
    marker: str
    code: Path
    """Working directory of every pod, and on its PYTHONPATH: what an image would have in its own."""
    env: Mapping[str, str]
    """Laid over what manifests say, such as ADAPTFLEET_HOME: a volume's path means nothing here."""
    certificates: Certificates
    api_port: int = field(default=0)

    @property
    def logs(self) -> Path:
        return self.folder / "pods"

    def process_env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        paths = [str(self.code), *filter(None, [kept.get("PYTHONPATH")])]
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
            "PYTHONPATH": os.pathsep.join(paths),
            # Workers at the lowest priority would lose the cores to whatever else the machine does.
            "RAY_worker_niceness": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            "RAY_gcs_server_port_wait_time_s": "120",
            **client_env(self.folder),
            MARKER: self.marker,
        }


@contextmanager
def _taken(ports: list[int]) -> Iterator[None]:
    with ExitStack() as stack:
        for port in ports:
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
        yield


def free_ports(number: int) -> list[int]:
    """Different ports that nobody listens on now."""
    while True:
        ports = random.sample(_LOW_PORTS, number)
        try:
            with _taken(ports):
                return ports
        except OSError:
            continue
