"""Whose turn it is: never more adapters than slots, nobody starves, what waits together goes together, who leaves frees the place."""

import asyncio
import random
from collections import Counter

from adaptfleet.on_ray.serve.slots import Slots


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_never_more_adapters_than_slots_and_everybody_is_served() -> None:
    async def main() -> None:
        slots = Slots(3, turn_s=0.005)
        inside: Counter[str] = Counter()
        served: Counter[str] = Counter()
        chance = random.Random(1)

        async def request(adapter: str) -> None:
            async with slots.of(adapter):
                inside[adapter] += 1
                assert sum(1 for count in inside.values() if count) <= 3
                await asyncio.sleep(chance.random() * 0.003)
                inside[adapter] -= 1
            served[adapter] += 1

        names = [f"a{min(int(chance.paretovariate(0.7)), 40)}" for _ in range(600)]
        tasks = []
        for name in names:
            tasks.append(asyncio.create_task(request(name)))
            if chance.random() < 0.1:
                tasks[chance.randrange(len(tasks))].cancel()
            await asyncio.sleep(chance.random() * 0.002)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert not [result for result in results if isinstance(result, AssertionError)]
        cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
        assert served.total() == len(names) - cancelled
        assert slots.num_waiting == 0
        assert not slots._turns

    asyncio.run(main())


def test_an_endless_adapter_yields_after_its_turn() -> None:
    async def main() -> None:
        clock = _Clock()
        slots = Slots(1, turn_s=2.0, clock=clock)
        order: list[str] = []
        release = asyncio.Event()

        async def request(name: str, adapter: str) -> None:
            async with slots.of(adapter):
                order.append(name)
                await release.wait()

        tasks = [asyncio.create_task(request("hot-1", "hot"))]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(request("cold-1", "cold")))
        await asyncio.sleep(0)
        clock.now = 1.0
        tasks.append(asyncio.create_task(request("hot-2", "hot")))
        await asyncio.sleep(0)
        assert order == ["hot-1", "hot-2"], "within its turn an adapter's requests join it"
        clock.now = 3.0
        tasks.append(asyncio.create_task(request("hot-3", "hot")))
        tasks.append(asyncio.create_task(request("cold-2", "cold")))
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*tasks)
        assert order == ["hot-1", "hot-2", "cold-1", "cold-2", "hot-3"]

    asyncio.run(main())
