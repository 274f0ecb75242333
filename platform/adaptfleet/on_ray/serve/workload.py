"""What a replica is doing now: its requests, its engine's queue and cache, and when the engine last got on with them.

The engine's numbers come with each of its steps, through vLLM's hook for statistics (`stat_loggers`), so that nothing polls it.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RECENT_S = 10.0
_WEIGHT = 0.1
"""Of the latest request in the moving mean of how long requests stay."""


@dataclass(frozen=True, slots=True)
class Pressure:
    """What scaling goes by."""

    requests: int
    waiting: int
    """Of them, those the engine has not begun."""
    kv_usage: float
    """Share of the KV cache in use."""
    ttft_s: float
    """The worst of nine in ten times to first token of the last ten seconds; 0: there was none."""


class Workload:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress_at = clock()
        self._running = self._waiting = 0
        self._kv_usage = 0.0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=512)
        self.requests = 0
        """Requests in the door."""
        self.stay_s = 0.0
        """How long a request is in the engine, a moving mean; 0: none has left it."""

    def stalled_s(self) -> float:
        """Since the engine's last step. Means something only while it has requests."""
        return self._clock() - self._progress_at

    def began_after_idling(self) -> None:
        """The engine had nothing to do: its silence until now was none."""
        self._progress_at = self._clock()

    def pressure(self) -> Pressure:
        since = self._clock() - RECENT_S
        recent = sorted(seconds for at, seconds in self._first_tokens if at >= since)
        return Pressure(self.requests, self._waiting, self._kv_usage, recent[int(0.9 * len(recent))] if recent else 0.0)

    # vLLM's StatLoggerBase

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        now = self._progress_at = self._clock()
        if scheduler_stats is not None:
            self._running, self._waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self._kv_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self._first_tokens.extend((now, seconds) for seconds in iteration_stats.time_to_first_tokens_iter)
            for finished in iteration_stats.finished_requests:
                self.stay_s += (_WEIGHT if self.stay_s else 1.0) * (finished.e2e_latency - self.stay_s)

    def log_engine_initialized(self) -> None:
        self._progress_at = self._clock()

    def log(self) -> None:
        return

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        return
