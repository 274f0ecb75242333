"""What the gateway makes of the replicas' answers: real HTTP on both sides, with a few lines in the place of each replica."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from adaptfleet.on_ray.serve.bases import ServedBase
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.gateway import Forwarding
from adaptfleet.on_ray.serve.policy_file import PolicyFile
from adaptfleet.on_ray.serve.routing import Wanted
from adaptfleet.on_ray.serve.tenancy import Tenancy
from adaptfleet.store.registry import Registry

BASES = (ServedBase("first", "1" * 64), ServedBase("second", "2" * 64))
Replica = Callable[[Any, bytes, Any], Awaitable[None]]


class Placed:
    """The replicas of one base, taken in turn; those that failed a request are left out as the routing policy leaves them out."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked: list[Wanted] = []

    async def find(self, wanted: Wanted) -> tuple[str, str]:
        self.asked.append(wanted)
        address = next((address for address in self.addresses if address not in wanted.avoided), self.addresses[0])
        return address, address


class Awake:
    base_ids = ("second",)

    async def now(self) -> list[str]:
        return list(self.base_ids)


async def _answer(send: Any, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]})
    await send({"type": "http.response.body", "body": body})


async def well(scope: Any, body: bytes, send: Any) -> None:
    """Says what came."""
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    told = {"path": scope["path"], "query": scope["query_string"].decode(), "body": body.decode(), "headers": headers}
    await _answer(send, 200, json.dumps(told).encode())


async def dead(_: Any, __: bytes, send: Any) -> None:
    await _answer(send, 502, b"{}")


async def breaking(_: Any, __: bytes, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b"data: one\n\n", "more_body": True})
    raise ConnectionError("the process is gone")


@asynccontextmanager
async def _served(application: Any) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield "{}:{}".format(*server.servers[0].sockets[0].getsockname())
    server.should_exit = True
    await serving


def _replica(handler: Replica) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        await handler(scope, body, send)

    return application


@asynccontextmanager
async def _gateway(first: list[Replica], second: list[Replica]) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Placed]]]:
    placed = {"first": Placed(), "second": Placed()}
    catalog = Catalog(Registry.open(), BASES[0], BASES)
    forwarding = Forwarding(catalog, Tenancy(None, PolicyFile(), 1), placed, Awake(), False, 10_000, 20_000)  # type: ignore[arg-type]
    async with _nested([*first, *second]) as addresses, _served(forwarding) as address:
        placed["first"].addresses, placed["second"].addresses = addresses[: len(first)], addresses[len(first) :]
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=30) as client:
            yield client, placed
    assert forwarding._session is not None
    await forwarding._session.close()


@asynccontextmanager
async def _nested(replicas: list[Replica]) -> AsyncIterator[list[str]]:
    if not replicas:
        yield []
        return
    async with _served(_replica(replicas[0])) as address, _nested(replicas[1:]) as others:
        yield [address, *others]


def _run(first: list[Replica], second: list[Replica], ask: Callable[[httpx.AsyncClient, dict[str, Placed]], Awaitable[None]]) -> None:
    async def main() -> None:
        async with _gateway(first, second) as (client, placed):
            await ask(client, placed)

    asyncio.run(main())


def test_a_request_arrives_as_it_was_sent(fresh_home: Path) -> None:
    async def ask(client: httpx.AsyncClient, placed: dict[str, Placed]) -> None:
        body = '{ "model": "second", "prompt": "ü" }'.encode()
        reply = await client.post("/v1/completions?x=%2F1", content=body, headers={"Authorization": "Bearer k", "X-Mine": "a"})
        told = reply.json()
        assert (told["path"], told["query"], told["body"]) == ("/v1/completions", "x=%2F1", body.decode())
        assert (told["headers"]["authorization"], told["headers"]["x-mine"]) == ("Bearer k", "a")
        assert len(told["headers"]["x-request-id"]) == 32
        assert not placed["first"].asked

    _run([dead], [well], ask)


def test_what_goes_by_no_model_goes_to_a_base_that_is_awake_or_to_the_one_named(fresh_home: Path) -> None:
    async def ask(client: httpx.AsyncClient, placed: dict[str, Placed]) -> None:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/v1/completions", content=b"no json")).json()["body"] == "no json"
        assert (len(placed["first"].asked), len(placed["second"].asked)) == (0, 2)
        assert (await client.get("/metrics?base=first")).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        assert (len(placed["first"].asked), len(placed["second"].asked)) == (2, 2)
        assert (await client.post("/v1/completions", content=b"x" * 10_001)).status_code == 413
        assert (await client.post("/v1/files", content=b"x" * 10_001)).status_code == 200

    _run([well], [well], ask)


def test_a_request_without_a_token_is_answered_by_another_replica(fresh_home: Path) -> None:
    async def ask(client: httpx.AsyncClient, placed: dict[str, Placed]) -> None:
        reply = await client.post("/v1/completions", json={"model": "first"})
        assert (reply.status_code, json.loads(reply.json()["body"])) == (200, {"model": "first"})
        assert [len(wanted.avoided) for wanted in placed["first"].asked] == [0, 1, 2]

        placed["first"].addresses = ["127.0.0.1:9", placed["first"].addresses[2]]
        assert (await client.post("/v1/completions", json={"model": "first"})).status_code == 200

    _run([dead, dead, well], [], ask)


def test_a_request_that_every_engine_dies_of_ends(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.gateway._PAUSE_S", 0.0)

    async def ask(client: httpx.AsyncClient, placed: dict[str, Placed]) -> None:
        reply = await client.post("/v1/completions", json={"model": "first"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "engine_died")
        assert len(placed["first"].asked) == 6

    _run([dead], [], ask)


def test_a_door_of_another_base_is_not_the_last_word(fresh_home: Path) -> None:
    said = iter([421, 200])

    async def undecided(_: Any, __: bytes, send: Any) -> None:
        await _answer(send, next(said), b"{}")

    async def ask(client: httpx.AsyncClient, placed: dict[str, Placed]) -> None:
        assert (await client.post("/v1/completions", json={"model": "first"})).status_code == 200
        assert [wanted.avoided for wanted in placed["first"].asked] == [frozenset()] * 2

    _run([undecided], [], ask)


def test_a_stream_that_breaks_off_says_so(fresh_home: Path) -> None:
    async def ask(client: httpx.AsyncClient, _: dict[str, Placed]) -> None:
        reply = await client.post("/v1/completions", json={"model": "first", "stream": True})
        events = reply.text.split("\n\n")
        assert (events[0], events[2]) == ("data: one", "data: [DONE]")
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "engine_died"

    _run([breaking], [], ask)


@pytest.mark.parametrize(("awake", "may_sleep", "status"), [(("second",), False, 200), ((), False, 503), ((), True, 200)])
def test_it_is_well_while_one_base_answers_or_all_may_sleep(
    fresh_home: Path, monkeypatch: pytest.MonkeyPatch, awake: tuple[str, ...], may_sleep: bool, status: int
) -> None:
    monkeypatch.setattr(Awake, "base_ids", awake)

    async def main() -> None:
        catalog = Catalog(Registry.open(), BASES[0], BASES)
        forwarding = Forwarding(catalog, Tenancy(None, PolicyFile(), 1), {}, Awake(), may_sleep, 1, 1)  # type: ignore[arg-type]
        async with _served(forwarding) as address, httpx.AsyncClient() as client:
            assert (await client.get(f"http://{address}/healthz")).status_code == status

    asyncio.run(main())


def test_a_stranger_is_refused_before_a_body_is_read(fresh_home: Path) -> None:
    from adaptfleet.on_ray.serve.api_keys import ApiKeys, ensure_keys, first_key

    ensure_keys()

    async def main() -> None:
        catalog = Catalog(Registry.open(), BASES[0], BASES)
        tenancy = Tenancy(ApiKeys(), PolicyFile(), 1)
        forwarding = Forwarding(catalog, tenancy, {"first": Placed(), "second": Placed()}, Awake(), False, 10, 10)  # type: ignore[arg-type]
        async with _served(forwarding) as address, httpx.AsyncClient(base_url=f"http://{address}") as client:

            async def status(key: str) -> int:
                reply = await client.post("/v1/completions", content=b"x" * 1000, headers={"Authorization": f"Bearer {key}"})
                return reply.status_code

            assert await status("not a key") == 401
            assert await status(first_key()) == 413, "a tenant's body is read, and is too long here"

    asyncio.run(main())
