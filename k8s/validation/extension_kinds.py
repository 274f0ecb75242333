"""The fields that the manifests use of kinds whose CRDs are not at hand: Kueue, Volcano, the Prometheus operator. What stands in a
manifest and not here is refused, so a field is added once it is wanted, after a look at the CRD. A CRD beside KubeRay's takes its
kind's place."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from k8s.validation.manifests import Document, Finding, name_of


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$")] | Annotated[int, Field(ge=0)]
Text = Annotated[str, StringConstraints(min_length=1)]
Labels = dict[str, str]
Duration = Annotated[str, StringConstraints(pattern=r"^(\d+(ms|s|m|h|d|w|y))+$")]


class _Toleration(_Shape):
    key: Text
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class _Taint(_Shape):
    key: Text
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class ResourceFlavor(_Shape):
    nodeLabels: Labels = {}
    nodeTaints: list[_Taint] = []
    tolerations: list[_Toleration] = []


class _FlavorQuota(_Shape):
    name: Text
    nominalQuota: Quantity
    borrowingLimit: Quantity | None = None
    lendingLimit: Quantity | None = None


class _Flavor(_Shape):
    name: Text
    resources: list[_FlavorQuota]


class _ResourceGroup(_Shape):
    coveredResources: Annotated[list[str], Field(min_length=1, max_length=16)]
    flavors: Annotated[list[_Flavor], Field(min_length=1)]


class _Borrowing(_Shape):
    policy: Literal["Never", "LowerPriority"]
    maxPriorityThreshold: int | None = None


class _Preemption(_Shape):
    withinClusterQueue: Literal["Never", "LowerPriority", "LowerOrNewerEqualPriority"] = "Never"
    reclaimWithinCohort: Literal["Never", "LowerPriority", "Any"] = "Never"
    borrowWithinCohort: _Borrowing | None = None


class _Fungibility(_Shape):
    whenCanBorrow: Literal["MayStopSearch", "TryNextFlavor"] | None = None
    whenCanPreempt: Literal["MayStopSearch", "TryNextFlavor"] | None = None


class _FairSharing(_Shape):
    weight: Quantity


class _Selector(_Shape):
    matchLabels: Labels | None = None
    matchExpressions: list[dict[str, Any]] | None = None


class ClusterQueue(_Shape):
    cohortName: Text | None = None
    namespaceSelector: _Selector
    queueingStrategy: Literal["StrictFIFO", "BestEffortFIFO"] = "BestEffortFIFO"
    flavorFungibility: _Fungibility | None = None
    preemption: _Preemption | None = None
    fairSharing: _FairSharing | None = None
    resourceGroups: Annotated[list[_ResourceGroup], Field(min_length=1, max_length=16)]


class LocalQueue(_Shape):
    clusterQueue: Text


class VolcanoQueue(_Shape):
    class _Guarantee(_Shape):
        resource: dict[str, Quantity]

    weight: Annotated[int, Field(ge=1, le=65535)] = 1
    reclaimable: bool = True
    capability: dict[str, Quantity] = {}
    guarantee: _Guarantee | None = None


class _Secret(_Shape):
    name: Text
    key: Text


class _Authorization(_Shape):
    type: Literal["Bearer"] = "Bearer"
    credentials: _Secret


class _Relabeling(_Shape):
    sourceLabels: list[str] | None = None
    targetLabel: str | None = None
    regex: str | None = None
    replacement: str | None = None
    action: Literal["replace", "keep", "drop", "labelmap", "labeldrop", "labelkeep"] = "replace"


class _Endpoint(_Shape):
    port: Text
    path: str | None = None
    interval: Duration | None = None
    scrapeTimeout: Duration | None = None
    authorization: _Authorization | None = None
    relabelings: list[_Relabeling] | None = None
    metricRelabelings: list[_Relabeling] | None = None


class PodMonitor(_Shape):
    jobLabel: str | None = None
    podTargetLabels: list[str] = []
    selector: _Selector
    podMetricsEndpoints: Annotated[list[_Endpoint], Field(min_length=1)]


class _Rule(_Shape):
    record: str | None = None
    alert: str | None = None
    expr: Text
    for_: Annotated[Duration | None, Field(alias="for")] = None
    keep_firing_for: Duration | None = None
    labels: Labels = {}
    annotations: Labels = {}


class _RuleGroup(_Shape):
    name: Text
    interval: Duration | None = None
    rules: Annotated[list[_Rule], Field(min_length=1)]


class PrometheusRule(_Shape):
    groups: Annotated[list[_RuleGroup], Field(min_length=1)]


class _PriorityValue(_Shape):
    value: int
    description: str = ""


_KUEUE, _VOLCANO, _PROMETHEUS = "kueue.x-k8s.io/v1beta2", "scheduling.volcano.sh/v1beta1", "monitoring.coreos.com/v1"
_SHAPES: dict[tuple[str, str], tuple[type[_Shape], str]] = {
    (_KUEUE, "ResourceFlavor"): (ResourceFlavor, "Cluster"),
    (_KUEUE, "ClusterQueue"): (ClusterQueue, "Cluster"),
    (_KUEUE, "LocalQueue"): (LocalQueue, "Namespaced"),
    (_KUEUE, "WorkloadPriorityClass"): (_PriorityValue, "Cluster"),
    (_VOLCANO, "Queue"): (VolcanoQueue, "Cluster"),
    (_PROMETHEUS, "PodMonitor"): (PodMonitor, "Namespaced"),
    (_PROMETHEUS, "PrometheusRule"): (PrometheusRule, "Namespaced"),
}


def knows(document: Document) -> bool:
    return _key(document) in _SHAPES


def is_namespaced(document: Document) -> bool:
    return _SHAPES[_key(document)][1] == "Namespaced"


def findings(document: Document) -> Iterator[Finding]:
    shape, _ = _SHAPES[_key(document)]
    rest = {key: value for key, value in document.items() if key not in ("apiVersion", "kind", "metadata")}
    given = rest if shape is _PriorityValue else rest.pop("spec", None)
    for key in rest if shape is not _PriorityValue else ():
        yield Finding(f"{name_of(document)} {key}", "is no field of this kind")
    try:
        shape.model_validate(given)
    except ValidationError as error:
        for problem in error.errors():
            yield Finding(f"{name_of(document)} spec.{'.'.join(str(part) for part in problem['loc'])}", problem["msg"])
        return
    if shape is ClusterQueue:
        for number, group in enumerate(document["spec"]["resourceGroups"]):
            for flavor in group["flavors"]:
                if [part["name"] for part in flavor["resources"]] != group["coveredResources"]:
                    where = f"{name_of(document)} spec.resourceGroups[{number}].flavors {flavor['name']}"
                    yield Finding(where, "names other resources, or in another order, than coveredResources")


def _key(document: Document) -> tuple[str, str]:
    return str(document.get("apiVersion")), str(document.get("kind"))
