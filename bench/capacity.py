"""What the parts that there is one of cost as the fleet grows: the head, the router, the scheduler, the registry.

    python bench/capacity.py

router_choose_us           to choose a replica for one request, by the number of replicas
replicas_wanted_ms         one decision of the autoscaling policy, by the number of replicas
schedule_s                 one look of the fleet's scheduler, by the number of pods
registry_*_ms              a poll without news, and a cold listing, by the number of published names (local disk)
head_mib, gcs_node_kib     memory of a head with nothing on it; what each registered node adds to the control store. The nodes are
                           entries without a raylet: what their reports cost is not in it
gcs_list_nodes_s           one listing of 10,000 nodes, which the dashboard and the autoscaler ask for

Results: the section `capacity` of bench/results/elastic.json; docs/scale.md reads from it.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]
RESULTS = REPOSITORY / "bench" / "results" / "elastic.json"
SIZES = (10, 100, 1000, 10000)


def seconds(work: Callable[[], Any], times: int) -> float:
    """The fastest of five rounds, per call."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            work()
        best = min(best, (time.perf_counter() - began) / times)
    return best


def measure_policies() -> dict[str, Any]:
    from adaptfleet.on_ray.kuberay.fleet import Claim, schedule
    from adaptfleet.on_ray.serve.autoscaling import Aims, Report, replicas_wanted, summary
    from adaptfleet.on_ray.serve.routing import RecentPrefixes, Replica, Wanted, choose

    chance = random.Random(0)
    found: dict[str, Any] = {"router_choose_us": {}, "replicas_wanted_ms": {}, "schedule_s": {}}
    for size in SIZES[:3]:
        names = [f"adapter-{i}" for i in range(10 * size)]
        replicas = [Replica(str(i), chance.randrange(8), frozenset(chance.sample(names, 16))) for i in range(size)]
        recent = RecentPrefixes()
        wanted = [Wanted(chance.choice(names)) for _ in range(50)]
        took = seconds(lambda replicas=replicas, recent=recent, wanted=wanted: [choose(one, replicas, recent) for one in wanted], 2)
        found["router_choose_us"][size] = round(took / 50 * 1e6, 1)
        reports = [Report(chance.random() * 8, 0, 0.5, 0.2) for _ in range(size)]
        took = seconds(lambda reports=reports: replicas_wanted(summary(reports), 0, Aims(6, 1.0)), 10)
        found["replicas_wanted_ms"][size] = round(took * 1e3, 3)
    for size in SIZES:
        claims = [Claim(f"train-{i}", 0, {"nvidia.com/gpu": 1}, i, is_running=True) for i in range(size)]
        claims += [Claim(f"serve-{i}", 100, {"nvidia.com/gpu": 1}, i) for i in range(size // 10)]
        found["schedule_s"][size] = round(seconds(lambda claims=claims, size=size: schedule({"nvidia.com/gpu": size}, claims), 1), 5)
    return found


def measure_registry(folder: Path) -> dict[str, Any]:
    from adaptfleet.contracts.artifacts import Draft
    from adaptfleet.store.registry import Registry

    rows = folder / "rows"
    rows.mkdir()
    (rows / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    url = f"file://{folder / 'store'}"
    registry = Registry.open(url)
    found: dict[str, Any] = {"registry_publish_ms": {}, "registry_poll_ms": {}, "registry_cold_listing_ms": {}}
    published = 0
    for size in (100, 1000):
        began = time.perf_counter()
        for number in range(published, size):
            registry.publish(Draft(kind="dataset", name=f"rows-{number}"), rows)
        found["registry_publish_ms"][size] = round((time.perf_counter() - began) / (size - published) * 1e3, 1)
        published = size
        assert len(registry.snapshot()) == size
        found["registry_poll_ms"][size] = round(seconds(registry.snapshot, 20) * 1e3, 3)
        found["registry_cold_listing_ms"][size] = round(seconds(lambda: Registry.open(url).snapshot(), 1) * 1e3, 1)
    return found


def measure_head() -> dict[str, Any]:
    import grpc
    import psutil
    from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

    from adaptfleet.on_ray.cluster.processes import members
    from adaptfleet.on_ray.local_cluster import LocalCluster

    # The entries answer no health check, so these begin later than the measurement ends.
    with LocalCluster.start(num_cpus=1, env={"RAY_health_check_initial_delay_ms": "3600000"}) as cluster:

        def parts() -> dict[str, float]:
            memory: dict[str, float] = {}
            for process in members(cluster._record.leader, cluster._record.marker):
                command = psutil.Process(process.pid)
                name = Path(command.cmdline()[0]).name if command.cmdline() else command.name()
                memory[name] = memory.get(name, 0.0) + command.memory_info().rss / 2**20
            return memory

        token = (cluster.folder / "token").read_text().strip()
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(
            grpc.insecure_channel(cluster.address, [("grpc.max_receive_message_length", -1)])
        )
        metadata = [("authorization", f"Bearer {token}")]
        empty = parts()
        found: dict[str, Any] = {"head_mib": round(sum(empty.values())), "gcs_mib": {0: round(empty["gcs_server"])}}
        registered = 0
        for size in (1000, 10000):
            began = time.perf_counter()
            for number in range(registered, size):
                name = f"pool-gpu-worker-{number:05}"
                node = gcs_pb2.GcsNodeInfo(
                    node_id=os.urandom(28), node_manager_address="127.0.0.1", node_manager_port=1, object_manager_port=1,
                    node_manager_hostname=f"node-{number}", node_name=name, instance_id=name,
                    node_type_name="gpu", state=gcs_pb2.GcsNodeInfo.ALIVE, resources_total={"CPU": 12, "GPU": 1, "memory": 1e11},
                    labels={"ray.io/market-type": "spot", "ray.io/accelerator-type": "H100", "ray.io/node-group": "gpu"},
                )  # fmt: skip
                stub.RegisterNode(gcs_service_pb2.RegisterNodeRequest(node_info=node), metadata=metadata, timeout=30)
            found.setdefault("gcs_register_ms", {})[size] = round((time.perf_counter() - began) / (size - registered) * 1e3, 2)
            registered = size
            time.sleep(2)
            found["gcs_mib"][size] = round(parts()["gcs_server"])
        asked = gcs_service_pb2.GetAllNodeInfoRequest()
        took = seconds(lambda: stub.GetAllNodeInfo(asked, metadata=metadata, timeout=60), 1)
        alive = sum(node.state == gcs_pb2.GcsNodeInfo.ALIVE for node in stub.GetAllNodeInfo(asked, metadata=metadata).node_info_list)
        assert alive >= 10000, f"{alive} nodes are left"
        found["gcs_list_nodes_s"] = round(took, 3)
        found["gcs_node_kib"] = round((found["gcs_mib"][10000] - found["gcs_mib"][0]) * 1024 / 10000, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("policies", "registry", "head"), default=["policies", "registry", "head"])
    chosen = parser.parse_args().only
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs"}
    with tempfile.TemporaryDirectory(prefix="bench-capacity-") as folder:
        for part in chosen:
            parts = {"policies": measure_policies, "registry": lambda: measure_registry(Path(folder)), "head": measure_head}
            found |= parts[part]()
            print(json.dumps(found, indent=1), flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["capacity"] = results.get("capacity", {}) | found
    unfinished = RESULTS.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
