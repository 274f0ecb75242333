"""Turns pods into processes, watches them, and ends them as a kubelet does: SIGTERM, the grace period, SIGKILL."""

import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from adaptfleet.on_ray.cluster.launch import with_parent
from adaptfleet.on_ray.cluster.processes import ProcessId, end_cluster, members
from adaptfleet.on_ray.kuberay.objects import POD, Object, Objects, now
from adaptfleet.on_ray.kuberay.place import Place

POD_MARKER = "ADAPTFLEET_POD"
"""Environment variable that each process of a pod inherits."""


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    leader: ProcessId | None
    sidecar: "subprocess.Popen[bytes] | None" = None
    told_to_end: bool = False
    kill_at: float = field(default=float("inf"))


class Pods:
    """All calls come from one thread that lives as long as the bed: what it starts is told of its end by the kernel."""

    def __init__(self, objects: Objects, place: Place) -> None:
        self._objects = objects
        self._place = place
        self._running: dict[str, _Running] = {}
        place.logs.mkdir(exist_ok=True)

    def is_started(self, pod: Object) -> bool:
        return pod["metadata"]["uid"] in self._running

    def start(self, pod: Object, argv: list[str], env: Mapping[str, str]) -> None:
        meta = pod["metadata"]
        own = {**self._place.process_env(), **env, **self._place.env, POD_MARKER: meta["uid"]}
        with self._log(pod, "ray") as log:
            process = self._spawn(argv, own, log)
        self._running[meta["uid"]] = _Running(process, ProcessId.of(process.pid))
        self._set(pod, phase="Running", state={"running": {"startedAt": now()}}, ready=False)

    def keep_sidecar(self, pod: Object, argv: list[str], env: Mapping[str, str]) -> None:
        """Starts it, and again where it has ended: a container with restart policy Always. It shares the pod's end."""
        running = self._running.get(pod["metadata"]["uid"])
        if running is None or running.told_to_end or (running.sidecar is not None and running.sidecar.poll() is None):
            return
        own = {**self._place.process_env(), **env, **self._place.env, POD_MARKER: pod["metadata"]["uid"]}
        with self._log(pod, "autoscaler") as log:
            running.sidecar = self._spawn(argv, own, log)

    def set_ready(self, pod: Object, ready: bool) -> None:
        self._set(pod, phase="Running", state={"running": {"startedAt": now()}}, ready=ready)

    def set_waiting(self, pod: Object, reason: str, message: str) -> None:
        self._set(pod, phase="Pending", state={"waiting": {"reason": reason, "message": message}}, ready=False)

    def sync(self) -> None:
        """Notices ends, and carries on what has been told to end."""
        for pod in self._objects.listed(POD.plural):
            meta = pod["metadata"]
            running = self._running.get(meta["uid"])
            if running is not None and running.process.poll() is not None and "deletionTimestamp" not in meta:
                self._end_all(running, meta["uid"])
                del self._running[meta["uid"]]
                code = running.process.returncode
                state = {"terminated": {"exitCode": code, "finishedAt": now(), "reason": "Completed" if code == 0 else "Error"}}
                self._set(pod, phase="Succeeded" if code == 0 else "Failed", state=state, ready=False)
            elif "deletionTimestamp" in meta:
                self._carry_on_ending(pod, running)

    def end_all(self) -> None:
        for uid, running in self._running.items():
            self._end_all(running, uid)
        self._running.clear()

    def _carry_on_ending(self, pod: Object, running: _Running | None) -> None:
        meta = pod["metadata"]
        grace_s = float(meta["deletionGracePeriodSeconds"])
        if running is not None and grace_s > 0:
            if not running.told_to_end:
                running.told_to_end, running.kill_at = True, time.monotonic() + grace_s
                if running.leader is not None:
                    running.leader.send(signal.SIGTERM)
                if running.sidecar is not None:
                    running.sidecar.terminate()
            running.kill_at = min(running.kill_at, time.monotonic() + grace_s)
            if running.process.poll() is None and time.monotonic() < running.kill_at:
                return
        if running is not None:
            self._end_all(running, meta["uid"])
            del self._running[meta["uid"]]
        self._objects.forget(POD.plural, meta["namespace"], meta["name"])

    def _end_all(self, running: _Running, uid: str) -> None:
        """SIGKILL to each process of the pod at once: what a lost node looks like to the others."""
        for process in members(running.leader, uid, POD_MARKER):
            process.send(signal.SIGKILL)
        end_cluster(None, uid, variable=POD_MARKER)
        running.process.wait(timeout=30)
        if running.sidecar is not None:
            running.sidecar.wait(timeout=30)

    def _spawn(self, argv: list[str], env: Mapping[str, str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            with_parent(argv),
            env=dict(env),
            cwd=self._place.code,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _log(self, pod: Object, container: str) -> IO[bytes]:
        return self.log_file(pod["metadata"]["name"], container).open("ab")

    def log_file(self, pod: str, container: str) -> Path:
        return self._place.logs / f"{pod}-{container}.log"

    def _set(self, pod: Object, phase: str, state: Object, ready: bool) -> None:
        meta, containers = pod["metadata"], pod["spec"]["containers"]
        old = (pod.get("status") or {}).get("containerStatuses") or [{}]
        if phase == "Running" and "running" in old[0].get("state", {}):
            state = old[0]["state"]
        status = {
            "phase": phase,
            "podIP": "127.0.0.1",
            "hostIP": "127.0.0.1",
            "containerStatuses": [{"name": containers[0]["name"], "ready": ready, "restartCount": 0, "state": state}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        }
        if status != pod.get("status"):
            self._objects.set_status(POD.plural, meta["namespace"], meta["name"], status)
