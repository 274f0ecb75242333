"""A day of an endpoint of any size in seconds: the real scaling policy over a model of a replica that measurements are fitted to.

A replica takes `fixed_s + per_sequence_s * n` for a step of n sequences, each of which gets one token. Requests go where fewest are, as the
router's bounded loads come to; what finds no sequence free waits. Ticks of a second; counts are whole requests, drawn at random.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptfleet.on_ray.serve.autoscaling import Aims, Fleet, replicas_wanted

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TICK_S = 1.0
_CONTROL_S = 5


@dataclass(frozen=True, slots=True)
class ReplicaModel:
    fixed_s: float
    per_sequence_s: float
    first_token_s: float
    """Of a request that does not wait."""
    start_s: float
    """From the decision until it serves."""
    max_num_seqs: int

    def step_s(self, sequences: Floats | Ints) -> Floats:
        return np.asarray(self.fixed_s + self.per_sequence_s * sequences, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Bounds:
    min: int
    max: int
    upscale_delay_s: float
    downscale_delay_s: float


@dataclass(frozen=True, slots=True)
class Day:
    """What came out."""

    requests: int
    replica_hours: float
    most_replicas: int
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    late_share: float
    """Of requests, those whose first token took longer than the aim."""


def fit(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """`fixed_s` and `per_sequence_s` from measured (sequences, seconds of a step), by least squares; neither below zero."""
    sequences, seconds = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    if len(points) == 1:
        return float(seconds[0]), 0.0
    slope = max(0.0, float(np.polyfit(sequences, seconds, 1)[0]))
    return max(0.0, float((seconds - slope * sequences).mean())), slope


def simulate(
    rates: Floats,
    tokens_per_request: float,
    model: ReplicaModel,
    bounds: Bounds,
    aims: Aims,
    seed: int = 0,
    first_replicas: int | None = None,
) -> Day:
    """`rates`: requests per second, one for each tick."""
    chance = np.random.default_rng(seed)
    start = bounds.min if first_replicas is None else first_replicas
    running, waiting = np.zeros(start, dtype=np.int64), np.zeros(start, dtype=np.int64)
    starting: list[tuple[int, int]] = []
    held = 0
    above_since: int | None = None
    below_since: int | None = None
    ttfts: list[Floats] = []
    weights: list[Ints] = []
    replica_s, most, total = 0.0, start, 0
    for tick, rate in enumerate(rates):
        ready = sum(count for at, count in starting if at <= tick)
        starting = [(at, count) for at, count in starting if at > tick]
        if ready:
            running, waiting = (np.concatenate([one, np.zeros(ready, dtype=np.int64)]) for one in (running, waiting))
        arrived = int(chance.poisson(rate * TICK_S))
        total += arrived
        come = arrived + held
        if len(running):
            held = 0
            shares = _least_first(running + waiting, come)
            steps = model.step_s(np.maximum(running, 1))
            per_request_s = steps * tokens_per_request
            # Who comes to a full replica waits until as many as stand before him have left it.
            queue = np.maximum(running + waiting + shares - model.max_num_seqs, 0)
            ttft = model.first_token_s + queue * per_request_s / model.max_num_seqs
            ttfts.append(ttft[shares > 0])
            weights.append(shares[shares > 0])
            waiting += shares
            begun = np.minimum(waiting, model.max_num_seqs - running)
            running, waiting = running + begun, waiting - begun
            ended = chance.binomial(running, np.minimum(1.0, TICK_S / (model.step_s(np.maximum(running, 1)) * tokens_per_request)))
            running -= ended
            slowest = np.sort(ttft)[len(ttft) // 2 :].mean()
            fleet = Fleet(len(running), float((running + waiting).sum()), float(waiting.sum()), float(slowest), 0.0)
        else:
            held = come
            fleet = Fleet(0, 0.0, 0.0, 0.0, 0.0)
        coming = sum(count for _, count in starting)
        replica_s += (len(running) + coming) * TICK_S
        if tick % _CONTROL_S == 0:
            target = len(running) + coming
            wanted = min(max(replicas_wanted(fleet, held, aims), bounds.min), bounds.max)
            above_since = (tick if above_since is None else above_since) if wanted > target else None
            below_since = (tick if below_since is None else below_since) if wanted < target else None
            if above_since is not None and (tick - above_since >= bounds.upscale_delay_s or not target):
                starting.append((tick + round(model.start_s), wanted - target))
                above_since = None
            elif below_since is not None and tick - below_since >= bounds.downscale_delay_s and len(running):
                running, waiting, back = _without(running, waiting, min(target - wanted, len(running)))
                held += back
                below_since = None
        most = max(most, len(running))
    times, counts = np.concatenate(ttfts), np.concatenate(weights)
    late = float(counts[times > aims.ttft_s].sum() / counts.sum())
    p50, p95, p99 = (_percentile(times, counts, share) for share in (0.5, 0.95, 0.99))
    return Day(total, replica_s / 3600, most, p50, p95, p99, late)


def _least_first(loads: Ints, count: int) -> Ints:
    """How many of `count` each gets when every one goes where fewest are."""
    order = np.argsort(loads, kind="stable")
    level = loads[order]
    # room[i]: what it takes to raise the first i+1 to the level of the next
    room = np.arange(1, len(level)) * np.diff(level)
    filled = int(np.searchsorted(np.cumsum(room), count, side="right")) + 1
    among = order[:filled]
    left = count - int((level[filled - 1] - level[:filled]).sum())
    shares = np.zeros(len(loads), dtype=np.int64)
    shares[among] = level[filled - 1] - level[:filled] + left // filled
    shares[among[: left % filled]] += 1
    return shares


def _without(running: Ints, waiting: Ints, count: int) -> tuple[Ints, Ints, int]:
    """The emptiest leave when they have finished, which is soon; what waits at them goes to others."""
    order = np.argsort(running + waiting, kind="stable")
    stay = np.sort(order[count:])
    return running[stay], waiting[stay], int(waiting[order[:count]].sum())


def _percentile(values: Floats, counts: Ints, share: float) -> float:
    order = np.argsort(values)
    reached = np.searchsorted(np.cumsum(counts[order]), share * counts.sum())
    return float(values[order][min(int(reached), len(values) - 1)])
