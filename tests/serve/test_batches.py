"""Files and batches without an engine: an answering function stands in the door's place, everything else is the real thing."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adaptfleet.contracts.errors import StoreError
from adaptfleet.on_ray.serve.api_keys import Caller
from adaptfleet.on_ray.serve.asgi import refuse
from adaptfleet.on_ray.serve.batch_input import ENDPOINTS, parse_rows
from adaptfleet.on_ray.serve.batch_routes import BatchRoutes
from adaptfleet.on_ray.serve.batch_runner import BatchRunner
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.store.batches import BatchStore, FileRecord
from adaptfleet.store.objects import Objects

CHAT = ENDPOINTS[0]


class Claims:
    """What a ledger does for one cluster: a piece of work is one replica's."""

    def __init__(self, shared: dict[str, "Claims"]) -> None:
        self._shared = shared

    async def claim(self, name: str) -> bool:
        return self._shared.setdefault(name, self) is self

    async def release(self, name: str) -> None:
        if self._shared.get(name) is self:
            del self._shared[name]


class Engine:
    """Answers what it is asked with the question, as vLLM's form has it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.until = 10**9
        self.status = 200

    async def __call__(self, caller: Caller, path: str, body: bytes, klass: str) -> tuple[int, bytes]:
        assert klass == "batch"
        request = json.loads(body)
        if len(self.asked) >= self.until:
            raise asyncio.CancelledError  # the replica dies here
        self.asked.append((caller.tenant, request["messages"]))
        await asyncio.sleep(0)
        if request["messages"] == "bad" or self.status != 200:
            status = 400 if request["messages"] == "bad" else self.status
            return status, RefusalError(status, "no", "refused").body()
        return 200, json.dumps({"id": "chatcmpl-1", "choices": [{"message": {"content": request["messages"].upper()}}]}).encode()


@pytest.fixture
def store(tmp_path: Path) -> BatchStore:
    return BatchStore(Objects((tmp_path / "store").as_uri()))


def _client(store: BatchStore, tenant: str = "acme", max_file_bytes: int = 100_000) -> openai.AsyncOpenAI:
    routes = BatchRoutes(store, max_file_bytes)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await routes({**scope, "adaptfleet.caller": Caller(tenant, "k-1234567890")}, receive, send)
        except RefusalError as refusal:
            await refuse(send, refusal)

    http = httpx.AsyncClient(transport=httpx.ASGITransport(application))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="x", http_client=http, max_retries=0)


def _runner(store: BatchStore, engine: Engine, shared: dict[str, Claims], **kwargs: Any) -> BatchRunner:
    settings = {"is_enabled": lambda tenant: True, "max_rows_at_once": 4} | kwargs
    return BatchRunner(store, Claims(shared), engine, **settings)  # type: ignore[arg-type]


async def _to_the_end(runner: BatchRunner) -> None:
    await runner.look()
    await asyncio.gather(*runner._running.values(), return_exceptions=True)


def _input(*texts: str) -> bytes:
    rows = [{"custom_id": f"row-{i}", "method": "POST", "url": CHAT, "body": {"messages": text}} for i, text in enumerate(texts)]
    return "\n".join(json.dumps(row) for row in rows).encode()


async def _batch(client: openai.AsyncOpenAI, content: bytes, **kwargs: Any) -> Any:
    file = await client.files.create(file=("rows.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **kwargs)  # type: ignore[arg-type]


async def _output(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in (await client.files.content(file_id)).text.splitlines()]


def test_a_batch_from_upload_to_output(store: BatchStore) -> None:
    async def run() -> None:
        client, engine = _client(store), Engine()
        batch = await _batch(client, _input("one", "bad", "three"), metadata={"night": "7"})
        assert (batch.status, batch.metadata) == ("validating", {"night": "7"})
        await _to_the_end(_runner(store, engine, {}))
        batch = await client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
        rows = await _output(client, batch.output_file_id)
        assert [row["custom_id"] for row in rows] == ["row-0", "row-2"], "in the input's order"
        assert [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows] == ["ONE", "THREE"]
        (bad,) = await _output(client, batch.error_file_id)
        assert (bad["custom_id"], bad["response"]["status_code"], bad["response"]["body"]["error"]["code"]) == ("row-1", 400, "refused")
        assert store.open_batches() == []
        files = [file async for file in client.files.list()]
        assert sorted(file.purpose for file in files) == ["batch", "batch_output", "batch_output"]
        assert [entry.id async for entry in client.batches.list()] == [batch.id]

    asyncio.run(run())


def test_tenants_do_not_see_each_others(store: BatchStore) -> None:
    async def run() -> None:
        acme, beta = _client(store), _client(store, "beta")
        batch = await _batch(acme, _input("one"))
        await _to_the_end(_runner(store, Engine(), {}))
        batch = await acme.batches.retrieve(batch.id)
        file_id = batch.output_file_id
        for attempt in (
            lambda: beta.files.retrieve(file_id),
            lambda: beta.files.content(file_id),
            lambda: beta.files.delete(file_id),
            lambda: beta.batches.retrieve(batch.id),
            lambda: beta.batches.cancel(batch.id),
            lambda: beta.files.retrieve("file-" + "0" * 24),
            lambda: beta.files.retrieve("..%2Facme%2F" + file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                await attempt()
        with pytest.raises(openai.BadRequestError, match="There is no file"):
            await beta.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
        assert [file async for file in beta.files.list()] == []
        assert await _output(acme, file_id)

    asyncio.run(run())


def test_a_restart_goes_on_where_it_was(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.batch_runner._PART_EVERY_S", 0.0)

    async def run() -> None:
        client, first, second = _client(store), Engine(), Engine()
        batch = await _batch(client, _input(*(f"text {i}" for i in range(20))))
        first.until = 9
        await _to_the_end(_runner(store, first, {}))
        state = await client.batches.retrieve(batch.id)
        assert state.status == "in_progress"
        assert 0 < state.request_counts.completed <= 9
        await _to_the_end(_runner(store, second, {}))
        state = await client.batches.retrieve(batch.id)
        assert (state.status, state.request_counts.completed) == ("completed", 20)
        assert len(await _output(client, state.output_file_id)) == 20
        assert len(second.asked) < 20, "answered rows are not asked again"

    asyncio.run(run())


def test_two_replicas_share_the_work_and_no_row_runs_twice(store: BatchStore) -> None:
    async def run() -> None:
        client, engines, shared = _client(store), [Engine(), Engine()], {}
        batches = [await _batch(client, _input(*(f"{n}-{i}" for i in range(10)))) for n in range(4)]
        runners = [_runner(store, engine, shared) for engine in engines]
        await asyncio.gather(*(runner.look() for runner in runners))
        await asyncio.gather(*(task for runner in runners for task in runner._running.values()))
        assert {(await client.batches.retrieve(batch.id)).status for batch in batches} == {"completed"}
        asked = [text for engine in engines for _, text in engine.asked]
        assert sorted(asked) == sorted({f"{n}-{i}" for n in range(4) for i in range(10)})

    asyncio.run(run())


def test_one_tenants_many_batches_leave_room_for_anothers(store: BatchStore) -> None:
    async def run() -> None:
        engine = Engine()
        for _ in range(6):
            await _batch(_client(store), _input("a"))
        await _batch(_client(store, "beta"), _input("b"))
        runner = _runner(store, engine, {})
        await runner.look()
        running = sorted(runner._tenant_of.values())
        assert running == ["acme", "acme", "acme", "beta"], "no more than a few at once, and not all of one tenant's"
        for _ in range(3):
            await asyncio.gather(*runner._running.values())
            await runner.look()
        await asyncio.gather(*runner._running.values())
        assert store.open_batches() == []
        assert len(engine.asked) == 7

    asyncio.run(run())


def test_a_batch_that_is_cancelled_or_out_of_time(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        client, engine = _client(store), Engine()
        cancelled, late = await _batch(client, _input("one", "two")), await _batch(client, _input("three", "four"))
        assert (await client.batches.cancel(cancelled.id)).status == "cancelling"
        monkeypatch.setattr("adaptfleet.on_ray.serve.batch_runner._now", lambda: late.expires_at + 1)
        store.cancel(store.batch("acme", cancelled.id))  # type: ignore[arg-type]  # twice is no error
        await _to_the_end(_runner(store, engine, {}, max_rows_at_once=1))
        ended = await client.batches.retrieve(late.id)
        assert ended.status == "expired"
        errors = await _output(client, ended.error_file_id)
        assert {row["error"]["code"] for row in errors} == {"batch_expired"}
        monkeypatch.undo()
        with pytest.raises(openai.ConflictError) as raised:
            await client.with_options(max_retries=5).batches.cancel(late.id)
        assert raised.value.response.headers["x-should-retry"] == "false", "it will not be otherwise a moment later"

    asyncio.run(run())


def test_an_engine_that_fails_is_asked_again(store: BatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.batch_runner._RETRY_PAUSE_S", 0.0)

    async def run() -> None:
        client, engine = _client(store), Engine()
        engine.status = 503
        batch = await _batch(client, _input("one"))
        await _to_the_end(_runner(store, engine, {}))
        assert len(engine.asked) == 3
        ended = await client.batches.retrieve(batch.id)
        (row,) = await _output(client, ended.error_file_id)
        assert (ended.status, row["response"]["status_code"]) == ("completed", 503)

    asyncio.run(run())


def test_every_mistake_of_an_input_is_told_with_its_line(store: BatchStore) -> None:
    good = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}
    lines = [
        json.dumps(good),
        "{",
        "[]",
        json.dumps(good),
        json.dumps(good | {"custom_id": "b", "url": "/v1/files"}),
        json.dumps(good | {"custom_id": "c", "method": "GET"}),
        json.dumps(good | {"custom_id": "d", "body": []}),
        json.dumps(good | {"custom_id": "e", "body": {"stream": True}}),
        json.dumps(good | {"custom_id": 7}),
        "[" * 100_000,
    ]
    rows, wrong = parse_rows("\n".join(lines).encode(), CHAT)
    assert rows == []
    assert [(error.line, error.code) for error in wrong] == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "mismatched_url"),
        (6, "invalid_method"),
        (7, "invalid_body"),
        (8, "invalid_body"),
        (9, "invalid_custom_id"),
        (10, "invalid_json_line"),
    ]

    async def run() -> None:
        client = _client(store)
        batch = await _batch(client, b"{\n")
        await _to_the_end(_runner(store, Engine(), {}))
        ended = await client.batches.retrieve(batch.id)
        assert ended.status == "failed"
        assert ended.errors.data[0].line == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda c: c.files.create(file=("x", b"y" * 101_000), purpose="batch"), "at most 100000 bytes"),
        (lambda c: c.files.create(file=("x", b"y" * 500_000), purpose="batch"), "at most 100000 bytes"),
        (lambda c: c.files.create(file=("x", b"y"), purpose="fine-tune"), "purpose is 'fine-tune'"),
        (lambda c: c.post("/files", body={"a": 1}, cast_to=object), "has no file"),
        (lambda c: c.post("/batches", body={"endpoint": "/v1/x"}, cast_to=object), "endpoint is one of"),
        (lambda c: c.post("/batches", body={"endpoint": CHAT, "completion_window": "9d"}, cast_to=object), "completion_window"),
        (lambda c: c.post("/batches", body={"endpoint": CHAT, "input_file_id": {"a": 1}}, cast_to=object), "There is no file"),
        (lambda c: c.post("/batches", body={"endpoint": CHAT, "metadata": {"a": 1}}, cast_to=object), "metadata"),
        (lambda c: c.get("/files?limit=0", cast_to=object), "limit"),
        (lambda c: c.put("/files", body={}, cast_to=object), "takes GET and POST, not PUT"),
        (lambda c: c.get("/batches/x/y/z", cast_to=object), "is not served"),
    ],
)
def test_bad_requests_write_nothing(store: BatchStore, ask: Callable[[openai.AsyncOpenAI], Any], said: str) -> None:
    async def run() -> None:
        with pytest.raises(openai.APIStatusError, match=said) as raised:
            await ask(_client(store))
        assert raised.value.status_code in (400, 404, 405, 413)
        assert set(raised.value.response.json()["error"]) == {"message", "type", "param", "code"}

    asyncio.run(run())
    assert store._objects.list("files") == []
    assert store._objects.list("batches") == []


def test_a_file_is_there_whole_or_not_at_all(store: BatchStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = FileRecord(id="file-" + "a" * 24, tenant="acme", num_bytes=1, created_at=1, filename="../../x", purpose="batch")
    put_new = store._objects.put_new

    def full(key: str, content: bytes) -> bool:
        raise StoreError("the disk is full")

    monkeypatch.setattr(store._objects, "put_new", full)
    with pytest.raises(StoreError):
        store.add_file(record, b"x")
    assert store.file("acme", record.id) is None
    assert store.files("acme") == []
    monkeypatch.setattr(store._objects, "put_new", put_new)
    assert store.add_file(record, b"x")
    assert not store.add_file(record, b"another")
    assert store.content("acme", record.id) == b"x"
    assert not (tmp_path / "x").exists()
    shutil.rmtree(tmp_path / "store")

    async def run() -> None:
        with pytest.raises(openai.NotFoundError):
            await _client(store).files.retrieve(record.id)

    asyncio.run(run())
