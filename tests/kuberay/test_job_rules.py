"""What becomes of a RayJob: deadlines, tries and deletion rules against the operator's source (v1.7.0)."""

from typing import Any

import pytest

from adaptfleet.on_ray.kuberay.job_rules import counted, due_deletion, passed_deadline


def _age(time: str) -> float:
    return float(time)


@pytest.mark.parametrize(
    ("state", "age", "expected"),
    [
        ("Running", "99", None),
        ("Running", "100", "DeadlineExceeded"),
        ("Initializing", "30", "PreRunningDeadlineExceeded"),
        ("Running", "30", None),
        ("Waiting", "30", "PreRunningDeadlineExceeded"),
        ("Waiting", "29", None),
        ("Initializing", "100", "DeadlineExceeded"),
    ],
)
def test_deadlines(state: str, age: str, expected: str | None) -> None:
    spec = {"activeDeadlineSeconds": 100, "preRunningDeadlineSeconds": 30}
    found = passed_deadline(spec, {"jobDeploymentStatus": state, "startTime": age}, _age)
    assert (found[0] if found else None) == expected
    assert passed_deadline({}, {"jobDeploymentStatus": state, "startTime": "1e9"}, _age) is None


def test_backoff_limit_two_is_three_tries() -> None:
    status: dict[str, Any] = {}
    states = []
    for _ in range(3):
        status = counted({"backoffLimit": 2}, status | {"jobDeploymentStatus": "Failed", "reason": "AppFailed"})
        states.append(status["jobDeploymentStatus"])
    assert states == ["Retrying", "Retrying", "Failed"] and status["failed"] == 3


def test_a_deadline_ends_a_job_for_good() -> None:
    for reason, state in (("DeadlineExceeded", "Failed"), ("PreRunningDeadlineExceeded", "Retrying"), ("AppFailed", "Retrying")):
        assert counted({"backoffLimit": 5}, {"jobDeploymentStatus": "Failed", "reason": reason})["jobDeploymentStatus"] == state
    assert counted({}, {"jobDeploymentStatus": "Failed", "reason": "AppFailed"})["jobDeploymentStatus"] == "Failed"
    assert counted({}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"})["succeeded"] == 1
    assert counted({}, {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"})["succeeded"] == 0


def _rule(policy: str, ttl: int, **condition: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {**condition, "ttlSeconds": ttl}}


def test_of_the_rules_that_are_due_the_one_that_takes_most() -> None:
    rules = [
        _rule("DeleteWorkers", 0, jobStatus="FAILED"),
        _rule("DeleteCluster", 600, jobStatus="FAILED"),
        _rule("DeleteSelf", 60, jobStatus="SUCCEEDED"),
    ]
    spec = {"deletionStrategy": {"deletionRules": rules}}

    def due(age: str, job: str, *done: str) -> str | None:
        return due_deletion(spec, {"endTime": age, "jobStatus": job, "jobDeploymentStatus": "Failed"}, _age, lambda policy: policy in done)

    assert due("1", "FAILED") == "DeleteWorkers"
    assert due("1", "FAILED", "DeleteWorkers") is None
    assert due("601", "FAILED") == "DeleteCluster"
    assert due("601", "FAILED", "DeleteWorkers", "DeleteCluster") is None
    assert due("59", "SUCCEEDED") is None and due("60", "SUCCEEDED") == "DeleteSelf"


def test_a_deadline_leaves_the_job_running_and_so_matches_by_deployment_status() -> None:
    spec = {"deletionStrategy": {"deletionRules": [_rule("DeleteCluster", 0, jobDeploymentStatus="Failed")]}}
    status = {"endTime": "0", "jobStatus": "RUNNING", "jobDeploymentStatus": "Failed"}
    assert due_deletion(spec, status, _age, lambda policy: False) == "DeleteCluster"


def test_shutdown_after_the_job_waits_for_its_ttl() -> None:
    spec = {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 10}
    status = {"endTime": "9", "jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}
    assert due_deletion(spec, status, _age, lambda policy: False) is None
    assert due_deletion(spec, status | {"endTime": "10"}, _age, lambda policy: False) == "DeleteCluster"
    assert due_deletion({}, status | {"endTime": "1e9"}, _age, lambda policy: False) is None
