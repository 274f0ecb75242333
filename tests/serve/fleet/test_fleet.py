"""Two replicas: where requests go, and what clients see when engines die, hang, and when replicas come and go."""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable

import httpx
import psutil
import pytest

from adaptfleet.on_ray.cluster.processes import members
from tests.serve.endpoint.conftest import Endpoint
from tests.serve.fleet.conftest import ADAPTERS, Outcome, ask, await_replicas, client_of, engine_pids

pytestmark = pytest.mark.slow

LONG, SHORT = 700, 40


def test_listens_on_loopback_only(fleet: Endpoint) -> None:
    """HAProxy, its statistics, the router and the replicas. Not the engine's own process: torch's store listens everywhere."""
    record = fleet.cluster._record
    listening: dict[str, str] = {}
    for process in members(record.leader, record.marker):
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            name = " ".join(found.cmdline())[:60]
            listening |= {f"{at.laddr}": name for at in found.net_connections("inet") if at.status == psutil.CONN_LISTEN}
    assert len(listening) > 10
    open_ = {at: name for at, name in listening.items() if "127.0.0.1" not in at and "'::1'" not in at and "VLLM" not in name}
    assert not open_, open_


def test_an_adapters_requests_go_where_it_is_loaded(fleet: Endpoint) -> None:
    async def main() -> dict[str, set[str]]:
        async with client_of(fleet) as client:
            homes: dict[str, set[str]] = {}
            for _ in range(4):
                for name in ADAPTERS:
                    outcome = await ask(client, Outcome(), name, "Where? ", 4)
                    assert outcome.finished, outcome
                    homes.setdefault(name, set()).add(outcome.replica)
            return homes

    homes = asyncio.run(main())
    assert all(len(replicas) == 1 for replicas in homes.values()), homes
    assert len(set.union(*homes.values())) == 2, "each replica has some"


def test_a_hot_adapter_is_served_by_both(fleet: Endpoint) -> None:
    async def main() -> Counter[str]:
        async with client_of(fleet) as client:
            outcomes = await asyncio.gather(*(ask(client, Outcome(), ADAPTERS[1], f"{i} ", 60) for i in range(40)))
        assert all(outcome.finished for outcome in outcomes), outcomes
        return Counter(outcome.replica for outcome in outcomes)

    shares = asyncio.run(main())
    assert len(shares) == 2, shares
    assert max(shares.values()) <= 30, shares


def _answers(fleet: Endpoint, prompts: list[str], num_tokens: int) -> dict[str, str]:
    async def main() -> dict[str, str]:
        async with client_of(fleet) as client:
            outcomes = await asyncio.gather(*(ask(client, Outcome(), "tiny", prompt, num_tokens) for prompt in prompts))
        assert all(outcome.finished for outcome in outcomes)
        return {prompt: outcome.text for prompt, outcome in zip(prompts, outcomes, strict=True)}

    return asyncio.run(main())


async def _struck(fleet: Endpoint, prompts: list[str], strike: Callable[[int], None]) -> list[Outcome]:
    """Eight long answers, four of them on each engine, and more requests waiting behind them, when one engine is struck."""
    async with client_of(fleet) as client:
        outcomes = [Outcome() for _ in prompts]
        tasks = [asyncio.create_task(ask(client, outcome, "tiny", prompt, LONG)) for outcome, prompt in zip(outcomes, prompts, strict=True)]
        await asyncio.gather(*(outcome.began.wait() for outcome in outcomes[:6]))
        strike(engine_pids(fleet)[0])
        after = await asyncio.gather(*(ask(client, Outcome(), "tiny", "After. ", SHORT) for _ in range(4)))
        await asyncio.gather(*tasks)
    assert all(outcome.finished and not outcome.error for outcome in after), after
    return outcomes


def _check(outcomes: list[Outcome], prompts: list[str], expected: dict[str, str]) -> None:
    for outcome, prompt in zip(outcomes, prompts, strict=True):
        assert outcome.status == 200, outcome
        assert not outcome.broken, outcome
        if outcome.finished:
            assert outcome.text == expected[prompt], "retried or not, an answer is the whole answer"
        else:
            assert outcome.text, f"a request without a token is answered elsewhere: {outcome}"
            assert outcome.error, "an answer that breaks off says so"
            assert expected[prompt].startswith(outcome.text)
    lost = [outcome for outcome in outcomes if not outcome.finished]
    assert lost, "nothing was struck"
    assert len(lost) <= 4, "at most what one engine was answering"


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_an_engine_is_struck(fleet: Endpoint, blow: signal.Signals) -> None:
    """Hung: it is alive and its socket open, only nothing comes. The replica sees that its requests get nowhere."""
    await_replicas(fleet, 2)
    prompts = [f"Tell me of number {i}: " for i in range(16)]
    expected = _answers(fleet, prompts, LONG)
    outcomes = asyncio.run(_struck(fleet, prompts, lambda pid: os.kill(pid, blow)))
    _check(outcomes, prompts, expected)
    await_replicas(fleet, 2)


def test_replicas_come_and_go_under_load(fleet: Endpoint) -> None:
    """2 -> 1 -> 2, and a rolling update to other settings: no request fails, no stream breaks. The new settings hold: what is too much is
    sent away at once, and what was accepted is answered."""
    from adaptfleet.on_ray.serve.deploy import deploy

    await_replicas(fleet, 2)
    port = int(httpx.URL(fleet.url).port or 0)

    async def main() -> tuple[list[Outcome], list[set[str]]]:
        outcomes: list[Outcome] = []
        stop = asyncio.Event()

        async def load(client: httpx.AsyncClient, number: int) -> None:
            while not stop.is_set():
                outcomes.append(await ask(client, Outcome(), ["tiny", *ADAPTERS][number], f"{len(outcomes)} ", 120))

        async with client_of(fleet) as client:
            tasks = [asyncio.create_task(load(client, number)) for number in range(3)]
            seen = []
            for change in ({"replicas": 1}, {"replicas": 2}, {"replicas": 2, "max_num_seqs": 3, "max_waiting": 2}):
                before = len(outcomes)
                await asyncio.to_thread(deploy, fleet.spec.model_copy(update=change), port=port)
                await asyncio.to_thread(_await_count, change["replicas"])
                while len(outcomes) < before + 10:
                    await asyncio.sleep(0.1)
                seen.append({outcome.replica for outcome in outcomes})
            stop.set()
            await asyncio.gather(*tasks)
            flood = await asyncio.gather(*(ask(client, Outcome(), "tiny", f"{i} ", 60) for i in range(40)))
            calm = await ask(client, Outcome(), "tiny", "Calm. ", 8)
        sent_away = [outcome for outcome in flood if outcome.status == 503]
        assert sent_away, "10 may be there at once, 40 came"
        assert all("overloaded" in outcome.error for outcome in sent_away), sent_away[:3]
        assert all(outcome.finished for outcome in [*flood, calm] if outcome.status == 200)
        assert {outcome.status for outcome in [*flood, calm]} == {200, 503}
        assert len(flood) - len(sent_away) >= 6
        return outcomes, seen

    outcomes, seen = asyncio.run(main())
    failed = [outcome for outcome in outcomes if not outcome.finished or outcome.broken or outcome.error]
    assert not failed, failed[:3]
    assert len(seen[-1]) >= 4, "the update replaced both"


def test_a_request_to_nobody_is_held_until_a_replica_has_started(fleet: Endpoint) -> None:
    from adaptfleet.contracts.serving import ReplicaRange
    from adaptfleet.on_ray.serve.deploy import deploy

    resting = ReplicaRange(min=0, max=1, upscale_delay_s=0, downscale_delay_s=1)
    deploy(fleet.spec.model_copy(update={"replicas": resting}), port=int(httpx.URL(fleet.url).port or 0))
    _await_count(0)

    async def main() -> list[Outcome]:
        async with client_of(fleet) as client:
            return list(await asyncio.gather(*(ask(client, Outcome(), model, "Anybody? ", 8) for model in ("tiny", ADAPTERS[0]))))

    for outcome in asyncio.run(main()):
        assert outcome.finished, outcome
        assert not outcome.error, outcome


def _await_count(count: int) -> None:
    import time

    from ray import serve
    from ray.serve.schema import ReplicaState

    until = time.monotonic() + 300
    while time.monotonic() < until:
        application = serve.status().applications["adaptfleet"]
        replicas = application.deployments["endpoint"].replica_states
        if application.status == "RUNNING" and replicas == ({ReplicaState.RUNNING: count} if count else {}):
            return
        time.sleep(0.2)
    raise AssertionError(f"{replicas} instead of {count}")
