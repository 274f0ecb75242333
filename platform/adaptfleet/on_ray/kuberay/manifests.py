"""Manifests from files and kustomizations, with the defaults of KubeRay's CRDs, and refusals of what cannot run here."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from adaptfleet.contracts.errors import ContractError
from adaptfleet.on_ray.kuberay.objects import Object

SUPPORTED_STRATEGIES = (None, "NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def read_manifests(source: Path) -> list[Object]:
    """The documents of a file, of a folder's *.yaml, or of a kustomization built with kubectl or kustomize."""
    if not source.exists():
        raise ContractError(f"{source} does not exist. Give a manifest or a folder with a kustomization, such as k8s/overlays/dev-cpu.")
    if source.is_dir() and any((source / name).is_file() for name in ("kustomization.yaml", "kustomization.yml")):
        return _documents(_kustomized(source), str(source))
    files = sorted(source.glob("*.yaml")) if source.is_dir() else [source]
    return [document for file in files for document in _documents(file.read_text(encoding="utf-8"), str(file))]


def _kustomized(folder: Path) -> str:
    command = next((words for words in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(words[0])), None)
    if command is None:
        raise ContractError(
            f"{folder} is a kustomization, which takes kubectl or kustomize to build. Install one, or give a built manifest."
        )
    built = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if built.returncode:
        raise ContractError(f"{folder} does not build:\n{built.stderr.strip()}")
    return built.stdout


def _documents(text: str, origin: str) -> list[Object]:
    try:
        found = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise ContractError(f"{origin} is no YAML: {error}") from None
    for document in found:
        if not isinstance(document, dict) or not all(key in document for key in ("apiVersion", "kind", "metadata")):
            raise ContractError(f"{origin} holds a document without apiVersion, kind and metadata: not a Kubernetes object.")
    return found


def plural_of(kind: str) -> str:
    """As the API's paths say it."""
    lower = kind.lower()
    if lower.endswith(("s", "ch", "x")):
        return lower + "es"
    return lower[:-1] + "ies" if lower.endswith("y") and not lower.endswith("ay") else lower + "s"


def checked(documents: list[Object]) -> list[Object]:
    """ContractError names what is wrong with all of them, before any is applied."""
    faults = []
    for document in documents:
        try:
            admitted(plural_of(document["kind"]), copy.deepcopy(document))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            faults.append(f"{document['kind']} {document['metadata'].get('name', '')!r}: {error}")
    if faults:
        raise ContractError("\n".join(faults))
    return documents


def admitted(plural: str, thing: Object) -> Object:
    """With the CRD's defaults. ValueError names all that the operator would refuse and that this bed cannot do.

    A subset of the operator's rules, those that would otherwise do something else in silence: `make check-k8s` knows them all.
    """
    faults: list[str] = []
    if plural == "rayclusters":
        _cluster(thing.get("spec") or {}, "spec", faults)
    elif plural == "rayjobs":
        _job(thing.get("spec") or {}, faults)
    elif plural == "rayservices":
        _service(thing.get("spec") or {}, faults)
    if faults:
        raise ValueError("; ".join(faults))
    return thing


def _cluster(spec: Object, at: str, faults: list[str]) -> None:
    if "headGroupSpec" not in spec:
        faults.append(f"{at}.headGroupSpec is missing")
    else:
        spec["headGroupSpec"].setdefault("rayStartParams", {})
        _template(spec["headGroupSpec"], f"{at}.headGroupSpec", faults)
    if spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version") != "v2":
        faults.append(f"{at}.autoscalerOptions.version is {spec.get('autoscalerOptions', {}).get('version')!r}; this bed runs v2 alone")
    names = [group.get("groupName") for group in spec.get("workerGroupSpecs") or ()]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"{at}.workerGroupSpecs has {names.count(name)} groups named {name!r}")
    for number, group in enumerate(spec.get("workerGroupSpecs") or ()):
        place = f"{at}.workerGroupSpecs[{number}]"
        for key, default in (("numOfHosts", 1), ("replicas", 0), ("minReplicas", 0), ("maxReplicas", 2**31 - 1)):
            group.setdefault(key, default)
        group.setdefault("rayStartParams", {})
        group.setdefault("scaleStrategy", {})
        if group["minReplicas"] > group["maxReplicas"]:
            faults.append(f"{place}: minReplicas {group['minReplicas']} is above maxReplicas {group['maxReplicas']}")
        if "groupName" not in group:
            faults.append(f"{place}.groupName is missing")
        _template(group, place, faults)
    backend = spec.get("gcsFaultToleranceOptions", {}).get("backend", "redis")
    if "gcsFaultToleranceOptions" in spec and backend not in ("redis", "rocksdb"):
        faults.append(f"{at}.gcsFaultToleranceOptions.backend is {backend!r}, not redis or rocksdb")
    if spec.get("gcsFaultToleranceOptions") and backend == "redis" and "redisAddress" not in spec["gcsFaultToleranceOptions"]:
        faults.append(f"{at}.gcsFaultToleranceOptions.redisAddress is missing")


def _template(group: Object, at: str, faults: list[str]) -> None:
    try:
        if not group["template"]["spec"]["containers"]:
            raise KeyError
    except (KeyError, TypeError):
        faults.append(f"{at}.template.spec.containers is missing")


def _job(spec: Object, faults: list[str]) -> None:
    spec.setdefault("submissionMode", "K8sJobMode")
    if spec["submissionMode"] not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        faults.append(f"spec.submissionMode is {spec['submissionMode']!r}, not K8sJobMode, HTTPMode, SidecarMode or InteractiveMode")
    if spec["submissionMode"] != "InteractiveMode" and not spec.get("entrypoint"):
        faults.append("spec.entrypoint is missing")
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        faults.append("one of spec.rayClusterSpec and spec.clusterSelector is needed")
    if spec.get("clusterSelector"):
        faults.extend(_selector_faults(spec))
    if spec.get("rayClusterSpec"):
        _cluster(spec["rayClusterSpec"], "spec.rayClusterSpec", faults)
    if spec.get("backoffLimit", 0) < 0:
        faults.append(f"spec.backoffLimit is {spec['backoffLimit']}, below 0")
    rules = (spec.get("deletionStrategy") or {}).get("deletionRules")
    if rules and spec.get("shutdownAfterJobFinishes"):
        faults.append("spec.shutdownAfterJobFinishes excludes spec.deletionStrategy.deletionRules")
    if spec.get("deletionStrategy") and not rules:
        faults.append("spec.deletionStrategy: only deletionRules run here; onSuccess and onFailure are the operator's deprecated form")
    for number, rule in enumerate(rules or ()):
        if rule.get("policy") not in ("DeleteWorkers", "DeleteCluster", "DeleteSelf", "DeleteNone"):
            faults.append(f"spec.deletionStrategy.deletionRules[{number}].policy is {rule.get('policy')!r}")
        if len({"jobStatus", "jobDeploymentStatus"} & set(rule.get("condition", {}))) != 1:
            faults.append(f"spec.deletionStrategy.deletionRules[{number}].condition needs one of jobStatus and jobDeploymentStatus")


def _selector_faults(spec: Object) -> Iterator[str]:
    """What the operator does only with a cluster that is the job's own."""
    if not spec["clusterSelector"].get("ray.io/cluster"):
        yield "spec.clusterSelector names no cluster: it needs ray.io/cluster"
    if spec.get("backoffLimit", 0) > 0:
        yield f"spec.backoffLimit is {spec['backoffLimit']}: a job on a selected cluster is not tried again"
    if spec.get("suspend"):
        yield "spec.suspend: a job on a selected cluster cannot be suspended"
    if spec["submissionMode"] == "SidecarMode":
        yield "spec.submissionMode is 'SidecarMode', which needs a cluster of its own"
    for rule in (spec.get("deletionStrategy") or {}).get("deletionRules") or ():
        if rule.get("policy") in ("DeleteCluster", "DeleteWorkers"):
            yield f"spec.deletionStrategy: {rule['policy']} would take a cluster that is not the job's"


def _service(spec: Object, faults: list[str]) -> None:
    for key in ("serveConfigV2", "rayClusterConfig"):
        if not spec.get(key):
            faults.append(f"spec.{key} is missing")
    if spec.get("rayClusterConfig"):
        _cluster(spec["rayClusterConfig"], "spec.rayClusterConfig", faults)
    kind = (spec.get("upgradeStrategy") or {}).get("type")
    if kind not in SUPPORTED_STRATEGIES:
        faults.append(f"spec.upgradeStrategy.type is {kind!r}, not NewCluster, NewClusterWithIncrementalUpgrade or None")
    if kind == "NewClusterWithIncrementalUpgrade":
        options: dict[str, Any] = (spec.get("upgradeStrategy") or {}).get("clusterUpgradeOptions") or {}
        faults.extend(_incremental_faults(options))
        if not (spec.get("rayClusterConfig") or {}).get("enableInTreeAutoscaling"):
            faults.append("an incremental upgrade needs rayClusterConfig.enableInTreeAutoscaling")


def _incremental_faults(options: dict[str, Any]) -> Iterator[str]:
    options.setdefault("maxSurgePercent", 100)
    missing = [key for key in ("stepSizePercent", "intervalSeconds", "gatewayClassName") if key not in options]
    if missing:
        yield f"spec.upgradeStrategy.clusterUpgradeOptions lacks {', '.join(missing)}"
    elif options["stepSizePercent"] > options["maxSurgePercent"]:
        yield f"stepSizePercent {options['stepSizePercent']} is above maxSurgePercent {options['maxSurgePercent']}"
