"""RayJobs: a cluster is made, the job submitted to it and watched, and both cleared away by the rules of the manifest."""

import contextlib
import json
import secrets
from typing import Any

import yaml

from adaptfleet.on_ray.kuberay.clusters import spec_hash
from adaptfleet.on_ray.kuberay.dashboard import Dashboard, DashboardError
from adaptfleet.on_ray.kuberay.job_rules import TERMINAL_JOB, counted, due_deletion, passed_deadline
from adaptfleet.on_ray.kuberay.objects import RAY_CLUSTER, RAY_JOB, Object, Objects, has_condition, name_of, now, owned_by, seconds_since
from adaptfleet.on_ray.kuberay.place import Place
from adaptfleet.on_ray.kuberay.pod_commands import ClusterPorts

_FINALIZER = "ray.io/rayjob-finalizer"
_STATUS_CHECK_TIMEOUT_S = 300.0


class RayJobs:
    """The submission modes differ in who submits: here it is always the controller, over HTTP, as the operator does in HTTPMode. A job of
    InteractiveMode waits for `spec.jobId`."""

    def __init__(self, objects: Objects, place: Place) -> None:
        self._objects = objects
        self._place = place

    def sync(self) -> None:
        for job in self._objects.listed(RAY_JOB.plural):
            if "deletionTimestamp" in job["metadata"]:
                self._let_go(job)
                continue
            old = job.get("status") or {}
            status = self._next(job, dict(old))
            if status is not None and status != old:
                if status["jobDeploymentStatus"] != old.get("jobDeploymentStatus"):
                    status = counted(job["spec"], status)
                    if status["jobDeploymentStatus"] in ("Complete", "Failed"):
                        status["endTime"] = now()
                self._objects.set_status(RAY_JOB.plural, job["metadata"]["namespace"], name_of(job), status)

    def _next(self, job: Object, status: Object) -> Object | None:
        """The status after this look; None where the object itself is gone."""
        spec = job["spec"]
        state = status.get("jobDeploymentStatus", "")
        if state in ("Initializing", "Running", "Waiting"):
            if spec.get("suspend") and state != "Waiting":
                return status | {"jobDeploymentStatus": "Suspending"}
            late = passed_deadline(spec, status, seconds_since)
            if late is not None:
                return status | {"jobDeploymentStatus": "Failed", "reason": late[0], "message": late[1]}
        match state:
            case "":
                return self._initialised(job, status)
            case "Initializing":
                return self._initialising(job, status)
            case "Waiting":
                return status | {"jobId": spec["jobId"], "jobDeploymentStatus": "Running"} if spec.get("jobId") else status
            case "Running":
                return self._running(job, status)
            case "Suspending" | "Retrying":
                return self._cleared(job, status)
            case "Suspended":
                return status if spec.get("suspend") else status | {"jobStatus": "", "jobDeploymentStatus": ""}
            case "Complete" | "Failed":
                return self._finished(job, status)
        return status

    def _initialised(self, job: Object, status: Object) -> Object:
        spec, name = job["spec"], name_of(job)
        self._objects.change(RAY_JOB.plural, job["metadata"]["namespace"], name, _with_finalizer)
        selected = (spec.get("clusterSelector") or {}).get("ray.io/cluster")
        return status | {
            "jobId": "" if spec["submissionMode"] == "InteractiveMode" else spec.get("jobId") or f"{name}-{secrets.token_hex(3)[:5]}",
            "rayClusterName": selected or f"{name}-{secrets.token_hex(3)[:5]}",
            "jobStatus": "",
            "jobDeploymentStatus": "Initializing",
            "startTime": now(),
        }

    def _initialising(self, job: Object, status: Object) -> Object:
        cluster = self._cluster(job, status)
        if cluster is None:
            if job["spec"].get("clusterSelector"):
                return status | {"message": f"RayCluster {status['rayClusterName']!r} of the clusterSelector is not found"}
            self._create_cluster(job, status["rayClusterName"])
            return status
        if not has_condition(cluster, "HeadPodReady"):
            return status
        status = status | {"dashboardURL": f"http://127.0.0.1:{ClusterPorts.of(cluster).dashboard}", "message": ""}
        return status | {"jobDeploymentStatus": "Waiting" if job["spec"]["submissionMode"] == "InteractiveMode" else "Running"}

    def _running(self, job: Object, status: Object) -> Object:
        spec, dashboard = job["spec"], self._dashboard(status)
        try:
            found = dashboard.job(status["jobId"])
            if found is None:
                dashboard.submit(status["jobId"], spec["entrypoint"], _runtime_env(spec), _entrypoint_resources(spec))
                return status
        except DashboardError as error:
            since = status.setdefault("jobStatusCheckFailureStartTime", now())
            if seconds_since(since) >= _STATUS_CHECK_TIMEOUT_S:
                return status | {"jobDeploymentStatus": "Failed", "reason": "JobStatusCheckTimeoutExceeded", "message": str(error)}
            return status | {"message": str(error)}
        status.pop("jobStatusCheckFailureStartTime", None)
        status |= {"jobStatus": found["status"], "message": found.get("message") or ""}
        if found["status"] in TERMINAL_JOB:
            status["jobDeploymentStatus"] = "Failed" if found["status"] == "FAILED" else "Complete"
            if found["status"] == "FAILED":
                status["reason"] = "AppFailed"
        return status

    def _cleared(self, job: Object, status: Object) -> Object:
        """Cluster and job forgotten, before another try or until it is resumed."""
        if self._cluster(job, status) is not None:
            if not job["spec"].get("clusterSelector"):
                self._objects.delete(RAY_CLUSTER.plural, job["metadata"]["namespace"], status["rayClusterName"])
            return status
        if self._objects.listed("pods", job["metadata"]["namespace"], {"ray.io/cluster": status["rayClusterName"]}):
            return status
        kept = {key: status[key] for key in ("failed", "succeeded") if key in status}
        return kept | {"jobStatus": "", "jobDeploymentStatus": "Suspended" if status["jobDeploymentStatus"] == "Suspending" else ""}

    def _finished(self, job: Object, status: Object) -> Object | None:
        spec, meta = job["spec"], job["metadata"]
        if spec.get("clusterSelector"):
            return status
        policy = due_deletion(spec, status, seconds_since, lambda policy: self._is_done(policy, job, status))
        if policy == "DeleteSelf":
            self._objects.delete(RAY_JOB.plural, meta["namespace"], meta["name"])
            return None
        if policy == "DeleteCluster":
            self._objects.delete(RAY_CLUSTER.plural, meta["namespace"], status["rayClusterName"])
        if policy == "DeleteWorkers":
            self._objects.change(RAY_CLUSTER.plural, meta["namespace"], status["rayClusterName"], _with_suspended_groups)
        return status

    def _is_done(self, policy: str, job: Object, status: Object) -> bool:
        cluster = self._cluster(job, status)
        if policy == "DeleteNone" or (policy in ("DeleteWorkers", "DeleteCluster") and cluster is None):
            return True
        if policy == "DeleteWorkers" and cluster is not None:
            return all(group.get("suspend") for group in cluster["spec"].get("workerGroupSpecs") or ())
        return False

    def _let_go(self, job: Object) -> None:
        """Stops what still runs, then lets the object go."""
        status = job.get("status") or {}
        if status.get("jobId") and status.get("jobStatus") not in TERMINAL_JOB and status.get("dashboardURL"):
            # The operator lets go whether it could be stopped or not.
            with contextlib.suppress(DashboardError):
                self._dashboard(status).stop(status["jobId"])
        meta = job["metadata"]
        self._objects.change(RAY_JOB.plural, meta["namespace"], meta["name"], _without_finalizer)

    def _create_cluster(self, job: Object, name: str) -> None:
        meta = job["metadata"]
        labels = meta.get("labels", {}) | {"ray.io/originated-from-crd": "RayJob", "ray.io/originated-from-cr-name": meta["name"]}
        annotations = {"ray.io/disable-provisioned-head-restart": "true"} if job["spec"]["submissionMode"] == "SidecarMode" else {}
        made = {"name": name, "labels": labels, "annotations": annotations | {"ray.io/spec-hash": spec_hash(job["spec"]["rayClusterSpec"])}}
        cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": owned_by(job) | made, "spec": job["spec"]["rayClusterSpec"]}
        self._objects.create(RAY_CLUSTER.plural, cluster)

    def _cluster(self, job: Object, status: Object) -> Object | None:
        return self._objects.find(RAY_CLUSTER.plural, job["metadata"]["namespace"], status.get("rayClusterName", ""))

    def _dashboard(self, status: Object) -> Dashboard:
        return Dashboard(status["dashboardURL"], self._place.folder / "token")


def _runtime_env(spec: Object) -> dict[str, Any]:
    return dict(yaml.safe_load(spec.get("runtimeEnvYAML") or "") or {})


def _entrypoint_resources(spec: Object) -> dict[str, Any]:
    found: dict[str, Any] = {"metadata": spec.get("metadata") or {}}
    for key, name in (("entrypointNumCpus", "entrypoint_num_cpus"), ("entrypointNumGpus", "entrypoint_num_gpus")):
        if spec.get(key):
            found[name] = spec[key]
    if spec.get("entrypointResources"):
        found["entrypoint_resources"] = json.loads(spec["entrypointResources"])
    return found


def _with_finalizer(job: Object) -> None:
    held = job["metadata"].setdefault("finalizers", [])
    if _FINALIZER not in held:
        held.append(_FINALIZER)


def _without_finalizer(job: Object) -> None:
    job["metadata"]["finalizers"] = [held for held in job["metadata"].get("finalizers", ()) if held != _FINALIZER]


def _with_suspended_groups(cluster: Object) -> None:
    for group in cluster["spec"].get("workerGroupSpecs") or ():
        group["suspend"] = True
