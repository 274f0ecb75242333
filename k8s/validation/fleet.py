"""Sizes that must fit: what Serve and the jobs ask for, and what the groups' pods have."""

from collections.abc import Iterator

from k8s.validation import entrypoints, serve_config
from k8s.validation.manifests import Document, Finding, name_of
from k8s.validation.operator_rules import ray_cluster, ray_job
from k8s.validation.pods import quantity


def findings(document: Document, context: list[Document]) -> Iterator[Finding]:
    if document["kind"] == "RayService":
        yield from _service(document)
    job = ray_job(document)
    if job and not list(entrypoints.findings(document)):
        yield from _job(document, *job, context)


def group_resources(group: Document) -> dict[str, float]:
    """What Ray's autoscaler takes a group's node to have."""
    container = (group.get("template", {}).get("spec", {}).get("containers") or [{}])[0]
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    cpus = quantity(limits.get("cpu") or requests.get("cpu") or 0)
    return {"CPU": float(int(cpus)), "GPU": quantity(limits.get("nvidia.com/gpu") or 0), "memory": quantity(limits.get("memory") or 0)}


def _service(document: Document) -> Iterator[Finding]:
    name, spec = name_of(document), document["spec"]
    cluster = spec.get("rayClusterConfig") or {}
    config = serve_config.read(document) or {}
    groups = cluster.get("workerGroupSpecs") or []
    port = (config.get("http_options") or {}).get("port", 8000)
    for group in groups:
        ports = {
            entry.get("name"): entry.get("containerPort")
            for container in group["template"]["spec"]["containers"]
            for entry in container.get("ports") or []
        }
        if ports.get("serve") != port:
            yield Finding(f"{name} {group['groupName']}", f"the port named serve is {ports.get('serve')}, and Serve listens on {port}")
        for application in config.get("applications") or []:
            told = (application.get("args") or {}).get("metrics_port")
            if told is None or ports.get("engine-metrics") != told:
                what = f"the port named engine-metrics is {ports.get('engine-metrics')}, and args.metrics_port is {told}"
                yield Finding(f"{name} {group['groupName']}", what)
        probe = str(group["template"]["spec"]["containers"][0].get("readinessProbe"))
        if f":{port}/-/healthz" not in probe:
            yield Finding(f"{name} {group['groupName']}.readinessProbe", f"does not ask Serve's proxy (:{port}/-/healthz)")
        if not group["template"]["spec"]["containers"][0].get("livenessProbe"):
            yield Finding(f"{name} {group['groupName']}.livenessProbe", "is missing")
    for application in config.get("applications") or []:
        args, parts = application.get("args") or {}, serve_config.replicas(application)
        if any(part.least == 0 for part in parts) and spec.get("excludeHeadPodFromServeSvc"):
            what = "is to be false where replicas may come down to 0: only the head is there to take the first request"
            yield Finding(f"{name} spec.excludeHeadPodFromServeSvc", what)
        elif all(part.least for part in parts) and not spec.get("excludeHeadPodFromServeSvc"):
            yield Finding(f"{name} spec.excludeHeadPodFromServeSvc", "is to be true; the head serves nothing")
        for key in ("cpus_per_replica", "gpus_per_replica"):
            if args.get(key) is None:
                what = f"args.{key} is to be given: it would be read off the head, where the application is built"
                yield Finding(f"{name} spec.serveConfigV2", what)
        engine = {str(key).replace("-", "_"): value for key, value in (args.get("engine_args") or {}).items()}
        split = int(engine.get("tensor_parallel_size", 1)) * int(engine.get("pipeline_parallel_size", 1))
        if args.get("gpus_per_replica") not in (None, 0, split):
            what = f"args.gpus_per_replica is {args['gpus_per_replica']}, and the engine is split over {split}"
            yield Finding(f"{name} spec.serveConfigV2", what)
        for part in parts:
            yield from _replicas(name, part, groups)


def _replicas(name: str, part: serve_config.Replicas, groups: list[Document]) -> Iterator[Finding]:
    where = f"{name} spec.serveConfigV2 deployment {part.name}"
    wanted = {"CPU": part.cpus, "GPU": part.gpus}
    fitting = [group for group in groups if _fits(wanted, group_resources(group))]
    if not fitting:
        have = "; ".join(f"{group['groupName']}: {group_resources(group)}" for group in groups)
        yield Finding(where, f"{part.cpus:g} CPUs and {part.gpus:g} GPUs fit on no node of a group. {have}")
        return
    places = sum(_places(wanted, group_resources(group)) * group["maxReplicas"] for group in fitting) if any(wanted.values()) else part.most
    if part.most > places:
        yield Finding(where, f"may have {part.most} replicas, and the groups have room for {places}")
    grace = min(group["template"]["spec"].get("terminationGracePeriodSeconds", 30) for group in fitting)
    if part.drain_s >= grace:
        yield Finding(where, f"may take {part.drain_s:g} s to end its requests, which is not within the pods' grace period of {grace} s")


def _job(document: Document, path: str, spec: Document, context: list[Document]) -> Iterator[Finding]:
    where = f"{name_of(document)} {path}.entrypoint"
    cluster = (ray_cluster(document) or ("", None))[1]
    selected = (spec.get("clusterSelector") or {}).get("ray.io/cluster")
    if cluster is None and selected:
        cluster = next((other["spec"] for other in context if name_of(other) == f"RayCluster/{selected}"), None)
    wanted = entrypoints.contract(str(spec.get("entrypoint"))).get("cluster")
    if cluster is None or not isinstance(wanted, dict):
        return
    if wanted.get("cpus_per_worker") is None or wanted.get("gpus_per_worker") is None:
        yield Finding(where, "cluster.cpus_per_worker and cluster.gpus_per_worker are to be given: the job starts on an empty cluster")
        return
    each = {"CPU": float(wanted["cpus_per_worker"]), "GPU": float(wanted["gpus_per_worker"])}
    groups = [group for group in cluster.get("workerGroupSpecs") or [] if _fits(each, group_resources(group))]
    places = sum(_places(each, group_resources(group)) * group["maxReplicas"] * group.get("numOfHosts", 1) for group in groups)
    workers = wanted.get("workers", 1)
    least, most = (workers["min"], workers["max"]) if isinstance(workers, dict) else (workers, workers)
    if places < least:
        yield Finding(where, f"{least} workers of {each['CPU']:g} CPUs and {each['GPU']:g} GPUs never start: there is room for {places}")
    elif places < most:
        yield Finding(where, f"up to {most} workers are asked for, and there is room for {places} at most")


def _fits(wanted: dict[str, float], has: dict[str, float]) -> bool:
    return all(has[name] >= value for name, value in wanted.items())


def _places(wanted: dict[str, float], has: dict[str, float]) -> int:
    return min(int(has[name] // value) for name, value in wanted.items() if value)
