"""Two replicas: where requests go, and what clients see when engines die and hang."""

import asyncio
import contextlib
import os
import signal
from collections import Counter

import httpx
import psutil
import pytest

from adaptfleet.on_ray.cluster.processes import members
from tests.serve.endpoint.conftest import Endpoint
from tests.serve.fleet.conftest import ADAPTERS, Outcome, ask, await_replicas, client_of, engine_pids

pytestmark = pytest.mark.slow

LONG, SHORT = 700, 40


def test_haproxy_listens_on_loopback_only(fleet: Endpoint) -> None:
    """Its statistics and metrics too, which Serve opens to every interface."""
    record = fleet.cluster._record
    listening = []
    for process in members(record.leader, record.marker):
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            if found.name() == "haproxy":
                listening += [at.laddr.ip for at in found.net_connections("inet") if at.status == psutil.CONN_LISTEN]
    assert len(listening) >= 3
    assert set(listening) == {"127.0.0.1"}


def test_an_adapters_requests_go_where_it_is_loaded(fleet: Endpoint) -> None:
    async def main() -> dict[str, set[str]]:
        async with client_of(fleet) as client:
            homes: dict[str, set[str]] = {}
            for _ in range(4):
                for name in ADAPTERS:
                    outcome = await ask(client, Outcome(), name, "Where? ", 4)
                    assert outcome.finished, outcome
                    homes.setdefault(name, set()).add(outcome.replica)
                    await asyncio.sleep(0.25)  # requests in quick succession may spread: until the next report they count as load
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


async def _held(outcomes: list[Outcome], victim: int) -> None:
    """Until the victim, stopped for as long as one looks, holds an answer that its client has the beginning of. A client can be behind by a
    whole answer where engines and clients share two cores: that it reads an answer does not show that one is being made."""
    while True:
        await asyncio.sleep(0.005)
        if len({outcome.replica for outcome in outcomes if outcome.text and not outcome.finished}) < 2:
            continue
        os.kill(victim, signal.SIGSTOP)
        await asyncio.sleep(0.5)  # what was on its way arrives
        before = [len(outcome.text) for outcome in outcomes]
        await asyncio.sleep(0.5)
        if any(length and length == len(outcome.text) and not outcome.finished for length, outcome in zip(before, outcomes, strict=True)):
            return
        os.kill(victim, signal.SIGCONT)


async def _struck(fleet: Endpoint, prompts: list[str], blow: signal.Signals) -> list[Outcome]:
    """Eight long answers, four of them on each engine, and more requests waiting behind them, when one engine is struck."""
    victim = engine_pids(fleet)[0]  # to be found before: in the time that it takes an engine gives a whole answer
    async with client_of(fleet) as client:
        outcomes = [Outcome() for _ in prompts]
        tasks = [asyncio.create_task(ask(client, outcome, "tiny", prompt, LONG)) for outcome, prompt in zip(outcomes, prompts, strict=True)]
        async with asyncio.timeout(60):
            await _held(outcomes, victim)
        os.kill(victim, blow)  # stopped already; where the wait ran out it stays so, and the replica replaces it
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
    prompts = [f"Tell me of number {i}: " for i in range(24)]
    expected = _answers(fleet, prompts, LONG)
    outcomes = asyncio.run(_struck(fleet, prompts, blow))
    _check(outcomes, prompts, expected)
    await_replicas(fleet, 2)
    scraped = httpx.get(f"http://127.0.0.1:{fleet.spec.metrics_port}/metrics", headers={"Authorization": f"Bearer {fleet.key}"})
    assert scraped.status_code == 200, "whichever replica had the port"
