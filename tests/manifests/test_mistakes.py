# ruff: noqa: E501  a mistake a line
"""Mistakes that people make in these manifests, seeded one at a time: each is found, and for its own reason."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from k8s.validation import crds, manifests
from k8s.validation.checks import check

GONE = object()
POOL, ENDPOINT, JOB, CRON = "RayCluster/train", "RayService/endpoint", "RayJob/finetune", "RayCronJob/evaluate-nightly"
HEAD = "spec.headGroupSpec"
CPU, ON_DEMAND, SPOT = (f"spec.workerGroupSpecs.{number}" for number in range(3))
POD = "template.spec"
BOX = "template.spec.containers.0"
SERVICE = "spec.rayClusterConfig"
ENGINE = f"{SERVICE}.workerGroupSpecs.0"
SUBMITTER = "spec.submitterPodTemplate.spec"


@dataclass(frozen=True)
class Mistake:
    """`put` at `path` of a document (a key of lists is a number); `says` is in a finding about it."""

    name: str
    document: str
    path: str
    put: Any
    says: str
    overlay: str = "prod"


def serve(old: str, new: str) -> Callable[[str], str]:
    def replaced(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return replaced


MISTAKES = [
    # What the API server would refuse, or drop without a word.
    Mistake("misspelt-field", POOL, f"{CPU}.maxReplcas", 10, "maxReplcas"),
    Mistake("misspelt-field-deep", POOL, f"{CPU}.{BOX}.resurces", {}, "resurces"),
    Mistake("misspelt-option", POOL, "spec.autoscalerOptions.idleTimeoutSecond", 60, "idleTimeoutSecond"),
    Mistake("field-of-a-later-version", POOL, "spec.idleTerminationOptions", {}, "idleTerminationOptions"),
    Mistake("wrong-type", POOL, f"{CPU}.maxReplicas", "ten", "is not of type 'integer'"),
    Mistake("wrong-type-of-a-switch", POOL, "spec.enableInTreeAutoscaling", "yes", "is not of type 'boolean'"),
    Mistake("number-as-label", POOL, f"{CPU}.labels.tier", 1, "is not of type 'string'"),
    Mistake("number-as-resource", POOL, f"{HEAD}.resources.CPU", 0, "is not of type 'string'"),
    Mistake("bad-enum-autoscaler", POOL, "spec.autoscalerOptions.version", "v3", "is not one of ['v1', 'v2']"),
    Mistake("bad-enum-upscaling", POOL, "spec.autoscalerOptions.upscalingMode", "Fast", "is not one of"),
    Mistake("bad-enum-auth", POOL, "spec.authOptions.mode", "tokens", "is not one of"),
    Mistake("bad-enum-deletion", JOB, "spec.deletionStrategy.deletionRules.0.policy", "DeleteAll", "is not one of", "dev-cpu/finetune"),
    Mistake("two-conditions", JOB, "spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus", "Failed", "cannot be used together", "dev-cpu/finetune"),
    Mistake("no-deletion-rules", JOB, "spec.deletionStrategy", {}, "requires either BOTH onSuccess and onFailure", "dev-cpu/finetune"),
    Mistake("foreign-manager", POOL, "spec.managedBy", "me", "managedBy field value must be either"),
    Mistake("kind-of-no-api", "NetworkPolicy/dns", "apiVersion", "networking.k8s.io/v2", "no schema is known"),
    Mistake("misspelt-core-field", "ResourceQuota/adaptfleet", "spec.hrd", {}, "hrd"),
    Mistake("misspelt-pod-field", POOL, f"{CPU}.{POD}.tolerations", [{"ky": "x"}], "ky"),
    Mistake("misspelt-queue-field", "ClusterQueue/adaptfleet-research", "spec.cohort", "adaptfleet", "Extra inputs are not permitted"),
    Mistake("misspelt-monitor-field", "PodMonitor/ray-heads", "spec.podMetricsEndpoints.0.intervall", "15s", "Extra inputs are not permitted"),
    Mistake("bad-queue-policy", "ClusterQueue/adaptfleet-research", "spec.preemption.reclaimWithinCohort", "Always", "Input should be"),
    # What the operator refuses after the API server took it.
    Mistake("name-too-long", POOL, "metadata.name", "t" * 60, "at most 53"),
    Mistake("name-with-a-digit-first", POOL, "metadata.name", "7train", "begins with a letter"),
    Mistake("resources-in-two-places", POOL, f"{HEAD}.rayStartParams.num-cpus", "0", "two places"),
    Mistake("labels-in-start-params", POOL, f"{CPU}.rayStartParams.labels", "a=b", "belong in the group's"),
    Mistake("no-label", POOL, f"{CPU}.labels.pool", "two words", "is no label"),
    Mistake("min-above-max", POOL, f"{CPU}.minReplicas", 99, "are no range"),
    Mistake("no-min", POOL, f"{CPU}.minReplicas", GONE, "are both to be written"),
    Mistake("head-restarts", POOL, f"{HEAD}.{POD}.restartPolicy", "Always", "wants Never"),
    Mistake("two-groups-of-one-name", POOL, f"{SPOT}.groupName", "cpu", "two groups are called"),
    Mistake("upgrade-typo", POOL, "spec.upgradeStrategy.type", "Recreated", "is not one of"),
    Mistake("service-upgrade-typo", ENDPOINT, "spec.upgradeStrategy.type", "NewClusters", "KubeRay knows"),
    Mistake("surge-below-step", ENDPOINT, "spec.upgradeStrategy.clusterUpgradeOptions.stepSizePercent", 50, "is above maxSurgePercent 25"),
    Mistake("no-gateway-class", ENDPOINT, "spec.upgradeStrategy.clusterUpgradeOptions.gatewayClassName", "", "moves traffic by Gateway API"),
    Mistake("no-interval", ENDPOINT, "spec.upgradeStrategy.clusterUpgradeOptions.intervalSeconds", 0, "is to be positive"),
    Mistake("incremental-without-autoscaler", ENDPOINT, f"{SERVICE}.enableInTreeAutoscaling", False, "needs enableInTreeAutoscaling"),
    Mistake("options-without-type", ENDPOINT, "spec.upgradeStrategy.type", "NewCluster", "only, and the type is"),
    Mistake("strategy-of-a-jobs-cluster", JOB, "spec.rayClusterSpec.upgradeStrategy", {"type": "None"}, "belongs to a RayJob", "prod/finetune"),
    Mistake("token-without-mode", POOL, "spec.authOptions.mode", GONE, "turns nothing on"),
    Mistake("rocksdb-with-redis", ENDPOINT, f"{SERVICE}.gcsFaultToleranceOptions.backend", "rocksdb", "the backend is rocksdb"),
    Mistake("redis-without-address", ENDPOINT, f"{SERVICE}.gcsFaultToleranceOptions.redisAddress", GONE, "starts with no memory"),
    Mistake("submission-mode-typo", JOB, "spec.submissionMode", "K8SJobMode", "KubeRay knows", "prod/finetune"),
    Mistake("sidecar-with-template", JOB, "spec.submissionMode", "SidecarMode", "takes no submitterPodTemplate", "prod/finetune"),
    Mistake("negative-deadline", JOB, "spec.activeDeadlineSeconds", -1, "a deadline is positive", "prod/finetune"),
    Mistake("rules-with-shutdown", JOB, "spec.shutdownAfterJobFinishes", True, "exclude each other", "dev-cpu/finetune"),
    Mistake("self-before-cluster", JOB, "spec.deletionStrategy.deletionRules.1.condition.ttlSeconds", 1, "comes before", "dev-cpu/finetune"),
    Mistake("delete-workers-autoscaled", JOB, "spec.deletionStrategy.deletionRules.0.policy", "DeleteWorkers", "while the autoscaler is on", "dev-cpu/finetune"),
    Mistake("suspend-without-shutdown", JOB, "spec.shutdownAfterJobFinishes", False, "needs shutdownAfterJobFinishes", "prod/finetune"),
    Mistake("not-suspended-in-a-queue", JOB, "spec.suspend", False, "starts before it is admitted", "prod/finetune"),
    Mistake("runtime-env-typo", JOB, "spec.runtimeEnvYAML", "env_var: {A: b}", "Ray knows no env_var", "prod/finetune"),
    Mistake("runtime-env-number", JOB, "spec.runtimeEnvYAML", "env_vars: {A: 1}", "Ray wants text", "prod/finetune"),
    Mistake("retry-on-a-selected-cluster", CRON, "spec.jobTemplate.backoffLimit", 2, "needs a cluster of its own"),
    Mistake("delete-a-selected-cluster", CRON, "spec.jobTemplate.deletionStrategy.deletionRules.0.policy", "DeleteCluster", "not the job's own"),
    Mistake("bad-schedule", CRON, "spec.schedule", "30 25 * * *", "is no schedule"),
    Mistake("bad-time-zone", CRON, "spec.timeZone", "Europe/Atlantis", "is no time zone"),
    Mistake("tls-without-its-gate", POOL, "spec.tlsOptions", {"enabled": True}, "gate RayClusterMTLS, which is off"),
    Mistake("policy-without-its-gate", POOL, "spec.networkPolicy", {"mode": "DenyAll"}, "gate RayClusterNetworkPolicy"),
    Mistake("rocksdb-without-its-gate", ENDPOINT, f"{SERVICE}.gcsFaultToleranceOptions", {"backend": "rocksdb"}, "GCSFaultToleranceEmbeddedStorage"),
    Mistake("volcano-without-volcano", JOB, "metadata.labels.volcano&sh/queue-name", "adaptfleet-research", "is not the batchScheduler", "prod/finetune"),
    Mistake("namespace-that-nobody-watches", POOL, "metadata.namespace", "ray", "the operator watches"),
    # What Serve would take without a word.
    Mistake("serve-key-typo", ENDPOINT, "spec.serveConfigV2", serve("request_timeout_s", "request_timeout"), "request_timeout"),
    Mistake("serve-key-typo-high", ENDPOINT, "spec.serveConfigV2", serve("http_options", "http_option"), "http_option"),
    Mistake("serve-key-twice", ENDPOINT, "spec.serveConfigV2", serve("route_prefix: /", "route_prefix: /\n    route_prefix: /v1"), "given twice"),
    Mistake("serve-bad-value", ENDPOINT, "spec.serveConfigV2", serve("request_timeout_s: 900", "request_timeout_s: long"), "request_timeout_s"),
    Mistake("serve-no-import", ENDPOINT, "spec.serveConfigV2", serve("serve_apps.openai:app", "serve_apps.openia:app"), "cannot be imported"),
    Mistake("serve-no-builder", ENDPOINT, "spec.serveConfigV2", serve("openai:app", "openai:application"), "cannot be imported"),
    Mistake("serve-bad-args", ENDPOINT, "spec.serveConfigV2", serve("max_lora_rank: 64", "max_lora_rank: 65"), "max_lora_rank"),
    Mistake("serve-unknown-arg", ENDPOINT, "spec.serveConfigV2", serve("max_loras:", "max_lora:"), "max_lora"),
    Mistake("serve-unknown-deployment", ENDPOINT, "spec.serveConfigV2", lambda text: f"{text}    deployments: [{{name: enpoint, max_queued_requests: 9}}]\n", "is no deployment"),
    Mistake("serve-on-loopback", ENDPOINT, "spec.serveConfigV2", serve("host: 0.0.0.0", "host: 127.0.0.1"), "loopback"),
    Mistake("serve-on-the-head", ENDPOINT, "spec.serveConfigV2", serve("EveryNode", "HeadOnly"), "is not EveryNode"),
    Mistake("serve-other-port", ENDPOINT, "spec.serveConfigV2", serve("port: 8000", "port: 9000"), "Serve listens on 9000"),
    Mistake("serve-metrics-elsewhere", ENDPOINT, "spec.serveConfigV2", serve("metrics_port: 8090", "metrics_port: 9000"), "engine-metrics is 8090"),
    Mistake("serve-metrics-wake-engines", ENDPOINT, "spec.serveConfigV2", serve("metrics_port: 8090\n", "\n"), "args.metrics_port is None"),
    Mistake("serve-too-many-gpus", ENDPOINT, "spec.serveConfigV2", serve("gpus_per_replica: 1", "gpus_per_replica: 4"), "is split over 1"),
    Mistake("serve-too-many-cpus", ENDPOINT, "spec.serveConfigV2", serve("cpus_per_replica: 10", "cpus_per_replica: 64"), "fit on no node"),
    Mistake("serve-of-an-unknown-size", ENDPOINT, "spec.serveConfigV2", serve("gpus_per_replica: 1\n", "\n"), "gpus_per_replica is to be given"),
    Mistake("serve-bad-scaling", ENDPOINT, "spec.serveConfigV2", lambda text: f"{text}    deployments: [{{name: endpoint, autoscaling_config: {{max_replicas: -8}}}}]\n", "max_replicas"),
    Mistake("serve-typo-in-scaling", ENDPOINT, "spec.serveConfigV2", lambda text: f"{text}    deployments: [{{name: endpoint, autoscaling_config: {{max_replica: 8}}}}]\n", "max_replica"),
    Mistake("serve-override-of-the-application", ENDPOINT, "spec.serveConfigV2", lambda text: f"{text}    deployments: [{{name: endpoint, ray_actor_options: {{num_gpus: 1}}}}]\n", "replaces all that the application sets"),
    Mistake("serve-more-replicas-than-nodes", ENDPOINT, f"{ENGINE}.maxReplicas", 3, "have room for 3"),
    Mistake("serve-shutdown-after-the-end", ENDPOINT, f"{ENGINE}.{POD}.terminationGracePeriodSeconds", 100, "grace period of 100 s"),
    # Jobs that would fail an hour later.
    Mistake("no-such-job", JOB, "spec.entrypoint", "python jobs/finetun.py --config x", "there is no jobs/finetun.py", "prod/finetune"),
    Mistake("no-such-config", JOB, "spec.entrypoint", "python jobs/finetune.py --config jobs/configs/no.yaml", "no.yaml", "prod/finetune"),
    Mistake("misspelt-contract", JOB, "spec.entrypoint", serve("cluster.workers.min", "cluster.worker.min"), "worker", "prod/finetune"),
    Mistake("two-commands", JOB, "spec.entrypoint", serve("python", "cd /app && python"), "more than one command", "prod/finetune"),
    Mistake("workers-that-never-start", JOB, "spec.entrypoint", serve("cpus_per_worker=10", "cpus_per_worker=200"), "never start", "prod/finetune"),
    Mistake("workers-of-an-unknown-size", JOB, "spec.entrypoint", serve(" --set cluster.gpus_per_worker=1", ""), "are to be given", "prod/finetune"),
    # Versions and images.
    Mistake("other-ray", POOL, "spec.rayVersion", "2.59.0", "the lock has"),
    Mistake("other-tag", POOL, f"{CPU}.{BOX}.image", "registry.example.com/adaptfleet/cpu:0.0.9-ray2.60.0", "the image's tag is"),
    Mistake("no-tag", POOL, f"{CPU}.{BOX}.image", "registry.example.com/adaptfleet/cpu", "names no version"),
    Mistake("latest", POOL, f"{CPU}.{BOX}.image", "adaptfleet/cpu:latest", "names no version"),
    Mistake("stock-image", POOL, f"{CPU}.{BOX}.image", "rayproject/ray:2.60.0", "none of our images"),
    Mistake("gpus-on-the-cpu-build", POOL, f"{SPOT}.{BOX}.image", "adaptfleet/cpu:0.1.0-ray2.60.0", "is the CPU build"),
    # What a pod must keep to.
    Mistake("root", POOL, f"{CPU}.{POD}.securityContext.runAsUser", 0, "runAsUser"),
    Mistake("privileged", POOL, f"{CPU}.{BOX}.securityContext.allowPrivilegeEscalation", True, "allowPrivilegeEscalation"),
    Mistake("capabilities", POOL, f"{CPU}.{BOX}.securityContext.capabilities.drop", GONE, "drop: [ALL]"),
    Mistake("writable-root", ENDPOINT, f"{ENGINE}.{BOX}.securityContext.readOnlyRootFilesystem", False, "is to be true"),
    Mistake("host-path", POOL, f"{CPU}.{POD}.volumes.0", {"name": "tmp", "hostPath": {"path": "/tmp"}}, "hostPath"),
    Mistake("host-network", POOL, f"{CPU}.{POD}.hostNetwork", True, "opens the host"),
    Mistake("memory-request-below-limit", POOL, f"{CPU}.{BOX}.resources.requests.memory", "16Gi", "requested and limited to the same"),
    Mistake("no-quantity", POOL, f"{CPU}.{BOX}.resources.limits.memory", "32GiB", "does not match"),
    Mistake("gpu-request-differs", POOL, f"{SPOT}.{BOX}.resources.requests", {"cpu": "12", "memory": "96Gi"}, "differ"),
    Mistake("no-priority", POOL, f"{CPU}.{POD}.priorityClassName", GONE, "who gives way"),
    Mistake("no-spread", POOL, f"{CPU}.{POD}.topologySpreadConstraints", GONE, "one zone could hold all"),
    Mistake("head-on-spot", POOL, f"{HEAD}.{POD}.affinity", GONE, "keep off spot nodes"),
    Mistake("head-may-be-moved", POOL, f"{HEAD}.template.metadata.annotations", GONE, "safe-to-evict"),
    Mistake("head-works", POOL, f"{HEAD}.resources.CPU", "4", 'needs CPU: "0"'),
    Mistake("small-head", ENDPOINT, f"{SERVICE}.headGroupSpec.{BOX}.resources", {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}, "8Gi or more"),
    Mistake("spot-label-on-demand-nodes", POOL, f"{SPOT}.{POD}.nodeSelector", {"adaptfleet.io/market": "on-demand"}, "the label says spot"),
    Mistake("spot-not-tolerated", POOL, f"{SPOT}.{POD}.tolerations", [{"key": "nvidia.com/gpu", "operator": "Exists"}], "adaptfleet.io/spot"),
    Mistake("accelerator-not-tolerated", POOL, f"{ON_DEMAND}.{POD}.tolerations", [], "nvidia.com/gpu, which is not tolerated"),
    Mistake("replicas-written", POOL, f"{CPU}.replicas", 3, "is the autoscaler's"),
    Mistake("idle-time-out-too-short", POOL, f"{CPU}.idleTimeoutSeconds", 5, "is below 60"),
    Mistake("no-autoscaler", POOL, "spec.autoscalerOptions.version", "v1", "an idle accelerator is paid for"),
    Mistake("no-shared-memory", POOL, f"{CPU}.{POD}.volumes.1", {"name": "shm", "emptyDir": {}}, "medium Memory"),
    Mistake("shared-memory-too-large", POOL, f"{CPU}.{POD}.volumes.1.emptyDir.sizeLimit", "31Gi", "more than half"),
    Mistake("mount-of-nothing", POOL, f"{CPU}.{BOX}.volumeMounts.0.name", "tpm", "has no such volume"),
    Mistake("drain-after-the-end", POOL, f"{CPU}.{POD}.terminationGracePeriodSeconds", 60, "within the grace period of 60 s"),
    Mistake("no-grace", POOL, f"{CPU}.{POD}.terminationGracePeriodSeconds", GONE, "too few to leave in order"),
    Mistake("token-in-a-worker", POOL, f"{CPU}.{POD}.automountServiceAccountToken", True, "only a head talks to Kubernetes"),
    Mistake("key-in-plain-sight", POOL, f"{CPU}.{BOX}.env.0", {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}, "in plain sight"),
    Mistake("submitter-of-the-operator", JOB, "spec.submitterPodTemplate", GONE, "KubeRay's own is refused", "prod/finetune"),
    Mistake("submitter-as-root", JOB, f"{SUBMITTER}.securityContext.runAsNonRoot", False, "runAsNonRoot", "prod/finetune"),
    Mistake("no-probe-of-serve", ENDPOINT, f"{ENGINE}.{BOX}.readinessProbe", {"tcpSocket": {"port": 8000}}, "does not ask Serve's proxy"),
    Mistake("no-liveness", ENDPOINT, f"{ENGINE}.{BOX}.livenessProbe", GONE, "livenessProbe"),
    Mistake("asleep-for-ever", ENDPOINT, "spec.excludeHeadPodFromServeSvc", True, "take the first request", "dev-cpu"),
    Mistake("head-serves", ENDPOINT, "spec.excludeHeadPodFromServeSvc", False, "the head serves nothing"),
    # Names that nobody has.
    Mistake("no-such-account", POOL, f"{CPU}.{POD}.serviceAccountName", "adaptfleet-wroker", "there is no ServiceAccount"),
    Mistake("no-such-volume", POOL, f"{CPU}.{POD}.volumes.2.persistentVolumeClaim.claimName", "home", "there is no PersistentVolumeClaim"),
    Mistake("no-such-settings", POOL, f"{CPU}.{BOX}.envFrom.0.configMapRef.name", "adaptfleets", "there is no ConfigMap"),
    Mistake("no-such-priority", POOL, f"{CPU}.{POD}.priorityClassName", "adaptfleet-train", "there is no PriorityClass"),
    Mistake("secret-of-nobody", POOL, "spec.authOptions.secretName", "ray-token", "is made by nobody"),
    Mistake("no-such-queue", JOB, "metadata.labels.kueue&x-k8s&io/queue-name", "reserch", "there is no LocalQueue", "prod/finetune"),
    Mistake("no-such-cluster", CRON, "spec.jobTemplate.clusterSelector.ray&io/cluster", "training", "there is no RayCluster"),
    Mistake("no-such-cluster-queue", "LocalQueue/research", "spec.clusterQueue", "research", "there is no ClusterQueue"),
    Mistake("no-such-flavor", "ClusterQueue/adaptfleet-research", "spec.resourceGroups.0.flavors.0.name", "reserved", "there is no ResourceFlavor"),
    Mistake("no-such-role", "RoleBinding/adaptfleet-viewer", "roleRef.name", "viewer", "there is no Role"),
    Mistake("policy-for-nobody", "NetworkPolicy/gateway", "spec.podSelector.matchLabels", {"app": "endpoint"}, "selects no pod"),
    Mistake("budget-by-percent", "PodDisruptionBudget/engines", "spec", {"maxUnavailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "worker"}}}, "whole number as minAvailable"),
    Mistake("monitor-of-no-port", "PodMonitor/ray-workers", "spec.podMetricsEndpoints.0.port", "metric", "has no port named"),
    Mistake("monitor-behind-a-policy", "NetworkPolicy/prometheus", "spec.ingress.0.ports.0.port", 8081, "no NetworkPolicy lets"),
    Mistake("other-namespace", "ConfigMap/adaptfleet", "metadata.namespace", "default", "the namespaces made here are"),
    Mistake("namespace-of-the-cluster", "ResourceFlavor/spot", "metadata.namespace", "adaptfleet", "belongs to the whole cluster"),
]  # fmt: skip


def _seeded(documents: list[manifests.Document], mistake: Mistake) -> list[manifests.Document]:
    changed = copy.deepcopy(documents)
    place: Any = next(document for document in changed if manifests.name_of(document) == mistake.document)
    *path, last = [int(key) if key.isdigit() else key.replace("&", ".") for key in mistake.path.split(".")]
    for key in path:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    if mistake.put is GONE:
        del place[last]
    else:
        place[last] = mistake.put(place[last]) if callable(mistake.put) else mistake.put
    return changed


def test_the_list_is_long_and_has_no_name_twice() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 60


def findings_of(mistake: Mistake, built: dict[str, list[manifests.Document]], kuberay: crds.Crds) -> list[str]:
    """What is said of the document itself, then, since a name may be missed elsewhere, of all."""
    context = built[mistake.overlay.partition("/")[0]] if "/" in mistake.overlay else []
    seeded = _seeded(built[mistake.overlay], mistake)
    at = next(number for number, document in enumerate(built[mistake.overlay]) if manifests.name_of(document) == mistake.document)
    found = [str(finding) for finding in check(seeded[at : at + 1], [*seeded[:at], *seeded[at + 1 :], *context], kuberay)]
    if not any(mistake.says in finding for finding in found):
        found = [str(finding) for finding in check(seeded, context, kuberay)]
    return found


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found(mistake: Mistake, built: dict[str, list[manifests.Document]], kuberay: crds.Crds) -> None:
    found = findings_of(mistake, built, kuberay)
    assert any(mistake.says in finding for finding in found), found
