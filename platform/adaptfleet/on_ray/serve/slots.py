"""Whose turn it is when more adapters are asked for than the engine has slots.

Without this, each request to an adapter that is not in a slot throws another's weights out, which the next step of the engine needs back.
Here at most as many adapters as there are slots have requests in the engine. One whose requests never cease keeps its slot for `turn_s`
once others wait; then its next requests wait behind them. All that waits for an adapter is let in together.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Turn:
    since: float
    requests: int


class Slots:
    def __init__(self, count: int, turn_s: float = 2.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._turn_s = turn_s
        self._clock = clock
        self._turns: dict[str, _Turn] = {}
        self._waiting: OrderedDict[str, list[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Requests, not adapters."""
        return sum(len(requests) for requests in self._waiting.values())

    @asynccontextmanager
    async def of(self, adapter: str) -> AsyncIterator[None]:
        """Waits for the adapter's turn; its requests may be in the engine inside the block."""
        if not self._enter(adapter):
            admitted = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(adapter, []).append(admitted)
            try:
                await admitted
            except BaseException:
                self._give_up(adapter, admitted)
                raise
        try:
            yield
        finally:
            self._leave(adapter)

    def _enter(self, adapter: str) -> bool:
        turn = self._turns.get(adapter)
        if turn is None:
            if self._waiting or len(self._turns) >= self._count:
                return False
            self._turns[adapter] = _Turn(self._clock(), 1)
            return True
        if self._waiting and self._clock() - turn.since >= self._turn_s:
            return False
        turn.requests += 1
        return True

    def _leave(self, adapter: str) -> None:
        turn = self._turns[adapter]
        turn.requests -= 1
        if not turn.requests:
            del self._turns[adapter]
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            adapter = next((name for name in self._waiting if name not in self._turns), None)
            if adapter is None:
                adapter = next(iter(self._waiting))  # its turn is over, but nobody else waits any more
            elif len(self._turns) >= self._count:
                return
            requests = self._waiting.pop(adapter)
            going = self._turns.get(adapter)
            self._turns[adapter] = _Turn(self._clock(), len(requests) + (going.requests if going else 0))
            for request in requests:
                if not request.done():
                    request.set_result(None)

    def _give_up(self, adapter: str, admitted: "asyncio.Future[None]") -> None:
        if admitted.done() and not admitted.cancelled():
            self._leave(adapter)  # its turn came in the same moment
            return
        left = self._waiting.get(adapter, [])
        if admitted in left:
            left.remove(admitted)
            if not left:
                self._waiting.pop(adapter, None)
        self._admit()
