"""The joint search against a full grid of independent trials and against a random search of the same cost.

    python bench/sweep.py [--only search alone again] [--small] [--seconds 540]

    search   the shipped joint space (27 points) as jobs/sweep.py runs it, to its published, measured front
    alone    each of the 27 points by itself: nothing shared, nothing ended early, its own baseline, as 27 jobs would
    again    the recommended point's engine figures, taken once more

Each piece goes on where it stopped: `--seconds` ends a call in time, by killing the search (kill -9) or between two points of the grid;
what was measured is kept in build/bench-sweep. bench/results/sweep.json is written from whatever is there, and says how much that is.
`--small` narrows the space to 12 points and shortens the trainings, for a machine with little time.

Costs are CPU seconds of the steps (importance, pruning, training, merging, rounding, held-out loss), counted alike on both sides; the start
of Ray's processes is in neither. The random search is played from the measured grid: its points in random order until the search's cost is
spent, 2000 times over. Volumes are over a corner a tenth beyond the grid's front.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "sweep.json"
WORK = REPOSITORY / "build" / ("bench-sweep-small" if "--small" in sys.argv else "bench-sweep")
PIECES = ("search", "alone", "again")
NUM_DRAWS = 2000


def contract(name: str, is_small: bool) -> Any:
    """The shipped contract, its trainings short enough for the grid."""
    from adaptfleet.contracts.loading import load_contract
    from adaptfleet.contracts.search import SPACES, SweepJob

    space = yaml.safe_load((SPACES / "joint.yaml").read_text())
    steps, rows = (12, 32) if is_small else (30, 64)
    if is_small:
        space["axes"]["rank"]["values"] = [None, 16]
        space["axes"]["ratio"]["values"] = [0.0, 0.2]
        space["base"]["calibration"]["num_rows"] = 64
    space["base"]["proof"]["max_rows"] = rows
    file = WORK / "space.yaml"
    file.write_text(yaml.safe_dump(space, sort_keys=False))
    given = [f"name={name}", f"space={file}", f"over.steps.recover.train.max_steps={steps}", "finalists={max: 4, name: bench-joint}"]
    return load_contract(SweepJob, REPOSITORY / "jobs" / "configs" / "sweep_joint.yaml", given)


def home(piece: str) -> Path:
    """An ADAPTFLEET_HOME of its own; the model and llm-compressor's environment are the user's."""
    from adaptfleet.contracts import home as users

    folder = WORK / f"home-{piece}"
    folder.mkdir(parents=True, exist_ok=True)
    for kept in ("models", "environments"):
        (users.home() / kept).mkdir(parents=True, exist_ok=True)
        if not (folder / kept).exists():
            (folder / kept).symlink_to(users.home() / kept)
    return folder


def search(is_small: bool, seconds: float) -> None:
    """In a process of its own, killed when time is up: the next call goes on."""
    if (WORK / "search.json").exists():
        return
    job = contract("bench-joint", is_small)
    file = WORK / "contract.json"
    file.write_text(job.model_dump_json(indent=1))
    environment = {**os.environ, "ADAPTFLEET_HOME": str(home("search"))}
    command = [sys.executable, str(REPOSITORY / "jobs" / "sweep.py"), "--config", str(file)]
    # its own group, so that kill -9 takes the driver; its cluster ends with it
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print("the search was killed; call again to go on")
        return
    if status:
        sys.exit(status)
    shutil.copyfile(home("search") / "runs" / job.run_name() / "front.json", WORK / "search.json")


def alone(is_small: bool, seconds: float) -> None:
    from adaptfleet.contracts.search_points import grid, point_id

    end = time.monotonic() + seconds
    points = grid(contract("alone", is_small).space)
    left = [point for point in points if not (WORK / "alone" / f"{point_id(point)}.json").exists()]
    if not left:
        return
    (WORK / "alone").mkdir(parents=True, exist_ok=True)
    os.environ["ADAPTFLEET_HOME"] = str(home("alone"))
    from adaptfleet.on_ray.joining import joined_cluster

    longest = 0.0
    with joined_cluster():
        import ray

        with ray.init(log_to_driver=False):
            for point in left:
                if time.monotonic() + longest > end:
                    break
                began = time.monotonic()
                found = one_alone(point, is_small)
                (WORK / "alone" / f"{point_id(point)}.json").write_text(json.dumps(found, indent=1))
                longest = max(longest, time.monotonic() - began)
                print(f"{point_id(point)}: {found['cpu_s']:.0f} CPU s, {found['wall_s']:.0f} s, {found['metrics']}", flush=True)


def one_alone(point: Any, is_small: bool) -> dict[str, Any]:
    """The trial that a sweep runs, with a folder and caches that nothing else has touched."""
    from adaptfleet.contracts.search_points import job_of, point_id
    from adaptfleet.on_ray.tune.computing import Place
    from adaptfleet.on_ray.tune.sweep_folder import SweepFolder
    from adaptfleet.on_ray.tune.trial import Trial, stages

    place = home("alone")
    for cached in ("cache/importance", "runs"):
        shutil.rmtree(place / cached, ignore_errors=True)
    job = contract("alone", is_small)
    folder = SweepFolder.open(job)
    trial = Trial(job, folder, Place.here(2), point, 1)
    began = time.monotonic()
    # as jobs/compress.py does: the parent is measured beside every result
    trial.measured("quality-parent", "compress_steps.quality", *trial.common, job_of(job, point), None)
    last = list(stages(trial))[-1]
    costs = folder.costs()
    shutil.rmtree(place / "runs", ignore_errors=True)
    return {
        "point": point,
        "id": point_id(point),
        "metrics": {key: last["metrics"][key] for key in ("nll", "bytes")},
        "cpu_s": sum(cost.cpu_s for cost in costs.values()),
        "wall_s": time.monotonic() - began,
        "train_tokens": sum(cost.tokens for cost in costs.values()),
        "steps": {name.partition("-")[0]: round(cost.cpu_s, 2) for name, cost in costs.items()},
    }


def again() -> None:
    """The published point once more, from the registry, in a new engine."""
    if (WORK / "again.json").exists() or not (WORK / "search.json").exists():
        return
    os.environ["ADAPTFLEET_HOME"] = str(home("search"))
    from adaptfleet.on_ray.compress.engine_proof import engine_proof
    from adaptfleet.on_ray.tune.finalist_steps import engine_metrics
    from adaptfleet.store.registry import Registry
    from adaptfleet.store.sweep_points import version_of_point

    front = json.loads((WORK / "search.json").read_text())
    registry = Registry.open()
    manifest = version_of_point(registry, f"sweep/bench-joint#{front['recommended']}")
    registry.set_alias(manifest.name, "prod", manifest.version)
    folder = registry.fetch(registry.resolve(manifest.name), home("search") / "cache" / "artifacts")
    engine = engine_proof(folder, "bfloat16", [([1, 2, 3], [False, True, True])], 1, 3)
    (WORK / "again.json").write_text(json.dumps({"reference": manifest.reference, **engine_metrics(engine)}, indent=1))


def report(is_small: bool) -> None:
    from adaptfleet.contracts.search_points import grid
    from adaptfleet.core.search.front import front, hypervolume, reference, scaled
    from adaptfleet.on_ray.tune.sweep_folder import SweepFolder

    job = contract("bench-joint", is_small)
    points = len(grid(job.space))
    singles = [json.loads(file.read_text()) for file in sorted((WORK / "alone").glob("*.json"))]
    folder = SweepFolder(home("search") / "runs" / job.run_name())
    records = list(folder.records().values()) if folder.path.exists() else []
    finished = [record for record in records if record.status == "finished"]
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, other work beside",
        "space": "joint, narrowed to ranks none and 16, ratios 0 and 0.2" if is_small else "joint",
        "points": points,
        "train_tokens_each": (12 if is_small else 30) * 512,
        "independent_points_measured": len(singles),
        "sweep": {status: sum(record.status == status for record in records) for status in ("finished", "stopped", "failed")},
    }
    if folder.path.exists():
        costs = folder.costs()
        cost = sum(one.cpu_s for one in costs.values())
        events = [json.loads(line) for line in (folder.path / "history.jsonl").read_text().splitlines()]
        ended = [event["point"] for event in events if event["status"] != "failed"]
        found |= {
            "sweep_cpu_s": round(cost, 1),
            "sweep_search_s": round(max((record.search_s for record in records), default=0.0), 1),
            "beginnings": int((folder.read_json("attempt.json") or {}).get("attempt", 0)),
            "resume_redone_trials": len(ended) - len(set(ended)),
        }
    if (WORK / "search.json").exists():
        told = json.loads((WORK / "search.json").read_text())
        served = [point for point in told["front"] if "decode_tokens_per_s_b1" in point["measured"]]
        losses = [
            (p["measured"]["perplexity_in_domain"], p["measured"]["perplexity_out_of_domain"])
            for p in served
            if "perplexity_out_of_domain" in p["measured"]
        ]
        pairs = [(a, b) for i, a in enumerate(losses) for b in losses[:i]]
        found |= {
            "num_served_points": sum(point["published"] is not None for point in served),
            "recommended": told["recommended"],
            "engine_noise": told["noise"],
            "pairs_in_the_same_order_on_another_task": [sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs), len(pairs)],
            "front": told["front"],
        }
        if (WORK / "again.json").exists():
            once = next(p["measured"] for p in told["front"] if p["point"] == told["recommended"])
            twice = json.loads((WORK / "again.json").read_text())
            timed = ("time_to_first_token_s", "decode_tokens_per_cpu_s_b1", "decode_tokens_per_cpu_s_b16")
            found["measured_again_over_report"] = {key: round(twice[key] / once[key], 4) for key in timed}
    if len(singles) < points:
        found["note"] = f"{len(singles)} of the grid's {points} independent points are measured; ratios to it are told once it is whole."
    elif finished:
        grid_NM = [(one["metrics"]["nll"], one["metrics"]["bytes"]) for one in singles]
        ours_NM = [(record.metrics["nll"], record.metrics["bytes"]) for record in finished]
        best = [grid_NM[i] for i in front(grid_NM)]
        corner = scaled([reference(grid_NM)], best)[0]
        volume = {name: hypervolume(scaled(values, best), corner) for name, values in (("grid", grid_NM), ("sweep", ours_NM))}
        whole = sum(one["cpu_s"] for one in singles)
        drawn = [random_volume(singles, found["sweep_cpu_s"], best, corner, seed) for seed in range(NUM_DRAWS)]
        found |= {
            "independent_cpu_s": round(whole, 1),
            "hypervolume_ratio_vs_grid": round(volume["sweep"] / volume["grid"], 4),
            "hypervolume_ratio_vs_random": round(volume["sweep"] / statistics.mean(drawn), 4),
            "cost_ratio_vs_independent": round(found["sweep_cpu_s"] / whole, 4),
        }
    found["independent"] = singles
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key not in ("independent", "front")}, indent=1))
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


def random_volume(singles: list[dict[str, Any]], budget: float, best: Any, corner: Any, seed: int) -> float:
    """Of a random search: points in random order while there is budget left for the next one."""
    from adaptfleet.core.search.front import hypervolume, scaled

    order = random.Random(seed).sample(singles, len(singles))
    taken, spent = [], 0.0
    for one in order:
        if spent + one["cpu_s"] > budget:
            break
        spent += one["cpu_s"]
        taken.append((one["metrics"]["nll"], one["metrics"]["bytes"]))
    return hypervolume(scaled(taken, best), corner) if taken else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PIECES, default=PIECES)
    parser.add_argument("--small", action="store_true", help="12 points and short trainings")
    parser.add_argument("--seconds", type=float, default=36000.0, help="of one piece in this call")
    arguments = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "platform"))
    WORK.mkdir(parents=True, exist_ok=True)
    if "search" in arguments.only:
        search(arguments.small, arguments.seconds)
    if "alone" in arguments.only:
        alone(arguments.small, arguments.seconds)
    if "again" in arguments.only:
        again()
    report(arguments.small)


if __name__ == "__main__":
    main()
