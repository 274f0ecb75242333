"""What becomes of a RayJob, as the operator's `rayjob_controller.go` (v1.7.0) decides: deadlines, retries, deletion. Pure."""

from collections.abc import Callable

from adaptfleet.on_ray.kuberay.objects import Object

TERMINAL_JOB = ("SUCCEEDED", "FAILED", "STOPPED")
_NOT_RETRIED = ("DeadlineExceeded", "JobStatusCheckTimeoutExceeded")
_IMPACT = {"DeleteNone": 1, "DeleteWorkers": 2, "DeleteCluster": 3, "DeleteSelf": 4}

Age = Callable[[str], float]
"""Seconds since a time in a status."""


def passed_deadline(spec: Object, status: Object, age: Age) -> tuple[str, str] | None:
    """Reason and message, where the job has taken too long: to end, or to begin running."""
    limits = [("activeDeadlineSeconds", "DeadlineExceeded")]
    if status["jobDeploymentStatus"] in ("Initializing", "Waiting"):
        limits.append(("preRunningDeadlineSeconds", "PreRunningDeadlineExceeded"))
    if status["jobDeploymentStatus"] == "Waiting":
        del limits[0]
    for key, reason in limits:
        if key in spec and age(status["startTime"]) >= spec[key]:
            return reason, f"The RayJob has passed the {key}: {spec[key]}, since {status['startTime']}"
    return None


def counted(spec: Object, status: Object) -> Object:
    """The status with its tally of ends, and `Retrying` where a failure leaves another try.

    `backoffLimit: 2` is three tries in all. Deadlines end a job for good.
    """
    ended = status["jobDeploymentStatus"]
    failed = status.get("failed", 0) + (ended == "Failed")
    succeeded = status.get("succeeded", 0) + (ended == "Complete" and status.get("jobStatus") == "SUCCEEDED")
    status = status | {"failed": failed, "succeeded": succeeded}
    if ended == "Failed" and "backoffLimit" in spec and failed < spec["backoffLimit"] + 1 and status.get("reason") not in _NOT_RETRIED:
        status["jobDeploymentStatus"] = "Retrying"
    return status


def due_deletion(spec: Object, status: Object, age: Age, is_done: Callable[[str], bool]) -> str | None:
    """The policy to carry out now, of those that are due the one that takes the most away; None: nothing is due.

    `is_done` says of a policy that it is already so.
    """
    ended_s = age(status["endTime"])
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if rules is not None:
        due = [
            rule["policy"] for rule in rules if _matches(rule["condition"], status) and ended_s >= rule["condition"].get("ttlSeconds", 0)
        ]
        due = [policy for policy in due if not is_done(policy)]
        return max(due, key=_IMPACT.__getitem__, default=None)
    if spec.get("shutdownAfterJobFinishes") and ended_s >= spec.get("ttlSecondsAfterFinished", 0) and not is_done("DeleteCluster"):
        return "DeleteCluster"
    return None


def _matches(condition: Object, status: Object) -> bool:
    if "jobStatus" in condition:
        return bool(condition["jobStatus"] == status.get("jobStatus"))
    return bool(condition["jobDeploymentStatus"] == status["jobDeploymentStatus"])
