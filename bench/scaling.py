"""A day of an internet-scale endpoint, simulated, to choose how the autoscaler is set.

    python bench/scaling.py [--peak 8000] [--seed 0]

The policy is the endpoint's own (`on_ray/serve/autoscaling.py`). The replica it scales is fitted to `bench/results/serve.json` (time
between tokens at 8 and 16 requests, time to first token, an engine's start): a replica of that machine, so the number of replicas says
nothing of a GPU's. The day is made, not recorded: a slow wave, noise, and an hour of three times the requests from one second to the
next.
Results: bench/results/scaling.json.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from adaptfleet.on_ray.serve.autoscaling import Aims
from adaptfleet.on_ray.serve.simulation import Bounds, ReplicaModel, fit, simulate

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURED = REPOSITORY / "bench" / "results" / "serve.json"
RESULTS = REPOSITORY / "bench" / "results" / "scaling.json"
TOKENS_PER_REQUEST = 150.0
MAX_NUM_SEQS = 16


def replica() -> ReplicaModel:
    measured = json.loads(MEASURED.read_text())
    if "c8" not in measured["medians"]:
        raise SystemExit(f"{MEASURED.name} holds no figures by concurrency. Run: python bench/serve.py --only endpoint")
    rows = {int(name.removeprefix("c")): sides["endpoint (ours)"] for name, sides in measured["medians"].items()}
    fixed_s, per_sequence_s = fit([(concurrency, row["itl_p50_ms"] / 1000) for concurrency, row in rows.items()])
    first_token_s = rows[min(rows)]["ttft_p50_ms"] / 1000
    return ReplicaModel(fixed_s, per_sequence_s, first_token_s, measured.get("bare_engine_start_s", 30.0), MAX_NUM_SEQS)


def day(peak: float, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    chance = np.random.default_rng(seed)
    seconds = np.arange(24 * 3600)
    wave = 0.35 + 0.25 * np.sin((seconds / 3600 - 9) / 24 * 2 * np.pi)
    noise = np.repeat(chance.normal(1.0, 0.05, 24 * 60), 60)
    burst = np.where((seconds >= 14 * 3600) & (seconds < 15 * 3600), 3.0, 1.0)
    rates = wave * noise * burst
    return np.asarray(peak * rates / rates.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=8000.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = replica()
    rates = day(arguments.peak, arguments.seed)
    rows = []
    for share in (0.4, 0.5, 0.625, 0.75):
        for delay_s in (5.0, 30.0):
            started = time.perf_counter()
            aims = Aims(share * MAX_NUM_SEQS, ttft_s=2.0)
            found = simulate(
                rates, TOKENS_PER_REQUEST, model, Bounds(1, 1_000_000, delay_s, 300.0), aims, arguments.seed, first_replicas=200
            )
            rows.append({"requests_per_replica": aims.requests_per_replica, "upscale_delay_s": delay_s, **asdict(found)})
            print(
                f"{aims.requests_per_replica:5.1f} a replica, {delay_s:4.0f} s: {found.replica_hours:9.0f} replica hours, at most "
                f"{found.most_replicas:6d}; first token p95 {found.ttft_p95_s:6.2f} s, late {100 * found.late_share:5.2f}% "
                f"({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    written = {"replica": asdict(model), "requests": rows[0]["requests"], "tokens_per_request": TOKENS_PER_REQUEST, "runs": rows}
    unfinished = RESULTS.with_suffix(".part")
    unfinished.write_text(json.dumps(written, indent=2) + "\n")
    unfinished.replace(RESULTS)


if __name__ == "__main__":
    main()
