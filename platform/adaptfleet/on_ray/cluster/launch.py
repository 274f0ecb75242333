"""Starts the head node of a private cluster: a free loopback port for each of its servers, a token, a session of its own."""

import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.on_ray.cluster.ingress import FILES_NEEDED, USE_HAPROXY, files_allowed, has_ingress, ingress_env
from adaptfleet.on_ray.cluster.processes import MARKER, ProcessId, end_cluster
from adaptfleet.on_ray.cluster.record import ClusterRecord
from adaptfleet.on_ray.cluster.submission import ray_command

_START_TIMEOUT_S = 180.0
_OBJECT_STORE_BYTES = 512 * 1024 * 1024
_MAX_FOLDER_CHARS = 36
"""A Unix socket's path has at most 107 characters, and Ray adds `/ray/session_.../sockets/plasma_store`: up to 71 of them."""
RAY_FOLDER = "ray"
"""Ray opens its own folder to everyone (mode 0777), so it lies inside one that is closed to all but its owner."""

# Ends the cluster when the process that started it dies, even by SIGKILL: prctl(PR_SET_PDEATHSIG, SIGTERM), kept across exec.
_FATE_SHARING = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def with_parent(command: Sequence[str]) -> list[str]:
    """The command as one that gets SIGTERM when the thread that starts it ends, however that ends."""
    return [sys.executable, "-c", _FATE_SHARING, str(os.getpid()), *command]


def private_folder(folder: Path | None) -> Path:
    if folder is None:
        root = tempfile.gettempdir()
        return Path(tempfile.mkdtemp(prefix="adaptfleet-", dir=root if len(root) <= _MAX_FOLDER_CHARS - 20 else "/tmp"))
    place = folder.absolute()
    if len(str(place)) > _MAX_FOLDER_CHARS:
        raise AdaptfleetError(
            f"the cluster's folder {place} has {len(str(place))} characters; Unix sockets in it allow {_MAX_FOLDER_CHARS}. "
            f"Use a shorter path."
        )
    place.mkdir(mode=0o700, parents=True)
    return place


def client_env(folder: Path) -> dict[str, str]:
    """Token from a file, never on a command line. Ray takes the loopback address only where it believes that other nodes cannot join, which
    this variable says (Ray 2.60, `_private/services.py`); `tests/cluster` sees what the ports are bound to."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        USE_HAPROXY: "1" if has_ingress(folder) else "0",
    }


def launch(
    folder: Path, marker: str, num_cpus: int, detached: bool, env: Mapping[str, str]
) -> tuple[ClusterRecord | None, subprocess.Popen[bytes], str]:
    """One try. Without a record the start failed, nothing runs any more, and the text says why."""
    new_token(folder)
    command = _start_command(folder, num_cpus)
    if not detached:
        command = with_parent(command)
    output = folder / "start.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=_cluster_env(folder, marker, env),
            cwd="/",
        )
    leader = ProcessId.of(process.pid)
    try:
        found = _wait_started(process, folder, output) if leader else None
    except BaseException:
        end_cluster(leader, marker, grace_s=2.0)
        raise
    said = output.read_text(encoding="utf-8", errors="replace")[-3000:]
    if found is None or leader is None:
        end_cluster(leader, marker, grace_s=2.0)
        process.wait(timeout=30)
        return None, process, said
    address, dashboard_url = found
    owner = None if detached else ProcessId.of(os.getpid())
    return ClusterRecord(marker, str(folder), address, dashboard_url, num_cpus, leader, owner), process, said


def new_token(folder: Path) -> None:
    """The secret that every process of a cluster shows to the others, for its owner's eyes."""
    _write_private(folder / "token", secrets.token_hex(32))


def _start_command(folder: Path, num_cpus: int) -> list[str]:
    """`ray start` in the foreground. Port 0: the system gives a free one; Ray Client's server knows no 0, and cannot be left out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        client_port = probe.getsockname()[1]
    command = [*ray_command(), "start", "--head", "--block", "--disable-usage-stats", "--log-style", "record", "--log-color", "false"]
    command += ["--temp-dir", str(folder / RAY_FOLDER), "--num-cpus", str(num_cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)]
    command += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--ray-client-server-port", str(client_port)]
    for port in (
        "port",
        "dashboard-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "node-manager-port",
        "object-manager-port",
        "runtime-env-agent-port",
        "metrics-export-port",
    ):
        command += [f"--{port}", "0"]
    return command


def _cluster_env(folder: Path, marker: str, env: Mapping[str, str]) -> dict[str, str]:
    # What the caller's shell says of another cluster must not reach this one.
    foreign = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_RUNTIME_ENV_HOOK")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    # Jobs say `python`: this one.
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {
        **kept,
        "PATH": path,
        # Workers at the lowest priority would lose the cores to whatever else the machine does.
        "RAY_worker_niceness": "0",
        # Nothing here moves to another node.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(_START_TIMEOUT_S)),
        "RAY_gcs_server_port_wait_time_s": "120",
        **({} if env.get(USE_HAPROXY) == "0" or files_allowed() < FILES_NEEDED else ingress_env(folder)),
        **env,
        **client_env(folder),
        MARKER: marker,
    }


def _wait_started(process: subprocess.Popen[bytes], folder: Path, output: Path) -> tuple[str, str] | None:
    """The control store's address and the dashboard's URL, or None when Ray gave up or the time is over."""
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        said = output.read_text(encoding="utf-8", errors="replace")
        dashboard = re.search(r"RAY_API_SERVER_ADDRESS='(http://[^']+)'", said)
        address = folder / RAY_FOLDER / "ray_current_cluster"
        if "--block" in said and dashboard and address.is_file():
            return address.read_text(encoding="utf-8").strip(), dashboard[1]
        time.sleep(0.2)
    return None


def _write_private(file: Path, text: str) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as handle:
        handle.write(text)
