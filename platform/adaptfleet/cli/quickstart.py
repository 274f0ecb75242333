"""From nothing to a live endpoint: two fine-tunes by `ray job submit`, served beside their base by one engine, compared with it."""

import argparse
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import AdaptfleetError, ContractError
from adaptfleet.contracts.home import home

MAIN_CONFIG = Path("jobs/configs/finetune_address.yaml")
SECOND_CONFIG = Path("jobs/configs/finetune_names.yaml")
RESULTS = Path("bench/results/quickstart.json")
ANSWERS = Path("bench/results/raw/quickstart_answers.jsonl")
MAX_TOKENS = 96
NUM_NAMES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8000, help="of the endpoint, on 127.0.0.1")
    parser.add_argument("--max-rows", type=int, metavar="N", help="ask only the first N held-out addresses; default: all")


class Phases:
    """Times what the quickstart does, and tells it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.monotonic()

    @contextmanager
    def phase(self, name: str, told: str) -> Iterator[None]:
        print(f"\n== {told}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"   {self.seconds[name]:.0f} s", flush=True)


def run(args: argparse.Namespace) -> int:
    missing = [str(file) for file in (MAIN_CONFIG, SECOND_CONFIG, Path("jobs/finetune.py")) if not file.is_file()]
    if missing:
        raise ContractError(f"{', '.join(missing)} not found. Run the quickstart in the repository's folder: `make quickstart`.")
    from adaptfleet.cli.fetch import fetch
    from adaptfleet.cli.serve import check_port
    from adaptfleet.on_ray.cluster.interruption import stop_on_signal
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.local_cluster import LocalCluster

    stop_on_signal()
    check_port("127.0.0.1", args.port)
    phases = Phases()
    with phases.phase("fetch", "the embedded model and data sets"):
        fetch(("smollm2-135m", "address-json", "name-json"))
    if LocalCluster.attach(default_record()) is not None:
        raise AdaptfleetError("this home's local cluster runs already. End it with `make stop`, then start again.")
    LocalCluster.clear(default_record())
    cores = len(os.sched_getaffinity(0))
    with phases.phase("cluster", "a local Ray cluster with private ports and a token"):
        # Every core twice, once for jobs and once for the endpoint: whichever is idle leaves them to the other.
        cluster = LocalCluster.start(2 * cores, record_file=default_record(), logs_to=home() / "logs")
    with cluster:
        print(f"   dashboard {cluster.dashboard_url}")
        os.environ.update(cluster.env)
        return _on_cluster(cluster, phases, args, cores)


def _on_cluster(cluster: Any, phases: Phases, args: argparse.Namespace, cores: int) -> int:
    from openai import OpenAI
    from rich.console import Console

    from adaptfleet.cli.comparison import Contestant, ask_all, draw_shots, save_answers
    from adaptfleet.contracts.serving import ServingSpec
    from adaptfleet.core.data.datasets import load_dataset
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy, undeploy
    from adaptfleet.store.registry import Registry

    registry = Registry.open()
    with phases.phase("finetune_address", f"ray job submit -- python jobs/finetune.py --config {MAIN_CONFIG}"):
        _finetune(cluster, MAIN_CONFIG)
    with phases.phase("endpoint", "the endpoint: vLLM behind Ray Serve"):
        spec = ServingSpec(cpus_per_replica=cores)
        url = deploy(spec, port=args.port)
        client = OpenAI(base_url=f"{url}/v1", api_key=first_key(), timeout=600, max_retries=0)
        print(f"   {url}/v1 serves {', '.join(sorted(model.id for model in client.models.list()))}")
    with phases.phase("finetune_names", f"a second tenant's job while it serves: {SECOND_CONFIG}"):
        watch = _FirstAnswer(client, "name-json")
        _finetune(cluster, SECOND_CONFIG)
        published = registry.resolve("name-json")
        first_answer_s = watch.seconds_after(published.created_at)
    told = f"{first_answer_s:.2f} s after it was published" if first_answer_s is not None else "as published by an earlier quickstart"
    print(f"   {published.reference} answers, {told}, in the engine that was running")

    addresses, names = load_dataset(DataSpec(train="address-json")), load_dataset(DataSpec(train="name-json"))
    rows = addresses.test[: args.max_rows]
    base = spec.base_id()
    contestants = [
        Contestant("base, zero-shot", base, rows, [], MAX_TOKENS),
        Contestant("base, 8-shot", base, rows, draw_shots(addresses.train), MAX_TOKENS),
        Contestant("adapter address-json", "address-json", rows, [], MAX_TOKENS),
        Contestant("adapter name-json", "name-json", names.test[:NUM_NAMES], [], MAX_TOKENS),
    ]
    with phases.phase("compare", f"{len(rows)} held-out addresses to base and adapter"):
        answered = [ask_all(client, contestant) for contestant in contestants]
    save_answers(ANSWERS, answered)
    _stream_one(client, rows[0])
    with phases.phase("stop", "stopping the endpoint and the cluster"):
        undeploy()
        cluster.stop()

    address = registry.resolve("address-json")
    zero, few, adapter, second = (one.scores for one in answered)
    results = {
        "base_exact_match": zero.exact_match,
        "base_field_f1": zero.field_f1,
        "base_8shot_exact_match": few.exact_match,
        "base_8shot_field_f1": few.field_f1,
        "adapter_exact_match": adapter.exact_match,
        "adapter_field_f1": adapter.field_f1,
        "adapter_valid_json": adapter.valid_json,
        "second_adapter_exact_match": second.exact_match,
        "second_adapter_field_f1": second.field_f1,
        "num_test_examples": adapter.num_rows,
        "train_tokens_per_s": round(address.metrics["train_tokens_per_s"], 1),
        "publish_to_first_answer_s": first_answer_s,
        "total_s": round(time.monotonic() - phases.started, 1),
        "phase_s": phases.seconds,
        "trained_now": address.created_at >= datetime.fromtimestamp(time.time() - (time.monotonic() - phases.started), UTC),
        "adapters": [address.reference, published.reference],
        "machine": {"cores": cores, "processor": _processor(), "python": platform.python_version()},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(RESULTS)
    Console().print(_table(answered))
    print(f"total {results['total_s']:.0f} s, training at {results['train_tokens_per_s']:.0f} tokens/s; {RESULTS}, answers in {ANSWERS}")
    print("Serve them from now on: `make serve`. Your own data: README.md, `Your own model and data`.")
    return 0


def _finetune(cluster: Any, config: Path) -> None:
    from adaptfleet.cli.submit import places

    cluster.submit(["python", "jobs/finetune.py", "--config", str(config)], Path.cwd(), env=places(), show=_show)


def _show(line: str) -> None:
    """The job's own lines; Ray's records of how it places workers stay in the logs."""
    if not line.startswith(("(", "\x1b", "20", "[20")) and line.strip():
        print(f"   {line}", flush=True)


class _FirstAnswer:
    """Asks for a model until it answers, from a thread, and notes when that was."""

    def __init__(self, client: Any, model: str) -> None:
        self._client = client
        self._model = model
        self._answered_at: datetime | None = None
        self._first_try_failed = False
        self._thread = threading.Thread(target=self._ask, name="first-answer", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        from openai import NotFoundError

        while True:
            try:
                self._client.chat.completions.create(model=self._model, messages=[{"role": "user", "content": "Ann Lee"}], max_tokens=1)
            except NotFoundError:
                self._first_try_failed = True
                time.sleep(0.1)
            else:
                self._answered_at = datetime.now(UTC)
                return

    def seconds_after(self, published_at: datetime) -> float | None:
        """Seconds from publication to the first answer; None if it was published before anybody asked."""
        self._thread.join(timeout=60)
        if self._answered_at is None:
            raise AdaptfleetError(f"{self._model!r} was published, but the endpoint did not answer with it within 60 s.")
        return round((self._answered_at - published_at).total_seconds(), 3) if self._first_try_failed else None


def _stream_one(client: Any, example: Any) -> None:
    """One answer as it comes."""
    print(f"\n   {example.prompt[-1].content}\n   address-json: ", end="", flush=True)
    messages = [{"role": m.role, "content": m.content} for m in example.prompt]
    for chunk in client.chat.completions.create(model="address-json", messages=messages, temperature=0, max_tokens=MAX_TOKENS, stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


def _table(answered: Any) -> Any:
    from rich.table import Table

    table = Table(title="held-out answers over the endpoint")
    table.add_column("model")
    for column in ("rows", "exact match", "field F1", "valid JSON"):
        table.add_column(column, justify="right")
    for one in answered:
        scores = one.scores
        table.add_row(
            one.contestant.label, str(scores.num_rows), *(f"{v:.3f}" for v in (scores.exact_match, scores.field_f1, scores.valid_json))
        )
    return table


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
