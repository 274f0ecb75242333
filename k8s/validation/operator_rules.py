"""What KubeRay 1.7 itself refuses at reconciliation, after the API server took the object: its webhook is optional, so without these
rules a mistake shows as an event that nobody reads. Each message says the rule."""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

from k8s.validation.manifests import Document, Finding, name_of

_MAX_CLUSTER_NAME = 53
_MAX_NAME = {"RayCluster": _MAX_CLUSTER_NAME, "RayService": _MAX_CLUSTER_NAME - 6, "RayJob": _MAX_CLUSTER_NAME - 6, "RayCronJob": 36}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_UPGRADES = {"RayCluster": ("Recreate", "None"), "RayService": ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")}
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_ANY = 2**31 - 1
_CRON_FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def findings(document: Document) -> Iterator[Finding]:
    kind, name, spec = document["kind"], name_of(document), document.get("spec", {})
    own = str(document["metadata"].get("name") or document["metadata"].get("generateName", "") + "x")
    if len(own) > _MAX_NAME[kind] or not _DNS_1035.fullmatch(own):
        yield Finding(name, f"the name must be a DNS label that begins with a letter, of at most {_MAX_NAME[kind]} characters")
    if kind == "RayCluster":
        yield from _cluster(name, "spec", spec, document)
    elif kind == "RayService":
        yield from _service(name, spec)
        yield from _cluster(name, "spec.rayClusterConfig", spec.get("rayClusterConfig", {}), document)
    elif kind == "RayJob":
        yield from _job(name, "spec", spec, document)
    elif kind == "RayCronJob":
        yield from _cron(name, spec)
        yield from _job(name, "spec.jobTemplate", spec.get("jobTemplate", {}), document)


def _upgrade_type(name: str, kind: str, strategy: Document | None) -> Iterator[Finding]:
    given = (strategy or {}).get("type")
    if given is not None and given not in _UPGRADES[kind]:
        yield Finding(f"{name} spec.upgradeStrategy.type", f"is {given!r}; KubeRay knows {', '.join(_UPGRADES[kind])}")


def _cluster(name: str, path: str, spec: Document, owner: Document) -> Iterator[Finding]:
    if owner["kind"] == "RayCluster":
        yield from _upgrade_type(name, "RayCluster", spec.get("upgradeStrategy"))
    elif (spec.get("upgradeStrategy") or {}).get("type"):
        yield Finding(f"{name} {path}.upgradeStrategy", f"KubeRay refuses it in a cluster that belongs to a {owner['kind']}; leave it out")
    options = spec.get("autoscalerOptions") or {}
    is_v2 = bool(spec.get("enableInTreeAutoscaling")) and options.get("version") == "v2"
    groups = spec.get("workerGroupSpecs") or []
    yield from _group(name, f"{path}.headGroupSpec", "head", spec.get("headGroupSpec", {}), is_v2)
    names = [group.get("groupName") for group in groups]
    for twice in sorted({str(given) for given in names if names.count(given) > 1}):
        yield Finding(f"{name} {path}.workerGroupSpecs", f"two groups are called {twice!r}")
    for number, group in enumerate(groups):
        where = f"{path}.workerGroupSpecs[{number}]"
        yield from _group(name, where, str(group.get("groupName")), group, is_v2)
        yield from _sizes(name, where, spec, group, is_v2)
    yield from _fault_tolerance(name, path, spec, owner)
    auth = spec.get("authOptions") or {}
    if auth.get("secretName") and auth.get("mode") != "token":
        yield Finding(f"{name} {path}.authOptions", "secretName without mode: token turns nothing on")
    if auth.get("mode") == "token" and _version(spec) < (2, 52):
        yield Finding(f"{name} {path}.authOptions", "mode: token needs rayVersion 2.52 or later")
    yield from _network(name, path, spec)


def _group(name: str, where: str, group_name: str, group: Document, is_v2: bool) -> Iterator[Finding]:
    params, pod = group.get("rayStartParams") or {}, group.get("template", {}).get("spec", {})
    if not pod.get("containers"):
        yield Finding(f"{name} {where}", "has no container")
    given = [key for key in _RESOURCE_PARAMS if params.get(key)]
    if given and group.get("resources"):
        yield Finding(f"{name} {where}", f"resources stand in two places: `resources` and rayStartParams {', '.join(given)}; keep one")
    if "labels" in params:
        yield Finding(f"{name} {where}.rayStartParams", "labels belong in the group's `labels`")
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(str(key)) or not _LABEL_VALUE.fullmatch(str(value)):
            yield Finding(f"{name} {where}.labels", f"{key}={value} is no label")
    policy = pod.get("restartPolicy")
    if is_v2 and policy not in (None, "", "Never"):
        yield Finding(f"{name} {where}", f"restartPolicy {policy} of {group_name}: the v2 autoscaler wants Never, or none given")
    for container in pod.get("containers", [])[:1]:
        names = {variable.get("name") for variable in container.get("env") or []}
        if is_v2 and "RAY_enable_autoscaler_v2" in names:
            yield Finding(f"{name} {where}", "RAY_enable_autoscaler_v2 beside autoscalerOptions.version; keep the latter")
        for taken in sorted(names & {"REDIS_USERNAME"}):
            yield Finding(f"{name} {where}", f"{taken} as a variable; KubeRay takes it from gcsFaultToleranceOptions")


def _sizes(name: str, where: str, spec: Document, group: Document, is_v2: bool) -> Iterator[Finding]:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not 0 <= (least or 0) <= (_ANY if most is None else most):
        yield Finding(f"{name} {where}", f"minReplicas {least} and maxReplicas {most} are no range")
    if group.get("numOfHosts", 1) < 1:
        yield Finding(f"{name} {where}.numOfHosts", f"is {group['numOfHosts']}; a replica has at least one host")
    timeout = group.get("idleTimeoutSeconds")
    if timeout is not None and (timeout < 0 or not is_v2):
        yield Finding(f"{name} {where}.idleTimeoutSeconds", f"is {timeout}; a group's own time-out is not negative and needs autoscaler v2")
    if group.get("priority") and (not is_v2 or _version(spec) < (2, 56)):
        yield Finding(f"{name} {where}.priority", "needs autoscaler v2 and rayVersion 2.56 or later")
    if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
        yield Finding(f"{name} {where}.suspend", "a group cannot be suspended while the autoscaler is on")


def _fault_tolerance(name: str, path: str, spec: Document, owner: Document) -> Iterator[Finding]:
    options = spec.get("gcsFaultToleranceOptions")
    annotated = owner["metadata"].get("annotations", {}).get("ray.io/ft-enabled")
    containers = spec.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("containers") or [{}]
    if "RAY_REDIS_ADDRESS" in {variable.get("name") for variable in containers[0].get("env") or []} and (options or not annotated):
        yield Finding(f"{name} {path}.headGroupSpec", "RAY_REDIS_ADDRESS as a variable; KubeRay takes it from gcsFaultToleranceOptions")
    if not options:
        return
    where = f"{name} {path}.gcsFaultToleranceOptions"
    if annotated:
        yield Finding(where, "beside the annotation ray.io/ft-enabled; keep the options")
    head = spec.get("headGroupSpec", {})
    if head.get("rayStartParams", {}).get("redis-password"):
        yield Finding(where, "redis-password in rayStartParams; use redisPassword")
    if options.get("backend", "redis") == "rocksdb":
        for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
            if options.get(field):
                yield Finding(f"{where}.{field}", "is Redis's, but the backend is rocksdb")
        storage = options.get("storage") or {}
        if storage.get("claimName") and any(storage.get(field) for field in ("size", "storageClassName", "accessModes")):
            yield Finding(f"{where}.storage", "claimName excludes size, storageClassName and accessModes")
    else:
        if options.get("storage"):
            yield Finding(f"{where}.storage", "is rocksdb's, but the backend is redis")
        if not options.get("redisAddress"):
            yield Finding(f"{where}.redisAddress", "is missing; without it the head starts with no memory")


def _network(name: str, path: str, spec: Document) -> Iterator[Finding]:
    policy = spec.get("networkPolicy")
    if not policy:
        return
    groups = {group.get("groupName") for group in spec.get("workerGroupSpecs") or []}
    for rules in policy.get("workerGroups") or []:
        if rules.get("groupName") not in groups:
            yield Finding(f"{name} {path}.networkPolicy", f"{rules.get('groupName')!r} is no worker group")
    useless = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(policy.get("mode"))
    for part in (policy.get("head") or {}, policy.get("worker") or {}, *(policy.get("workerGroups") or [])):
        if useless and part.get(useless):
            yield Finding(f"{name} {path}.networkPolicy", f"{useless} with mode {policy['mode']}, which does not restrict them")


def _service(name: str, spec: Document) -> Iterator[Finding]:
    strategy = spec.get("upgradeStrategy") or {}
    yield from _upgrade_type(name, "RayService", strategy)
    cluster, options = spec.get("rayClusterConfig", {}), strategy.get("clusterUpgradeOptions")
    where = f"{name} spec.upgradeStrategy.clusterUpgradeOptions"
    if cluster.get("headGroupSpec", {}).get("headService", {}).get("metadata", {}).get("name"):
        yield Finding(f"{name} spec.rayClusterConfig.headGroupSpec.headService", "must have no name of its own")
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield Finding(f"{name} spec.rayClusterConfig.authOptions", "enableK8sTokenAuth is not for a RayService")
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        if options:
            yield Finding(where, f"is read with NewClusterWithIncrementalUpgrade only, and the type is {strategy.get('type')!r}")
        return
    if not cluster.get("enableInTreeAutoscaling"):
        yield Finding(f"{name} spec.rayClusterConfig", "an incremental upgrade needs enableInTreeAutoscaling")
    options = options or {}
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not 0 <= surge <= 100 or step is None or not 0 <= step <= 100:
        yield Finding(where, f"maxSurgePercent {surge} and stepSizePercent {step} are to be between 0 and 100")
    elif step > surge:
        yield Finding(where, f"stepSizePercent {step} is above maxSurgePercent {surge}")
    if (options.get("intervalSeconds") or 0) <= 0:
        yield Finding(f"{where}.intervalSeconds", "is to be positive")
    if not options.get("gatewayClassName"):
        yield Finding(f"{where}.gatewayClassName", "is missing; an incremental upgrade moves traffic by Gateway API")


def _job(name: str, path: str, spec: Document, owner: Document) -> Iterator[Finding]:
    where, mode = f"{name} {path}", spec.get("submissionMode", "K8sJobMode")
    cluster, selector = spec.get("rayClusterSpec"), spec.get("clusterSelector")
    shuts_down = bool(spec.get("shutdownAfterJobFinishes"))
    if mode not in _SUBMISSION_MODES:
        yield Finding(f"{where}.submissionMode", f"is {mode!r}; KubeRay knows {', '.join(_SUBMISSION_MODES)}")
    if not cluster and not selector:
        yield Finding(where, "has neither rayClusterSpec nor clusterSelector; which cluster runs it?")
    if cluster and selector:
        yield Finding(where, "has both rayClusterSpec and clusterSelector; the former is ignored")
    if selector is not None and not selector.get("ray.io/cluster"):
        yield Finding(f"{where}.clusterSelector", "must name the cluster as ray.io/cluster")
    if selector and (spec.get("backoffLimit") or 0) > 0:
        yield Finding(f"{where}.backoffLimit", "a try again needs a cluster of its own, which clusterSelector excludes")
    if spec.get("suspend") and (selector or not shuts_down):
        yield Finding(f"{where}.suspend", "needs shutdownAfterJobFinishes: true and a cluster of its own")
    if spec.get("ttlSecondsAfterFinished") and not shuts_down:
        yield Finding(f"{where}.ttlSecondsAfterFinished", "is read with shutdownAfterJobFinishes: true only")
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and spec[field] <= 0:
            yield Finding(f"{where}.{field}", f"is {spec[field]}; a deadline is positive")
    if spec.get("backoffLimit", 0) < 0:
        yield Finding(f"{where}.backoffLimit", f"is {spec['backoffLimit']}")
    if mode == "InteractiveMode" and (spec.get("backoffLimit") or 0) > 0:
        yield Finding(f"{where}.backoffLimit", "cannot be with InteractiveMode")
    if mode == "SidecarMode" and (spec.get("submitterPodTemplate") or spec.get("submitterConfig") or selector):
        yield Finding(f"{where}.submissionMode", "SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector")
    yield from _deletion(where, spec)
    yield from _runtime_env(where, spec)
    if cluster:
        yield from _cluster(name, f"{path}.rayClusterSpec", cluster, owner)


def _deletion(where: str, spec: Document) -> Iterator[Finding]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    rules = strategy.get("deletionRules") or []
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield Finding(f"{where}.deletionStrategy", "deletionRules and shutdownAfterJobFinishes exclude each other")
    autoscales = bool((spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"))
    seen: dict[tuple[str, str], int] = {}
    for number, rule in enumerate(rules):
        condition, policy = rule.get("condition") or {}, rule.get("policy")
        state = str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield Finding(f"{where}.deletionStrategy.deletionRules[{number}]", f"{policy} of a cluster that is not the job's own")
        if autoscales and policy == "DeleteWorkers":
            yield Finding(f"{where}.deletionStrategy.deletionRules[{number}]", "DeleteWorkers cannot be while the autoscaler is on")
        if (state, policy) in seen:
            yield Finding(f"{where}.deletionStrategy.deletionRules[{number}]", f"a second {policy} for {state}")
        seen[state, policy] = condition.get("ttlSeconds", 0)
    for state in {state for state, _ in seen}:
        times = [(policy, seen[state, policy]) for policy in _DELETION_ORDER if (state, policy) in seen]
        for (earlier, first), (later, second) in pairwise(times):
            if second < first:
                yield Finding(f"{where}.deletionStrategy", f"for {state}, {later} after {second} s comes before {earlier} after {first} s")


def _runtime_env(where: str, spec: Document) -> Iterator[Finding]:
    text = spec.get("runtimeEnvYAML")
    if text is None:
        return
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield Finding(f"{where}.runtimeEnvYAML", f"is no YAML: {error}")
        return
    if not isinstance(given, dict):
        yield Finding(f"{where}.runtimeEnvYAML", "is no mapping")
        return
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(set(given) - RuntimeEnv.known_fields)
    if unknown:
        yield Finding(
            f"{where}.runtimeEnvYAML", f"Ray knows no {', '.join(unknown)}; it knows {', '.join(sorted(RuntimeEnv.known_fields))}"
        )
    for key, value in (given.get("env_vars") or {}).items():
        if not isinstance(value, str):
            yield Finding(f"{where}.runtimeEnvYAML", f"env_vars.{key} is a {type(value).__name__}; Ray wants text, in quotes")


def _cron(name: str, spec: Document) -> Iterator[Finding]:
    schedule = str(spec.get("schedule", ""))
    if "TZ" in schedule:
        yield Finding(f"{name} spec.schedule", "names a time zone; use timeZone")
    fields = schedule.split()
    if not schedule.startswith("@") and (len(fields) != 5 or not all(_is_cron(*pair) for pair in zip(fields, _CRON_FIELDS, strict=True))):
        yield Finding(f"{name} spec.schedule", f"{schedule!r} is no schedule of five fields")
    zone = spec.get("timeZone")
    if zone is not None:
        from zoneinfo import available_timezones

        if zone not in available_timezones():
            yield Finding(f"{name} spec.timeZone", f"{zone!r} is no time zone")


def _is_cron(field: str, limits: tuple[int, int]) -> bool:
    for part in field.split(","):
        matched = re.fullmatch(r"(\*|\?|(\d+)(-(\d+))?)(/\d+)?", part)
        if matched is None:
            return False
        numbers = [int(number) for number in (matched[2], matched[4]) if number]
        if any(not limits[0] <= number <= limits[1] for number in numbers):
            return False
    return True


def _version(spec: Document) -> tuple[int, ...]:
    parts = re.findall(r"\d+", str(spec.get("rayVersion") or ""))
    return tuple(int(part) for part in parts[:3]) or (0,)


def ray_cluster(document: Document) -> tuple[str, dict[str, Any]] | None:
    """The path and spec of the cluster in a document of KubeRay's, if it has one of its own."""
    spec = document.get("spec", {})
    match document.get("kind"):
        case "RayCluster":
            return "spec", spec
        case "RayService":
            return "spec.rayClusterConfig", spec.get("rayClusterConfig", {})
        case "RayJob" if spec.get("rayClusterSpec"):
            return "spec.rayClusterSpec", spec["rayClusterSpec"]
        case "RayCronJob" if spec.get("jobTemplate", {}).get("rayClusterSpec"):
            return "spec.jobTemplate.rayClusterSpec", spec["jobTemplate"]["rayClusterSpec"]
    return None


def ray_job(document: Document) -> tuple[str, dict[str, Any]] | None:
    """The path and spec of the job in a document."""
    match document.get("kind"):
        case "RayJob":
            return "spec", document.get("spec", {})
        case "RayCronJob":
            return "spec.jobTemplate", document.get("spec", {}).get("jobTemplate", {})
    return None
