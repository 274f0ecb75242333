"""The API's objects: patches, deletion with what is owned, and that no writer overwrites another unseen."""

from typing import Any

import pytest

from adaptfleet.on_ray.kuberay.objects import ConflictError, NotFoundError, Objects, merge, owned_by, patched


def _thing(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": name}, "spec": spec}


def test_the_autoscalers_patch() -> None:
    groups = [{"groupName": "a", "replicas": 0, "scaleStrategy": {}}, {"groupName": "b", "replicas": 1}]
    operations = [
        {"op": "replace", "path": "/spec/workerGroupSpecs/1/replicas", "value": 0},
        {"op": "replace", "path": "/spec/workerGroupSpecs/1/scaleStrategy", "value": {"workersToDelete": ["b-1"]}},
    ]
    found = patched(_thing("x", workerGroupSpecs=groups), operations)["spec"]["workerGroupSpecs"]
    assert found[1] == {"groupName": "b", "replicas": 0, "scaleStrategy": {"workersToDelete": ["b-1"]}} and found[0] == groups[0]


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/spec/a", "value": 2},
        {"op": "replace", "path": "/spec/groups/7/replicas", "value": 1},
        {"op": "remove", "path": "/spec/nothing"},
        {"op": "move", "path": "/spec/a", "value": 1},
    ],
)
def test_a_patch_that_does_not_apply_changes_nothing(operation: dict[str, Any]) -> None:
    objects = Objects()
    objects.create("rayclusters", _thing("x", a=1, groups=[]))
    with pytest.raises(ConflictError):
        objects.change("rayclusters", "default", "x", lambda old: patched(old, [{"op": "add", "path": "/spec/b", "value": 1}, operation]))
    assert objects.get("rayclusters", "default", "x")["spec"] == {"a": 1, "groups": []}


def test_merge_removes_by_null_and_goes_deep() -> None:
    assert merge({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": None, "c": [3]}, "d": {"e": 1}}) == {"a": {"c": [3]}, "d": {"e": 1}}


def test_only_a_changed_spec_is_a_new_generation() -> None:
    objects = Objects()
    made = objects.create("rayclusters", _thing("x", a=1))
    objects.set_status("rayclusters", "default", "x", {"state": "ready"})
    assert objects.get("rayclusters", "default", "x")["metadata"]["generation"] == 1
    changed = objects.change("rayclusters", "default", "x", lambda old: merge(old, {"spec": {"a": 2}, "metadata": {"uid": "forged"}}))
    assert changed["metadata"]["generation"] == 2 and changed["metadata"]["uid"] == made["metadata"]["uid"]
    assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])


def test_what_is_owned_goes_with_its_owner_and_pods_wait_for_their_processes() -> None:
    objects = Objects()
    cluster = objects.create("rayclusters", _thing("x") | {"metadata": {"name": "x", "finalizers": ["held"]}})
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": owned_by(cluster) | {"name": "p"}, "spec": {"terminationGracePeriodSeconds": 7}}
    objects.create("pods", pod)
    objects.delete("rayclusters", "default", "x")
    assert "deletionTimestamp" in objects.get("rayclusters", "default", "x")["metadata"]
    objects.change("rayclusters", "default", "x", lambda old: merge(old, {"metadata": {"finalizers": []}}))
    with pytest.raises(NotFoundError):
        objects.get("rayclusters", "default", "x")
    going = objects.get("pods", "default", "p")["metadata"]
    assert going["deletionGracePeriodSeconds"] == 7
    assert objects.delete("pods", "default", "p", 0)["metadata"]["deletionGracePeriodSeconds"] == 0
    assert objects.delete("pods", "default", "p", 60)["metadata"]["deletionGracePeriodSeconds"] == 0, "a second deletion only shortens"


def test_names_are_taken_once_and_copies_are_handed_out() -> None:
    objects = Objects()
    objects.create("rayclusters", _thing("x", a=[1]))
    with pytest.raises(ConflictError):
        objects.create("rayclusters", _thing("x"))
    objects.get("rayclusters", "default", "x")["spec"]["a"].append(2)
    assert objects.get("rayclusters", "default", "x")["spec"]["a"] == [1]
    assert objects.listed("rayclusters", labels={"no": "such"}) == []
