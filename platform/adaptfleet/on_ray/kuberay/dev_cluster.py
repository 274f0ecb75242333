"""A bed as its user sees it: started from manifests, found again by its record, stopped with all that it runs."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.on_ray.cluster.launch import new_token, private_folder, with_parent
from adaptfleet.on_ray.cluster.processes import MARKER, ProcessId, end_cluster
from adaptfleet.on_ray.cluster.record import ClusterRecord, read_record
from adaptfleet.on_ray.kuberay.bed import API_FILE, new_marker
from adaptfleet.on_ray.kuberay.certificates import Certificates
from adaptfleet.on_ray.kuberay.client import KubeClient
from adaptfleet.on_ray.kuberay.objects import Object, has_condition
from adaptfleet.on_ray.kuberay.pod_commands import ClusterPorts
from adaptfleet.on_ray.local_cluster import LocalCluster

READY_S = 300.0
_API_S = 60.0


class DevCluster:
    """`with DevCluster.start(code) as dev:` ends it with the block."""

    def __init__(self, folder: Path, marker: str, leader: ProcessId, owner: ProcessId | None, logs_to: Path | None = None) -> None:
        self.folder = folder
        self._logs_to = logs_to
        self.marker = marker
        self.leader = leader
        self._owner = owner
        self._process: subprocess.Popen[bytes] | None = None
        self.kube = KubeClient(folder)

    @classmethod
    def start(
        cls,
        code: Path,
        env: Mapping[str, str] | None = None,
        *,
        fleet: Mapping[str, float] | None = None,
        detached: bool = False,
        logs_to: Path | None = None,
    ) -> "DevCluster":
        """The API and the controllers, with nothing on them yet.

        code      what pods have in their working folder
        env       laid over the variables of all pods
        fleet     what all pods together may have, such as {"nvidia.com/gpu": 4}; more waits, or takes it from lower priorities
        detached  it outlives this process; else it ends with it, and must be started from the main thread
        logs_to   what pods and controllers said is kept there when it stops
        """
        folder, marker = private_folder(None), new_marker()
        new_token(folder)
        command = [sys.executable, "-m", "adaptfleet.on_ray.kuberay.bed", "--folder", str(folder), "--code", str(code.absolute())]
        command += ["--env", json.dumps(dict(env or {}))]
        if fleet is not None:
            command += ["--fleet", json.dumps(dict(fleet))]
        if not detached:
            command = with_parent(command)
        with (folder / "bed.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, MARKER: marker}, cwd="/",
            )  # fmt: skip
        leader, end = ProcessId.of(process.pid), time.monotonic() + _API_S
        while not (folder / API_FILE).exists():
            if process.poll() is not None or time.monotonic() > end or leader is None:
                end_cluster(leader, marker, grace_s=1.0)
                said = (folder / "bed.log").read_text(errors="replace")[-2000:]
                shutil.rmtree(folder, ignore_errors=True)
                raise AdaptfleetError(f"the Kubernetes API did not start. The end of what it said:\n{said}")
            time.sleep(0.1)
        assert leader is not None
        made = cls(folder, marker, leader, None if detached else ProcessId.of(os.getpid()), logs_to)
        made._process = process
        return made

    @classmethod
    def attach(cls, record_file: Path, logs_to: Path | None = None) -> "DevCluster | None":
        """The bed that another process wrote down, if it still runs. A plain local cluster is none."""
        record = read_record(record_file)
        if record is None or not record.leader.is_alive() or not (Path(record.folder) / API_FILE).exists():
            return None
        return cls(Path(record.folder), record.marker, record.leader, record.owner, logs_to)

    def apply(self, documents: Sequence[Object]) -> None:
        for document in documents:
            self.kube.apply(document)

    def ready(self, cluster: str, namespace: str = "default", timeout_s: float = READY_S) -> LocalCluster:
        """Waits for the head of a RayCluster; what it gives submits jobs to it."""

        def state() -> Object | None:
            found = self.kube.get("RayCluster", cluster, namespace)
            return found if has_condition(found, "HeadPodReady") else None

        try:
            found = self.kube.wait(state, f"the head of RayCluster {cluster!r}", timeout_s)
        except AdaptfleetError as error:
            raise AdaptfleetError(f"{error}. {self._why_not(cluster)}") from None
        return LocalCluster(self.record(ClusterPorts.of(found), cpus(found)))

    def record(self, ports: ClusterPorts, num_cpus: int) -> ClusterRecord:
        """As `LocalCluster` writes one, so that whatever finds that finds this."""
        url = f"http://127.0.0.1:{ports.dashboard}"
        return ClusterRecord(self.marker, str(self.folder), f"127.0.0.1:{ports.gcs}", url, num_cpus, self.leader, self._owner)

    @property
    def kubeconfig(self) -> Path:
        """For kubectl; written when it is first asked for."""
        file, files = self.folder / "kubeconfig", Certificates(self.folder)
        if not file.exists():
            certificate, key = files.client
            url = json.loads((self.folder / API_FILE).read_text(encoding="utf-8"))["url"]
            entry = {
                "clusters": [{"name": "dev", "cluster": {"server": url, "certificate-authority": str(files.authority)}}],
                "users": [{"name": "dev", "user": {"client-certificate": str(certificate), "client-key": str(key)}}],
                "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "dev"}}],
            }
            file.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "dev", **entry}), encoding="utf-8")
        return file

    def stop(self) -> None:
        left = end_cluster(self.leader, self.marker)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
        if left:
            raise AdaptfleetError(f"processes {', '.join(str(p.pid) for p in left)} of the cluster could not be ended.")
        if self._logs_to is not None:
            shutil.rmtree(self._logs_to, ignore_errors=True)
            shutil.copytree(self.folder / "pods", self._logs_to)
            shutil.copyfile(self.folder / "bed.log", self._logs_to / "bed.log")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _why_not(self, cluster: str) -> str:
        said = []
        for pod in self.kube.pods(cluster):
            state = ((pod.get("status") or {}).get("containerStatuses") or [{}])[0].get("state", {})
            if "waiting" in state:
                said.append(f"pod {pod['metadata']['name']}: {state['waiting']['reason']}: {state['waiting']['message']}")
        logs = sorted((self.folder / "pods").glob(f"{cluster}-head-*.log"))
        tail = logs[-1].read_text(errors="replace")[-1500:] if logs else ""
        return "\n".join([*said, tail])

    def __enter__(self) -> "DevCluster":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def cpus(cluster: Object) -> int:
    """The most that its groups may come to have, for the record."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"].values()
    return int(sum(node["resources"]["CPU"] * max(1, node["max_workers"]) for node in nodes if node["max_workers"]))
