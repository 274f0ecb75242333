"""What the pools of a KubeRay cluster cost and bear, on the dev cluster: Ray's own autoscaler, pods that are processes of this machine.

    python bench/pools.py [--only scale spot service]

scale    a task that asks for an accelerator on an empty pool; the pool's end after it
         scale_up_s, scale_down_s (idle time-out included), idle_timeout_s: a node counts while Ray says that it is alive;
         pod_gone_s: until its pod is gone too, which on a real cluster is the kubelet's affair
spot     an elastic fine-tune of the embedded model on spot nodes: one is taken back with notice, one dies without
         spot_steps_redone_notice, spot_steps_redone_kill, ..., and how long until two workers train again
service  a RayService with the embedded model and an adapter that a RayJob has just tuned, under load: the head is killed, then the
         cluster configuration changes
         head_loss_failed_requests, upgrade_failed_requests, ..._requests, and how long each took

Results: the section `pools` of bench/results/elastic.json; other sections are left as they are.
"""

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]
RESULTS = REPOSITORY / "bench" / "results" / "elastic.json"
TESTS = REPOSITORY / "tests" / "kuberay"
LIMIT_S = 400.0
EVERY_STEPS = 10
ADAPTER = "pools-address"


def say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", flush=True)


def measure_scale(dev: Any, home: Path) -> dict[str, Any]:
    """A driver on this machine; the accelerator is declared, as the manifest does."""
    import ray

    from adaptfleet.on_ray.kuberay.manifests import read_manifests

    pool = read_manifests(TESTS / "pool.yaml")[0]
    for group in pool["spec"]["workerGroupSpecs"]:
        resources = {"cpu": "1", "memory": "4Gi", "nvidia.com/gpu": "1"}
        group["template"] = copy.deepcopy(group["template"])
        group["template"]["spec"]["containers"][0]["resources"]["limits"] = resources
    dev.apply([pool])
    cluster = dev.ready("pool")
    os.environ.update(cluster.env)
    found: dict[str, Any] = {"idle_timeout_s": pool["spec"]["workerGroupSpecs"][1]["idleTimeoutSeconds"]}
    ups, downs, gone = [], [], []
    with ray.init(address=cluster.address, log_to_driver=False, configure_logging=False):

        @ray.remote(num_gpus=1, num_cpus=1)
        def where() -> str:
            return str(ray.get_runtime_context().get_node_id())

        def is_there() -> bool:
            return any(node["Alive"] and node["Resources"].get("GPU") for node in ray.nodes())

        for _ in range(3):
            asked = time.monotonic()
            pending = where.remote()
            dev.kube.wait(is_there, "a node", LIMIT_S)
            ups.append(time.monotonic() - asked)
            ray.get(pending)
            ended = time.monotonic()
            dev.kube.wait(lambda: not is_there(), "the end of the node", LIMIT_S)
            downs.append(time.monotonic() - ended)
            dev.kube.wait(lambda: not dev.kube.pods("pool", "spot"), "the end of the pod", LIMIT_S)
            gone.append(time.monotonic() - ended)
            say(f"up {ups[-1]:.1f} s, down {downs[-1]:.1f} s, the pod {gone[-1]:.1f} s")
    dev.kube.delete("RayCluster", "pool")
    dev.kube.wait(lambda: not dev.kube.listed("Pod"), "the end of the pool", LIMIT_S)
    for name, values in (("scale_up_s", ups), ("scale_down_s", downs), ("pod_gone_s", gone)):
        found[name] = round(sorted(values)[1], 1)
        found[f"{name}_all"] = [round(value, 1) for value in values]
    return found


def measure_spot(dev: Any, home: Path) -> dict[str, Any]:
    from adaptfleet.on_ray.kuberay.manifests import read_manifests
    from tests.kuberay.training import Run, contract, ray_job, ready_pods

    dev.apply(read_manifests(TESTS / "pool.yaml"))
    dev.ready("pool")
    dev.apply([ray_job("spot", contract("spot", EVERY_STEPS), home, "pool")])
    submitted = time.time()

    def is_over() -> bool:
        return (dev.kube.get("RayJob", "spot").get("status") or {}).get("jobDeploymentStatus") in ("Complete", "Failed")

    run = Run(home, "spot", is_over, LIMIT_S)
    found: dict[str, Any] = {"checkpoint_every_steps": EVERY_STEPS}
    found["spot_submit_to_first_step_s"] = round(run.wait(lambda line: line["step"] >= 1, "the first step")["at"] - submitted, 1)
    run.steps_of(2, more=EVERY_STEPS + 5)
    for what, grace_s in (("notice", 30.0), ("kill", 0.0)):
        pod = ready_pods(dev.kube, "pool", "spot")[0]
        say(f"losing {pod}: {what}")
        at = time.time()
        dev.kube.delete("Pod", pod, grace_s=grace_s)
        found[f"spot_gap_{what}_s"] = round(run.wait(lambda line, at=at: line["at"] > at + 0.0 and _restarted(run, at), what)["at"] - at, 1)
        found[f"spot_steps_redone_{what}"] = run.redone_after(at)
        grown = run.steps_of(2, after=_start_after(run, at), more=EVERY_STEPS + 5)
        found[f"spot_two_workers_again_{what}_s"] = round(grown["at"] - at, 1)
        say(f"{found}")
    found["spot_grow_steps_redone"] = [int(line["redone"]) for line in run.lines("start")][1:]
    dev.kube.delete("RayJob", "spot")
    dev.kube.delete("RayCluster", "pool")
    dev.kube.wait(lambda: not dev.kube.listed("Pod"), "the end of the pool", LIMIT_S)
    return found


def _restarted(run: Any, at: float) -> bool:
    return any(line["at"] > at for line in run.lines("start"))


def _start_after(run: Any, at: float) -> float:
    return float(next(line["at"] for line in run.lines("start") if line["at"] > at))


def measure_service(dev: Any, home: Path) -> dict[str, Any]:
    from adaptfleet.on_ray.kuberay.manifests import read_manifests
    from tests.kuberay.load import Load
    from tests.kuberay.training import contract, head_is_ready, ray_job

    found: dict[str, Any] = {}
    pool = read_manifests(TESTS / "pool.yaml")[0]
    job = contract("adapter", 50, train=contract("", 1)["train"] | {"max_steps": 6}, cluster={"workers": 1, "cpus_per_worker": 1})
    job["publish"] = {"name": ADAPTER}
    made = ray_job("tune", job, home, "")
    del made["spec"]["clusterSelector"]
    made["spec"] |= {"rayClusterSpec": pool["spec"], "shutdownAfterJobFinishes": True}
    began = time.monotonic()
    dev.apply([made])

    def status(kind: str, name: str) -> dict[str, Any]:
        return dict(dev.kube.get(kind, name).get("status") or {})

    def ended() -> Any:
        return status("RayJob", "tune").get("jobDeploymentStatus") in ("Complete", "Failed") and status("RayJob", "tune")

    outcome = dev.kube.wait(ended, "the end of the RayJob", LIMIT_S)
    assert outcome["jobStatus"] == "SUCCEEDED", outcome
    found["ray_job_s"] = round(time.monotonic() - began, 1)
    dev.kube.wait(lambda: not dev.kube.listed("Pod"), "the end of the job's cluster", LIMIT_S)
    say(f"adapter tuned: {found}")

    service = read_manifests(TESTS / "service.yaml")[0]
    service["metadata"]["name"] = "serve"
    service["spec"]["serveConfigV2"] = json.dumps(_serve_config())
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["idleTimeoutSeconds"] = 60
    dev.apply([copy.deepcopy(service)])
    began = time.monotonic()

    def running() -> Any:
        now = status("RayService", "serve")
        return now if now.get("serviceStatus") == "Running" else None

    first = dev.kube.wait(running, "the service", LIMIT_S)
    found["service_ready_s"] = round(time.monotonic() - began, 1)
    say(f"serving: {found}")
    old = first["activeServiceStatus"]["rayClusterName"]
    body = {"model": ADAPTER, "messages": [{"role": "user", "content": "12 Elm Road, Springfield"}], "max_tokens": 8, "temperature": 0}
    url = f"{first['url']}/v1/chat/completions"
    with Load(url, body) as load:
        dev.kube.wait(lambda: load.sent >= 10, "the first answers", LIMIT_S)
        head = head_is_ready(dev.kube, old)
        assert head is not None
        say(f"killing the head {head}")
        at, before = time.monotonic(), load.sent
        dev.kube.delete("Pod", head, grace_s=0)
        dev.kube.wait(lambda: head_is_ready(dev.kube, old, other_than=head), "a new head", LIMIT_S)
        found["head_back_s"] = round(time.monotonic() - at, 1)
        dev.kube.wait(lambda: _is_served(status("RayService", "serve")), "Serve's state", LIMIT_S)
        found["head_state_back_s"] = round(time.monotonic() - at, 1)
        # The old engine's replica answers all the while; and after it, too.
        sent = load.sent
        dev.kube.wait(lambda: load.sent >= sent + 20, "answers after it", LIMIT_S)
    found |= {"head_loss_failed_requests": len(load.failures), "head_loss_requests": load.sent - before}
    say(f"head: {found} {load.failures[:3]}")
    with Load(url, body) as load:
        group["template"]["spec"]["containers"][0]["env"][0]["value"] = "green"
        at = time.monotonic()
        dev.apply([copy.deepcopy(service)])
        dev.kube.wait(lambda: status("RayService", "serve")["activeServiceStatus"]["rayClusterName"] != old, "the switch", LIMIT_S)
        found["upgrade_switch_s"] = round(time.monotonic() - at, 1)
        dev.kube.wait(lambda: not dev.kube.pods(old), "the end of the old cluster", LIMIT_S)
        sent = load.sent
        dev.kube.wait(lambda: load.sent >= sent + 20, "answers after it", LIMIT_S)
    found |= {"upgrade_failed_requests": len(load.failures), "upgrade_requests": load.sent}
    say(f"upgrade: {found} {load.failures[:3]}")
    dev.kube.delete("RayService", "serve")
    dev.kube.wait(lambda: not dev.kube.listed("Pod"), "the end of the service", LIMIT_S)
    return found


def _serve_config() -> dict[str, Any]:
    args = {"model": {"source": "smollm2-135m"}, "auth": "none", "max_loras": 2, "max_model_len": 512, "cpus_per_replica": 1}
    application = {"name": "adaptfleet", "route_prefix": "/", "import_path": "serve_apps.openai:app", "args": args}
    return {"proxy_location": "EveryNode", "applications": [application]}


def _is_served(status: dict[str, Any]) -> bool:
    applications = status.get("activeServiceStatus", {}).get("applications", {})
    return bool(applications) and all(isinstance(state, dict) and state.get("status") == "RUNNING" for state in applications.values())


PARTS: dict[str, Callable[[Any, Path], dict[str, Any]]] = {"scale": measure_scale, "spot": measure_spot, "service": measure_service}


def merge_results(part: str, found: dict[str, Any]) -> None:
    """Into the section `pools`, whole or not at all. Above its CPUs, the load says that times are of a machine with other work."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"
    load = {**results.get("pools", {}).get("load_average", {}), part: round(os.getloadavg()[1], 1)}
    results["pools"] = {**results.get("pools", {}), "machine": machine, "load_average": load, **found}
    unfinished = RESULTS.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args().only
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    from adaptfleet.contracts.home import home
    from adaptfleet.core.data.embedded import embedded_dataset
    from adaptfleet.core.models.embedded import embedded_model
    from adaptfleet.on_ray.kuberay.dev_cluster import DevCluster

    embedded_model("smollm2-135m"), embedded_dataset("address-json")
    with tempfile.TemporaryDirectory(prefix="bench-pools-") as folder:
        place = Path(folder)
        for kept in ("models", "cache"):
            (home() / kept).mkdir(parents=True, exist_ok=True)
            (place / kept).symlink_to(home() / kept)
        os.environ["ADAPTFLEET_HOME"] = folder
        for part in chosen:
            with DevCluster.start(REPOSITORY, {"ADAPTFLEET_HOME": folder}, logs_to=REPOSITORY / "build" / "bench-logs" / part) as dev:
                found = PARTS[part](dev, place)
            merge_results(part, found)
            print(json.dumps(found, indent=1))
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
