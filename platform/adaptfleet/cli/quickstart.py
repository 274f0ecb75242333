"""The whole road on this machine: embedded model and data, two fine-tunes as Ray jobs, the endpoint, and base and adapters compared."""

import argparse
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.data import EMBEDDED_DATASETS
from adaptfleet.contracts.errors import AdaptfleetError, ServingError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import load_contract
from adaptfleet.contracts.model import EMBEDDED_MODELS
from adaptfleet.contracts.serving import ServingSpec

if TYPE_CHECKING:
    from adaptfleet.cli.questions import Answer
    from adaptfleet.on_ray.local_cluster import LocalCluster
    from adaptfleet.store.registry import Registry

ADDRESS, NAMES = "jobs/configs/finetune_address.yaml", "jobs/configs/finetune_names.yaml"
NUM_SHOTS = 8
MAX_NAMES = 64
"""Held-out questions to the second adapter."""
MAX_ENDPOINT_CORES = 8
_PLACING_TIMEOUT_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: bench/results of the repository")
    parser.epilog = "Run again, it finds the published adapters and only serves and compares."


def run(args: argparse.Namespace) -> int:
    repository = _repository()
    from adaptfleet.on_ray.cluster.interruption import stop_on_signal
    from adaptfleet.on_ray.cluster.record import default_record
    from adaptfleet.on_ray.local_cluster import LocalCluster

    stop_on_signal()
    running = LocalCluster.attach(default_record())
    if running is not None and (running.is_owned_by_living or (running.folder / "endpoint.json").exists()):
        raise ServingError("a local cluster of this ADAPTFLEET_HOME is running already. Stop it first: `make stop`.")
    LocalCluster.clear(default_record())
    clock = _Clock()
    cores = len(os.sched_getaffinity(0))
    with clock.phase("fetch", "embedded model and data sets"):
        from adaptfleet.cli.fetch import fetch

        fetch((*EMBEDDED_MODELS, *EMBEDDED_DATASETS))
    # While the endpoint idles its cores are the training's, so they are counted twice. One core is left to the proxy and to the clients:
    # an engine whose threads wait for each other on busy cores is several times slower than with one thread less.
    endpoint_cores = min(max(1, cores - 1), MAX_ENDPOINT_CORES)
    with clock.phase("cluster", "local Ray cluster"):
        cluster = LocalCluster.start(cores + endpoint_cores, record_file=default_record(), logs_to=home() / "logs")
    with cluster:
        results, answers = _road(cluster, repository, clock, endpoint_cores)
        with clock.phase("stop", "stopping"):
            cluster.stop()
    results |= {"total_s": round(clock.total_s, 1), "phases_s": clock.phases_s, "machine": _machine(cores)}
    _write(results, answers, args.results or repository / "bench" / "results")
    return 0


def _road(cluster: "LocalCluster", repository: Path, clock: "_Clock", endpoint_cores: int) -> tuple[dict[str, Any], "list[Answer]"]:
    """Everything between the cluster's start and its stop."""
    # Ray reads its environment when it is imported, which the first job's thread may be the first to do.
    os.environ.update(cluster.env)
    from adaptfleet.cli import questions
    from adaptfleet.store.registry import Registry

    registry = Registry.open()
    jobs = {name: load_contract(FinetuneJob, repository / name) for name in (ADDRESS, NAMES)}
    new = [name for name, job in jobs.items() if registry.find(job.fingerprint(), job.published_name()) is None]
    # Both begin with a minute on one core (imports, weights, compiling), and the engine then sleeps until it is asked: side by side they
    # take about as long as the longer one.
    first_job = _SideJob(lambda: _submit_beside(cluster, repository, ADDRESS, endpoint_cores, clock))
    with clock.phase("endpoint", "the endpoint, vLLM behind Ray Serve, with the base alone"):
        url, key = _deploy(endpoint_cores)
        print(f"  answers at {url}/v1", flush=True)
    first_job.result()
    api = questions.client(url, key)
    with clock.phase("finetune_names", f"a second tenant, while it serves: ray job submit -- python jobs/finetune.py --config {NAMES}"):
        first = _FirstAnswer(api, registry, jobs[NAMES]) if NAMES in new else None
        try:
            _submit(cluster, repository, NAMES)
        finally:
            published_to_answer_s = first.seconds() if first else None
    manifests = {name: _published(registry, job) for name, job in jobs.items()}
    published_to_answer_s = _remembered(manifests[NAMES], published_to_answer_s)
    results, answers = _compare(api, jobs, clock)
    results |= {
        "train_tokens_per_s": round(manifests[ADDRESS].metrics["train_tokens_per_s"], 1),
        "publish_to_first_answer_s": published_to_answer_s,
        "trained_in_this_run": sorted(jobs[name].published_name() for name in new),
        "adapters": {manifest.reference: manifest.metrics for manifest in manifests.values()},
    }
    return results, answers


def _compare(api: Any, jobs: dict[str, FinetuneJob], clock: "_Clock") -> tuple[dict[str, Any], "list[Answer]"]:
    """Base, worked examples, adapters: the same held-out questions, in one engine."""
    from adaptfleet.cli import questions
    from adaptfleet.core.data.datasets import load_dataset

    base = ServingSpec().base_id()
    data, adapter = load_dataset(jobs[ADDRESS].data), jobs[ADDRESS].published_name()
    names_data, names_adapter = load_dataset(jobs[NAMES].data), jobs[NAMES].published_name()
    series = (
        ("base", base, data.test, ()),
        ("base_8shot", base, data.test, data.train[:NUM_SHOTS]),
        ("adapter", adapter, data.test, ()),
        ("names_adapter", names_adapter, names_data.test[:MAX_NAMES], ()),
    )
    answers: list[questions.Answer] = []
    results: dict[str, Any] = {"num_test_examples": len(data.test), "num_names_test_examples": len(names_data.test[:MAX_NAMES])}
    rows = []
    with clock.phase("compare", f"{sum(len(s[2]) for s in series)} held-out questions, {questions.CONCURRENCY} at a time"):
        for name, model, asked, shots in series:
            began = time.monotonic()
            given = questions.ask_all(api, name, model, asked, shots)
            score = questions.scores(given)
            answers += given
            results |= {f"{name}_{metric}": round(value, 4) for metric, value in score.metrics().items()}
            rows.append((name, model, len(shots), score))
            print(f"  {name}: {len(asked)} answers in {time.monotonic() - began:.0f} s", flush=True)
        print(f"\nOne answer, streamed by {adapter}:")
        questions.stream_one(api, adapter, data.test[0])
    _print_table(rows)
    return results, answers


def _print_table(rows: list[tuple[str, str, int, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("data", "model", "examples in the prompt", "questions", "exact match", "field F1", "valid JSON", title="Held-out answers")
    for name, model, num_shots, score in rows:
        shown = [f"{value:.2f}" if value is not None else "" for value in (score.exact_match, score.field_f1, score.valid_json)]
        table.add_row("names" if name.startswith("names") else "addresses", model, str(num_shots), str(score.num_rows), *shown)
    Console(width=100).print(table)


class _SideJob:
    """Something that runs beside the main thread, and ends with the process if the main thread is interrupted."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="side-job", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # told to the waiting thread
            self._error = error

    def result(self) -> None:
        """Waits for the end; raises what the work raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class _FirstAnswer:
    """Watches, beside the job, for the moment when a name that was not published before first answers."""

    def __init__(self, api: Any, registry: "Registry", job: FinetuneJob) -> None:
        self._api, self._registry, self._job = api, registry, job
        self._over = threading.Event()
        self._seconds: float | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._watch, name="first-answer", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        from adaptfleet.cli.questions import wait_until_answers

        try:
            # The store is looked at until the version is there, so that no request takes time from the training.
            while (manifest := self._registry.find(self._job.fingerprint(), self._job.published_name())) is None:
                if self._over.wait(0.05):
                    return
            answered_at = wait_until_answers(self._api, manifest.reference, timeout_s=60)
            self._seconds = round(answered_at - manifest.created_at.timestamp(), 2)
        except Exception as error:  # told to the waiting thread
            self._error = error

    def seconds(self) -> float | None:
        """From publishing to the first answer. None: it was not published, because the job failed."""
        if self._thread.is_alive():
            # The job has ended: it has published by now, or never will.
            published = self._registry.find(self._job.fingerprint(), self._job.published_name())
            if published is None:
                self._over.set()
            self._thread.join(timeout=90)
        if self._error is not None:
            raise ServingError(f"{self._job.published_name()} was published but did not answer: {self._error}")
        return self._seconds


def _remembered(manifest: Manifest, seconds: float | None) -> float | None:
    """It can be measured only in the run that publishes; later runs tell what that one saw."""
    file = home() / "quickstart.json"
    seen = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if seconds is not None:
        seen[f"{manifest.reference} {manifest.created_at.isoformat()}"] = seconds
        file.write_text(json.dumps(seen, indent=1), encoding="utf-8")
    return seen.get(f"{manifest.reference} {manifest.created_at.isoformat()}")


def _published(registry: "Registry", job: FinetuneJob) -> Manifest:
    manifest = registry.find(job.fingerprint(), job.published_name())
    if manifest is None:
        raise AdaptfleetError(
            f"the job succeeded, but {job.published_name()} is not in the registry. Do job and command use one ADAPTFLEET_STORE?"
        )
    return manifest


def _submit(cluster: "LocalCluster", repository: Path, config: str) -> None:
    from adaptfleet.cli.submit import places

    argv = ["python", "jobs/finetune.py", "--config", config]
    cluster.submit(argv, repository, env=places(), show=_show)


def _submit_beside(cluster: "LocalCluster", repository: Path, config: str, endpoint_cores: int, clock: "_Clock") -> None:
    """Submits once the endpoint's replica has its cores: a worker takes an equal share of those that are free when it starts."""
    import ray

    until = time.monotonic() + _PLACING_TIMEOUT_S
    while time.monotonic() < until:
        if ray.is_initialized() and ray.available_resources().get("CPU", 0) <= cluster.num_cpus - endpoint_cores:
            break
        time.sleep(0.2)
    with clock.phase("finetune_address", f"beside its start: ray job submit -- python jobs/finetune.py --config {config}"):
        _submit(cluster, repository, config)


def _show(line: str) -> None:
    """The job's own lines; Ray's records of how it places workers stay in the logs."""
    if line.strip() and not line.startswith(("(", "\x1b", "20", "[20")):
        print(f"  | {line}", flush=True)


def _deploy(num_cores: int) -> tuple[str, str]:
    from adaptfleet.on_ray.serve.api_keys import first_key
    from adaptfleet.on_ray.serve.deploy import deploy

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return deploy(ServingSpec(cpus_per_replica=num_cores), port=port), first_key()


class _Clock:
    """What each phase took."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.phases_s: dict[str, float] = {}

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def phase(self, name: str, purpose: str) -> Iterator[None]:
        print(f"\n[{self.total_s:4.0f} s] {purpose}", flush=True)
        began = time.monotonic()
        yield
        self.phases_s[name] = round(time.monotonic() - began, 1)


def _machine(cores: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    model = next((line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine())
    flags = set(next((line.partition(":")[2] for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    return {
        "cpu": model,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bfloat16": sorted({"amx_bf16", "avx512_bf16"} & flags),
        "python": platform.python_version(),
        "versions": {
            distribution.name: distribution.version for distribution in map(metadata.distribution, ("torch", "ray", "transformers", "peft"))
        },
    }


def _write(results: dict[str, Any], answers: "list[Answer]", folder: Path) -> None:
    from adaptfleet.cli.questions import save_answers

    save_answers(answers, folder / "raw" / "quickstart_answers.jsonl")
    file = folder / "quickstart.json"
    unfinished = file.with_name(f".{file.name}")
    unfinished.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    unfinished.replace(file)
    seconds = results["publish_to_first_answer_s"]
    publishing = "was published earlier" if seconds is None else f"answered {seconds} s after it was published"
    print(
        f"\nexact match: {results['base_8shot_exact_match']:.2f} (base, {NUM_SHOTS} examples in the prompt), "
        f"{results['adapter_exact_match']:.2f} (adapter); "
        f"field F1: {results['base_8shot_field_f1']:.2f}, {results['adapter_field_f1']:.2f}\n"
        f"training: {results['train_tokens_per_s']:.0f} tokens/s; the second adapter {publishing}; {results['total_s']:.0f} s in all\n"
        f"results: {file}\nNext: `make serve` keeps the endpoint up; docs/ says how to bring your own model and data."
    )


def _repository() -> Path:
    """Where jobs/ lies."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (folder / "jobs" / "finetune.py").is_file():
            return folder
    raise AdaptfleetError("no jobs/finetune.py here. Run the quickstart in the repository's folder: `make quickstart`.")
