"""A worker node on this machine that joins a local cluster and can be drained or killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIMIT_S = 120
SLOW = {"PYTHONPATH": str(Path(__file__).parent / "slow_disk")}
"""The environment of nodes that a file in the home slows down."""


# `ray start` refuses to join a cluster that keeps to the loopback address; its own node class does not ask.
_NODE = """
import sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
address, num_cpus = sys.argv[1:]
node = Node(
    RayParams(
        gcs_address=address, node_ip_address="127.0.0.1", num_cpus=int(num_cpus), object_store_memory=100 * 2**20,
        dashboard_agent_listen_port=0, metrics_agent_port=0, runtime_env_agent_port=0, metrics_export_port=0,
    ),
    head=False, shutdown_at_exit=True, spawn_reaper=False, connect_only=False,
)
print(node.node_id, flush=True)
while True:
    time.sleep(60)
"""


class WorkerNode:
    def __init__(self, cluster: Any, num_cpus: int, log: Path, env: Mapping[str, str] | None = None) -> None:
        self._env = {
            **os.environ,
            **cluster.env,
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": "90",
            **(env or {}),
        }
        command = [sys.executable, "-c", _NODE, cluster.address, str(num_cpus)]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, env=self._env, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True)
        assert self._process.stdout is not None
        self.node_id = self._process.stdout.readline().strip()
        assert self.node_id, log.read_text()[-2000:]

    def drain(self, seconds: int) -> None:
        """What a cloud does when it takes a spot node back."""
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "drain-node",
            "--address",
            self._env["RAY_ADDRESS"],
            "--node-id",
            self.node_id,
        ]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env=self._env, check=True, timeout=LIMIT_S, capture_output=True)

    def kill(self) -> None:
        """Every process of the node at once. Each node was started in a session of its own."""
        if self._process.poll() is None:
            for pid in _session(self._process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._process.wait(timeout=30)


def _session(leader: int) -> list[int]:
    """The processes of a session, and those that left it but are descendants."""
    parents: dict[int, int] = {}
    members: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            if int(fields[3]) == leader:
                members.append(int(entry.name))
    grown = True
    while grown:
        more = [pid for pid, parent in parents.items() if parent in members and pid not in members]
        grown = bool(more)
        members += more
    return members
