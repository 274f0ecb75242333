"""A scripted day on one fleet of accelerators: an endpoint that grows and shrinks with its traffic, and training that has the rest.

    python bench/fleet_day.py

A discrete-event simulation with the code that decides in production: how many replicas (`on_ray.serve.autoscaling.replicas_wanted`, with
Ray Serve's own delays), which replica gets a request and so which adapters it holds (`on_ray.serve.routing.choose`), and which pod has an
accelerator (`on_ray.kuberay.fleet.schedule`). The same day is run on a static split, for each size of the endpoint's part; it is compared
with the smallest that keeps requests waiting no longer. How long things take is read from what was measured (bench/results/elastic.json).

utilisation_ratio   useful accelerator time, shared against split; `by_peak_per_s`: of a smaller endpoint too
wait_p95_s          from a request's arrival to its first step in an engine

Results: the section `fleet` of bench/results/elastic.json, and docs/fleet-day.svg.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]
RESULTS = REPOSITORY / "bench" / "results" / "elastic.json"
PLOT = REPOSITORY / "docs" / "fleet-day.svg"
GPU = "nvidia.com/gpu"
SERVE, TRAIN = 1000, 0
"""Priorities, in the order of the manifests' classes."""
DAY_S = 86400.0
DECISION_S = 10.0
PEAKS_PER_S = (4.5, 6.75)
"""Requests a second at the day's peak: for an endpoint that then needs half of the fleet, and for one of three quarters."""


@dataclass(frozen=True)
class Day:
    accelerators: int = 16
    slots: int = 8
    """Requests that a replica computes at once; more wait in it."""
    aim: float = 6.0
    """Requests per replica that the policy aims at."""
    service_s: float = 12.0
    """Mean time of a request in the engine; lognormal."""
    peak_per_s: float = 6.75
    night_share: float = 0.12
    """Of the peak, the traffic in the small hours."""
    adapters: int = 200
    held: int = 16
    """Adapters that a replica keeps."""
    adapter_load_s: float = 0.5
    pod_start_s: float = 10.0
    engine_start_s: float = 60.0
    leave_s: float = 5.0
    """From a preemption notice until the accelerator is free: the step ends and a checkpoint is written."""
    resize_gap_s: float = 15.0
    """A run stands still when its group changes."""
    runs: int = 4
    run_workers: int = 4
    """Training never lacks work: so many elastic runs of at most so many workers."""
    min_replicas: int = 1
    upscale_delay_s: float = 20.0
    downscale_delay_s: float = 300.0
    seed: int = 7

    def traffic(self, t: float) -> float:
        """Requests a second: a night, a morning, a dip at noon, an evening; a launch at 10:30 and a burst at 20:15."""
        hour = t / 3600 % 24
        day = math.exp(-(((hour - 11) / 2.6) ** 2)) + 0.85 * math.exp(-(((hour - 16.5) / 2.8) ** 2))
        bursts = 0.35 * (10.5 <= hour < 11.0) + 0.3 * (20.25 <= hour < 20.5)
        return self.peak_per_s * min(1.0, self.night_share + (1 - self.night_share) * min(1.0, 0.75 * day + bursts))


@dataclass
class _Replica:
    name: str
    since: float
    state: str = "waits"
    """waits, starts, runs, drains."""
    running: int = 0
    queue: deque[tuple[float, float, float]] = field(default_factory=deque)
    """Arrival, time in the engine, time to load."""
    adapters: dict[str, None] = field(default_factory=dict)
    """The least recently used first."""
    names: frozenset[str] = frozenset()

    @property
    def load(self) -> int:
        return self.running + len(self.queue)


@dataclass
class _Worker:
    name: str
    run: int
    since: float
    state: str = "waits"
    """waits, starts, runs, ending."""


class Simulation:
    def __init__(self, day: Day, fixed_replicas: int | None = None) -> None:
        """`fixed_replicas`: the endpoint's part of a static split, training has the rest; None: one fleet."""
        self.day = day
        self.fixed = fixed_replicas
        self.random = random.Random(day.seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self.replicas: list[_Replica] = []
        self.workers: list[_Worker] = []
        self.training = [0] * day.runs
        """Workers that make steps, of each run."""
        self.gap_until = [0.0] * day.runs
        self.busy = 0.0
        """Replicas' worth of requests in engines."""
        self.held: deque[tuple[str, float, float]] = deque()
        """What came while no replica ran: adapter, arrival, time in the engine."""
        self.waits: list[float] = []
        self.useful_train_s = 0.0
        self.useful_serve_s = 0.0
        self.trace: list[dict[str, float]] = []
        self.preemptions = self.loads = self.requests = 0
        self._names = [f"adapter-{i}" for i in range(day.adapters)]
        self._popularity = list(itertools.accumulate(1 / (i + 1) ** 0.9 for i in range(day.adapters)))
        """By Zipf's law."""
        self._policy_state: dict[str, Any] = {}
        self.target = fixed_replicas if fixed_replicas is not None else day.min_replicas
        self._last = 0.0

    def run(self) -> "Simulation":
        from ray.serve.config import AutoscalingConfig

        from adaptfleet.on_ray.serve.routing import RecentPrefixes

        self._recent = RecentPrefixes()
        self._delays = AutoscalingConfig(
            min_replicas=self.day.min_replicas, max_replicas=self.day.accelerators,
            upscale_delay_s=self.day.upscale_delay_s, downscale_delay_s=self.day.downscale_delay_s,
        )  # fmt: skip
        self._make_replicas()
        if self.fixed is not None:
            for replica in self.replicas:
                replica.state = "runs"
        rest = self.day.accelerators - (self.fixed or 0)
        for number in range(min(self.day.runs * self.day.run_workers, rest if self.fixed is not None else 10**9)):
            self.workers.append(_Worker(f"train-{number}", number % self.day.runs, number * 1e-6))
            if self.fixed is not None:
                self._set_state(self.workers[-1], "runs")
        self._at(self._gap(), self._arrive)
        self._at(0.0, self._decide)
        while self._events:
            at, _, act = heapq.heappop(self._events)
            if at > DAY_S:
                break
            self._account(at)
            self.now = at
            act()
        self._account(DAY_S)
        return self

    # what happens

    def _arrive(self) -> None:
        self._at(self.now + self._gap(), self._arrive)
        if self.random.random() > self.day.traffic(self.now) / self.day.peak_per_s:
            return
        adapter = self.random.choices(self._names, cum_weights=self._popularity)[0]
        sigma = 0.6
        length = self.random.lognormvariate(math.log(self.day.service_s) - sigma**2 / 2, sigma)
        self.requests += 1
        self._send(adapter, self.now, length)

    def _send(self, adapter: str, arrived: float, length: float) -> None:
        from adaptfleet.on_ray.serve import routing

        running = [replica for replica in self.replicas if replica.state == "runs"]
        if not running:
            self.held.append((adapter, arrived, length))
            return
        known = [routing.Replica(replica.name, replica.load, replica.names) for replica in running]
        chosen = routing.choose(routing.Wanted(adapter), known, self._recent)
        replica = next(replica for replica in running if replica.name == chosen.id)
        load_s = 0.0
        if adapter in replica.adapters:
            del replica.adapters[adapter]
        else:
            self.loads += 1
            load_s = self.day.adapter_load_s
            if len(replica.adapters) >= self.day.held:
                del replica.adapters[next(iter(replica.adapters))]
        replica.adapters[adapter] = None
        if load_s:
            replica.names = frozenset(replica.adapters)
        replica.queue.append((arrived, length, load_s))
        self._fill(replica)

    def _fill(self, replica: _Replica) -> None:
        while replica.queue and replica.running < self.day.slots:
            arrived, length, load_s = replica.queue.popleft()
            self._set_running(replica, replica.running + 1)
            self.waits.append(self.now + load_s - arrived)
            self._at(self.now + load_s + length, lambda: self._finish(replica))

    def _finish(self, replica: _Replica) -> None:
        self._set_running(replica, replica.running - 1)
        self._fill(replica)
        if replica.state == "drains" and not replica.load:
            self.replicas.remove(replica)
            self._share_out()

    def _decide(self) -> None:
        self._at(self.now + DECISION_S, self._decide)
        if self.fixed is None:
            self.target = self._wanted()
            self._resize()
        self.trace.append(self._seen())

    def _wanted(self) -> int:
        from ray.serve.autoscaling_policy import _apply_delay_logic

        from adaptfleet.on_ray.serve.autoscaling import Aims, Report, replicas_wanted, summary

        day = self.day
        reports = [Report(r.load, len(r.queue), 0.0, 0.0) for r in self.replicas if r.state == "runs"]
        wanted = replicas_wanted(summary(reports), len(self.held), Aims(day.aim, ttft_s=2.0))
        wanted = min(day.accelerators, max(day.min_replicas, wanted))
        target, self._policy_state = _apply_delay_logic(wanted, self.target, self._delays, self._policy_state, self.now)
        return int(target)

    def _resize(self) -> None:
        alive = [replica for replica in self.replicas if replica.state != "drains"]
        for replica in sorted(alive, key=lambda r: (r.state == "runs", r.load))[: max(0, len(alive) - self.target)]:
            replica.state = "drains"
            waiting, replica.queue = replica.queue, deque()
            if not replica.running:
                self.replicas.remove(replica)
            for arrived, length, _ in waiting:
                self._send("moved", arrived, length)
        self._make_replicas()
        self._share_out()

    def _make_replicas(self) -> None:
        while sum(replica.state != "drains" for replica in self.replicas) < self.target:
            self._number += 1
            self.replicas.append(_Replica(f"serve-{self._number}", self.now))

    def _share_out(self) -> None:
        """Accelerators to pods, as the dev cluster's scheduler and kube-scheduler do."""
        from adaptfleet.on_ray.kuberay.fleet import Claim, schedule

        if self.fixed is not None:
            return
        claims = [Claim(r.name, SERVE, {GPU: 1}, r.since, is_running=r.state != "waits") for r in self.replicas]
        claims += [Claim(w.name, TRAIN, {GPU: 1}, w.since, w.state in ("starts", "runs"), w.state == "ending") for w in self.workers]
        plan = schedule({GPU: self.day.accelerators}, claims)
        for replica in self.replicas:
            if replica.name in plan.start:
                replica.state = "starts"
                self._at(self.now + self.day.pod_start_s + self.day.engine_start_s, lambda r=replica: self._ready(r))
        for worker in self.workers:
            if worker.name in plan.preempt:
                self.preemptions += 1
                self._set_state(worker, "ending")
                self._at(self.now + self.day.leave_s, lambda w=worker: self._left(w))
            elif worker.name in plan.start:
                self._set_state(worker, "starts")
                worker.since = self.now
                self._at(self.now + self.day.pod_start_s, lambda w=worker: self._joined(w))

    def _ready(self, replica: _Replica) -> None:
        if replica.state != "starts":
            return
        replica.state = "runs"
        while self.held:
            self._send(*self.held.popleft())

    def _left(self, worker: _Worker) -> None:
        self._set_state(worker, "waits")
        worker.since = self.now
        self._stand_still(worker.run)
        self._share_out()

    def _joined(self, worker: _Worker) -> None:
        if worker.state == "starts":
            self._set_state(worker, "runs")
            self._stand_still(worker.run)

    def _stand_still(self, run: int) -> None:
        self.gap_until[run] = self.now + self.day.resize_gap_s

    # what is counted

    def _account(self, until: float) -> None:
        """Useful: a worker of a run that makes steps; a replica as far as it has the requests that it should have."""
        span = until - self._last
        if span > 0:
            for run, number in enumerate(self.training):
                self.useful_train_s += number * max(0.0, until - max(self._last, self.gap_until[run]))
            self.useful_serve_s += span * self.busy
            self._last = until

    def _set_running(self, replica: _Replica, number: int) -> None:
        self.busy += min(1.0, number / self.day.aim) - min(1.0, replica.running / self.day.aim)
        replica.running = number

    def _set_state(self, worker: _Worker, state: str) -> None:
        """A worker that has its notice still ends its step."""
        steps = ("runs", "ending")
        self.training[worker.run] += (state in steps) - (worker.state in steps)
        worker.state = state

    def _seen(self) -> dict[str, float]:
        serving = sum(replica.state in ("starts", "runs", "drains") for replica in self.replicas)
        training = sum(worker.state in ("starts", "runs", "ending") for worker in self.workers)
        return {"at": self.now, "traffic": self.day.traffic(self.now), "serving": serving, "training": training}

    def _gap(self) -> float:
        """Arrivals at the peak's rate, thinned to the moment's."""
        return self.random.expovariate(self.day.peak_per_s)

    def _at(self, time: float, act: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, act))

    def outcome(self) -> dict[str, Any]:
        whole = self.day.accelerators * DAY_S
        centiles = statistics.quantiles(self.waits, n=100)
        return {
            "utilisation": round((self.useful_train_s + self.useful_serve_s) / whole, 3),
            "training_share": round(self.useful_train_s / whole, 3),
            "serving_share": round(self.useful_serve_s / whole, 3),
            "wait_p50_s": round(centiles[49], 2),
            "wait_p95_s": round(centiles[94], 2),
            "wait_p99_s": round(centiles[98], 2),
            "requests": self.requests,
            "adapter_loads": self.loads,
            "preemptions": self.preemptions,
            "replicas_most": max(int(seen["serving"]) for seen in self.trace),
        }


def measured(day: dict[str, Any]) -> dict[str, Any]:
    """What the benchmarks found, in place of the assumptions."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pools = results.get("pools", {})
    known = {
        "pod_start_s": pools.get("scale_up_s"),
        "leave_s": pools.get("spot_gap_notice_s"),
        "resize_gap_s": results.get("resize_gap_s"),
    }
    return day | {key: value for key, value in known.items() if value is not None}


def compare(day: Day) -> tuple[dict[str, Any], Simulation, Simulation]:
    shared = Simulation(day).run()
    goal = shared.outcome()["wait_p95_s"]
    tried: dict[int, Simulation] = {}

    def waits_longer(size: int) -> bool:
        tried[size] = Simulation(day, fixed_replicas=size).run()
        print(f"split {size}: {tried[size].outcome()}", flush=True)
        return bool(tried[size].outcome()["wait_p95_s"] > goal)

    # More replicas never let requests wait longer: the smallest part that is enough is found by halving.
    low, high = 1, day.accelerators
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if waits_longer(middle) else (low, middle)
    assert not waits_longer(low), "no split keeps the requests from waiting longer"
    split = tried[low]
    found = {
        "utilisation_ratio": round(shared.outcome()["utilisation"] / split.outcome()["utilisation"], 2),
        "shared": shared.outcome(),
        "split": {"replicas": split.fixed, **split.outcome()},
        "day": asdict(day),
    }
    return found, shared, split


def plot(found: dict[str, Any], shared: Simulation, split: Simulation) -> str:
    """Two areas over the day, the traffic above them."""
    width, height, left, gap = 760, 170, 60, 34
    total, peak = shared.day.accelerators, shared.day.peak_per_s

    def place(seen: dict[str, float], value: float, most: float, top: float) -> str:
        return f"{left + seen['at'] / DAY_S * (width - left - 20):.1f},{top + height - value / most * height:.1f}"

    def area(points: list[dict[str, float]], low: str | None, high: str, colour: str, top: float) -> str:
        upper = [place(p, p[high] + (p[low] if low else 0), total, top) for p in points]
        lower = [place(p, p[low] if low else 0, total, top) for p in reversed(points)]
        return f'<polygon fill="{colour}" points="{" ".join(upper + lower)}"/>'

    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for number, (title, sim) in enumerate(
        (
            ("one fleet: training has what the endpoint does not need", shared),
            (f"split: {split.fixed} for the endpoint, {total - (split.fixed or 0)} for training", split),
        )
    ):
        top, points = 30 + number * (height + gap + 24), sim.trace[::6]
        outcome = sim.outcome()
        caption = f"{title} · {outcome['utilisation']:.0%} useful, 95 of 100 requests wait under {outcome['wait_p95_s']} s"
        parts.append(f'<text x="{left}" y="{top - 8}">{caption}</text>')
        parts += [area(points, None, "serving", "#4878a8", top), area(points, "serving", "training", "#c9b26a", top)]
        line = " ".join(place(p, p["traffic"], peak * 1.05, top) for p in points)
        parts.append(f'<polyline fill="none" stroke="#111" stroke-width="1.2" points="{line}"/>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width - left - 20}" height="{height}" fill="none" stroke="#888"/>')
        parts += [f'<text x="{left - 8}" y="{top + 4}" text-anchor="end">{total}</text>']
        parts += [f'<text x="{left - 8}" y="{top + height}" text-anchor="end">0</text>']
        for hour in range(0, 25, 4):
            x = left + hour / 24 * (width - left - 20)
            parts.append(f'<text x="{x:.0f}" y="{top + height + 14}" text-anchor="middle">{hour:02}:00</text>')
    bottom = 30 + 2 * (height + gap + 24) - 8
    parts.append(
        f'<text x="{left}" y="{bottom}"><tspan fill="#4878a8">■</tspan> endpoint <tspan fill="#c9b26a">■</tspan> training '
        f"— accelerators; line: requests a second, up to {peak:g}</text>"
    )
    size = f'viewBox="0 0 {width} {bottom + 14}" width="{width}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">{"".join(parts)}</svg>\n'


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    ratios = {}
    for peak in PEAKS_PER_S:
        found, shared, split = compare(Day(**measured({"peak_per_s": peak})))
        ratios[str(peak)] = {"split_replicas": split.fixed, "utilisation_ratio": found["utilisation_ratio"]}
    found["by_peak_per_s"] = ratios
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["fleet"] = found
    unfinished = RESULTS.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(RESULTS)
    PLOT.write_text(plot(found, shared, split), encoding="utf-8")
    print(json.dumps(found, indent=1))
    print(f"written: {RESULTS.relative_to(REPOSITORY)}, {PLOT.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
