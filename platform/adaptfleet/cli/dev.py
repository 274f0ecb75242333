"""An elastic cluster on this machine from Kubernetes manifests: KubeRay's objects, Ray's own autoscaler, pods that are processes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.home import home, store_url

if TYPE_CHECKING:
    from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster

_DEFAULT = "k8s/overlays/dev-cpu"
_EPILOG = """\
  adaptfleet dev up                                  the shipped pool of k8s/overlays/dev-cpu
  adaptfleet submit jobs/finetune.py --config jobs/configs/finetune_address.yaml
  adaptfleet dev status
  adaptfleet dev apply my-rayservice.yaml            RayClusters, RayJobs and RayServices
  adaptfleet dev lose train-cpu-worker-1a2b3         a machine dies; --notice 30: it is taken back in 30 s
  adaptfleet dev down

Not run here: images, volumes, probes, security contexts, network policies. docs/dev-cluster.md says more."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start it from a manifest, a folder or a kustomization")
    up.add_argument("source", nargs="?", default=_DEFAULT, metavar="PATH", help=f"{_DEFAULT} unless given")
    up.add_argument("--fleet", action="append", default=[], metavar="RESOURCE=AMOUNT", help="what all pods together may have")
    actions.add_parser("status", help="what runs on it")
    apply = actions.add_parser("apply", help="add objects, or change them")
    apply.add_argument("source", metavar="PATH")
    lose = actions.add_parser("lose", help="what a lost or a preempted machine does to what runs")
    lose.add_argument("pod")
    lose.add_argument("--notice", type=float, default=0.0, metavar="SECONDS", help="SIGTERM, and SIGKILL so much later (default: at once)")
    actions.add_parser("down", help="end it, and nothing else")


def run(args: argparse.Namespace) -> int:
    return int({"up": _up, "status": _status, "apply": _apply, "lose": _lose, "down": _down}[args.action](args))


def _up(args: argparse.Namespace) -> int:
    from adaptfleet.on_ray.cluster.interruption import stop_on_signal
    from adaptfleet.on_ray.cluster.record import default_record, write_record
    from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster, cpus
    from adaptfleet.on_ray.kuberay.manifests import checked, read_manifests
    from adaptfleet.on_ray.kuberay.pod_commands import ClusterPorts
    from adaptfleet.on_ray.local_cluster import LocalCluster

    fleet = _fleet(args.fleet)
    documents = checked(read_manifests(Path(args.source)))
    clusters = [document for document in documents if document["kind"] == "RayCluster"]
    if not clusters:
        raise ContractError(f"{args.source} holds no RayCluster. Start one first; RayJobs and RayServices come by `adaptfleet dev apply`.")
    if LocalCluster.attach(default_record()) is not None:
        raise ContractError("a local cluster of this home runs already. End it with `adaptfleet stop` or `adaptfleet dev down` first.")
    stop_on_signal()
    LocalCluster.clear(default_record())
    print("starting the Kubernetes API and the head ...", flush=True)
    # Manifests say where a volume is; here it is where this home and its store are.
    places = {"ADAPTFLEET_HOME": str(home()), "ADAPTFLEET_STORE": store_url()}
    dev = DevCluster.start(Path.cwd(), places, fleet=fleet, detached=True)
    try:
        dev.apply(documents)
        meta = clusters[0]["metadata"]
        dev.ready(meta["name"], meta.get("namespace", "default"))
        found = dev.kube.get("RayCluster", meta["name"], meta.get("namespace", "default"))
        assert found is not None
        write_record(dev.record(ClusterPorts.of(found), cpus(found)), default_record())
    except BaseException:
        dev.stop()
        raise
    kept = sorted({document["kind"] for document in documents} - {"RayCluster", "RayJob", "RayService", "ConfigMap", "Secret"})
    if kept:
        print(f"kept and not acted on: {', '.join(kept)}")
    print(f"RayCluster {meta['name']} is up; its workers come when a job asks for them and go when idle.\n")
    _show(dev)
    print(
        f"\n  adaptfleet submit jobs/finetune.py --config jobs/configs/finetune_address.yaml"
        f"\n  export KUBECONFIG={dev.kubeconfig}    for kubectl get, apply --validate=false and delete"
        f"\n  adaptfleet dev down"
    )
    return 0


def _fleet(given: list[str]) -> dict[str, float] | None:
    found = {}
    for text in given:
        name, _, amount = text.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            raise ContractError(f"--fleet {text!r} is not RESOURCE=AMOUNT, such as nvidia.com/gpu=4.") from None
    return found or None


def _status(args: argparse.Namespace) -> int:
    dev = _running()
    if dev is None:
        print(f"no dev cluster of {home()} is running.")
        return 1
    _show(dev)
    return 0


def _apply(args: argparse.Namespace) -> int:
    from adaptfleet.on_ray.kuberay.manifests import checked, read_manifests

    documents = checked(read_manifests(Path(args.source)))
    dev = _needed()
    dev.apply(documents)
    for document in documents:
        print(f"{document['kind']} {document['metadata']['name']}: applied")
    return 0


def _lose(args: argparse.Namespace) -> int:
    dev = _needed()
    known = {pod["metadata"]["name"]: pod["metadata"]["namespace"] for pod in dev.kube.listed("Pod")}
    if args.pod not in known:
        raise ContractError(f"there is no pod {args.pod!r}; there are {', '.join(sorted(known)) or 'none'}.")
    dev.kube.delete("Pod", args.pod, known[args.pod], grace_s=args.notice)
    print(f"{args.pod} " + (f"is told to end, and killed in {args.notice:g} s" if args.notice else "is killed"))
    return 0


def _down(args: argparse.Namespace) -> int:
    from adaptfleet.on_ray.cluster.record import default_record, remove_record

    kept = home() / "logs" / "dev"
    dev = _running(kept)
    if dev is None:
        print(f"nothing to end: no dev cluster of {home()} is running.")
        return 0
    dev.stop()
    remove_record(default_record(), dev.marker)
    print(f"ended. Logs: {kept}")
    return 0


def _running(logs_to: Path | None = None) -> "DevCluster | None":
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster

    return DevCluster.attach(default_record(), logs_to)


def _needed() -> "DevCluster":
    dev = _running()
    if dev is None:
        raise ContractError("no dev cluster of this home is running. Start one with `adaptfleet dev up`.")
    return dev


def _show(dev: "DevCluster") -> None:
    for cluster in dev.kube.listed("RayCluster"):
        status: dict[str, Any] = cluster.get("status") or {}
        name = cluster["metadata"]["name"]
        print(f"RayCluster {name}: {status.get('state') or 'starting'}")
        for group in cluster["spec"].get("workerGroupSpecs") or ():
            pods = dev.kube.pods(name, group["groupName"])
            print(f"  {group['groupName']}: {len(pods)} of {group['minReplicas']} to {group['maxReplicas'] * group['numOfHosts']}")
            for pod in pods:
                print(f"    {pod['metadata']['name']}  {(pod.get('status') or {}).get('phase', 'Pending')}")
    for job in dev.kube.listed("RayJob"):
        status = job.get("status") or {}
        said = " ".join(filter(None, (status.get("jobDeploymentStatus", "New"), status.get("jobStatus"), status.get("reason"))))
        print(f"RayJob {job['metadata']['name']}: {said}")
    for service in dev.kube.listed("RayService"):
        status = service.get("status") or {}
        ready = status.get("serviceStatus") or "starting"
        print(f"RayService {service['metadata']['name']}: {ready}, {status.get('numServeEndpoints', 0)} endpoints, {status.get('url', '')}")
