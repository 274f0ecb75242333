"""Contracts from YAML: every offender in one error, and never any other error."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.contracts.jobs import DistillJob, FinetuneJob
from adaptfleet.contracts.loading import load_contract, parse_contract
from adaptfleet.contracts.publishing import PublishJob
from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.serving import ServingSpec

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
PUBLISH = "publish: {name: a}"
JOBS: dict[str, type[Spec]] = {
    "finetune": FinetuneJob,
    "distill": DistillJob,
    "compress": CompressJob,
    "publish": PublishJob,
    "evaluate": EvaluateJob,
    "sweep": SweepJob,
}


def refusal(text: str, *overrides: str, kind: type[Spec] = FinetuneJob) -> str:
    with pytest.raises(ContractError) as caught:
        parse_contract(kind, text, overrides)
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(config: Path) -> None:
    kind = JOBS[next(line.split()[1] for line in config.read_text().splitlines() if line.startswith("job:"))]
    assert load_contract(kind, config).fingerprint() == load_contract(kind, config).fingerprint()


def test_all_offenders_at_once_with_near_matches() -> None:
    text = refusal(
        "mdel: {}\nmodel: {sorce: x}\ntrain: {epochs: many, learning_rat: 1}\n"
        "method: {rank: 0, target: [q_proj]}\npublish: {name: ../../x}\n"
    )
    assert "7 things are wrong" in text
    for line in (
        "mdel: unknown key. Did you mean 'model'?",
        "model.sorce: unknown key. Did you mean 'source'? Allowed: dtype, source, trust_remote_code.",
        "train.epochs: Input should be a valid number. It is 'many'.",
        "train.learning_rat: unknown key. Did you mean 'learning_rate'?",
        "method.rank: Input should be greater than or equal to 1. It is 0.",
        "method.target: unknown key. Did you mean 'targets'?",
        "publish.name: '../../x' is no safe name.",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "publish: missing"),
        ("[a]", "holds a list"),
        ("a: 1\na: 2", "the key 'a' stands twice"),
        (f"{PUBLISH}\ntrain: {{epochs: '3'}}", "train.epochs"),
        (f"{PUBLISH}\ntrain: {{truncate: 1}}", "train.truncate"),
        (f"{PUBLISH}\ntrain: {{packs_per_step: 3}}\ncluster: {{workers: 2}}", "cannot share evenly"),
        (f"{PUBLISH}\ndata: {{train: address-json, test: x.jsonl}}", "has a held-out part of its own"),
        (f"{PUBLISH}\ndata: {{train: a.jsonl, mixture: [{{source: b.jsonl}}]}}", "train is 'a.jsonl' and a mixture is given too"),
        (f"{PUBLISH}\ndata: {{train: null}}", "neither train nor a mixture"),
        (f"{PUBLISH}\ndata: {{mixture: []}}", "neither train nor a mixture"),
        (f"{PUBLISH}\ndata: {{mixture: [{{source: a}}, {{source: a}}]}}", "names 'a' more than once"),
        (f"{PUBLISH}\ndata: {{mixture: [{{source: a, weight: 0}}]}}", "data.mixture.0.weight: Input should be greater than 0"),
        (
            f"{PUBLISH}\ndata: {{mixture: [{{source: a, weigth: 2}}]}}",
            "weigth: unknown key. Did you mean 'weight'? Allowed: source, weight.",
        ),
        (f"{PUBLISH}\nmodel: {{dtype: fp8}}", "model.dtype"),
        ("publish: {name: '../../x'}", "no safe name"),
        ("!!python/object/apply:os.system [id]", "no YAML"),
    ],
)
def test_what_is_wrong_is_said(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_overrides_lie_over_the_file() -> None:
    job = parse_contract(FinetuneJob, PUBLISH, ["train.learning_rate=1e-3", "method.targets=[q_proj, v_proj]", "publish.alias=null"])
    assert (job.train.learning_rate, job.method.targets, job.publish.alias) == (1e-3, ("q_proj", "v_proj"), None)


@pytest.mark.parametrize("override", ["a", "=1", "a..b=1", "publish.name.x=1", "train.epochs=[", "train.epoch=1"])
def test_overrides_that_are_none(override: str) -> None:
    refusal(PUBLISH, override)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"publish: {name: \xe9}")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "latin.yaml", "/tmp/\0x"):
        with pytest.raises(ContractError):
            load_contract(FinetuneJob, path)


def test_a_publish_job_asks_for_what_its_kind_needs() -> None:
    assert "base is missing" in refusal("{kind: adapter, folder: x, name: a}", kind=PublishJob)
    assert "leave base out" in refusal("{kind: dataset, folder: x, name: a, base: {source: b}}", kind=PublishJob)


def test_contracts_are_frozen_and_fingerprints_follow_values() -> None:
    job = parse_contract(FinetuneJob, PUBLISH)
    with pytest.raises(ValueError, match="frozen"):
        job.run = "x"  # type: ignore[misc]
    other = parse_contract(FinetuneJob, PUBLISH, ["train.seed=1"])
    assert job.fingerprint() == parse_contract(FinetuneJob, PUBLISH).fingerprint() != other.fingerprint()


# PyYAML's own constructors let these through as TypeError, ValueError, KeyError, IndexError, AttributeError or RecursionError.
_HOSTILE = [
    "{[a]: b}",
    "? {}\n: 1",
    "? !!set {a}\n: 1",
    "a: 2001-99-99",
    "a: 2001-01-01T99:00:00Z",
    "a: !!int ''",
    "a: !!float x",
    "a: !!bool x",
    "a: !!timestamp x",
    "a: 0b_",
    "a: " + "9" * 5000,
    "[" * 3000,
    "{a: " * 2000,
    "&a [*a]",
    "&a {a: *a}",
    "<<: 1",
    "a: \ud800",
    "\0",
]


@pytest.mark.parametrize("text", _HOSTILE, ids=lambda text: repr(text[:20]))
def test_hostile_yaml_is_a_contract_error(text: str) -> None:
    refusal(text)
    refusal(PUBLISH, f"train.epochs={text}")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_KEYS = st.sampled_from(["model", "train", "publish", "name", "rank", "method", "cluster", "workers"]) | st.text(max_size=8) | st.integers()
_TREES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12)
_SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@_SETTINGS
@given(text=st.text(max_size=80) | st.text(alphabet="{}[]:,&*!?|>-#'\"\n %@~<=ab01._", max_size=40) | _TREES.map(repr))
@pytest.mark.parametrize("kind", [FinetuneJob, PublishJob, ServingSpec])
def test_arbitrary_text_is_a_contract_or_a_contract_error(kind: type[Spec], text: str) -> None:
    try:
        assert isinstance(parse_contract(kind, text), kind)
    except ContractError as error:
        assert str(error)


def test_contracts_import_no_framework() -> None:
    program = (
        "import importlib, pkgutil, sys, adaptfleet.contracts as package\n"
        "for module in pkgutil.iter_modules(package.__path__): importlib.import_module(f'adaptfleet.contracts.{module.name}')\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'peft', 'obstore', 'pyarrow') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("method.kind=lorra", "method.kind: 'lorra' is not known. Did you mean 'lora'"),
        ("method={kind: ia3, rank: 4}", "method.rank: unknown key. Allowed: feedforward, kind, targets."),
        ("cluster.workers={min: 4, max: 2}", "cluster.workers: min is 4, above max 2."),
        ("cluster.workers={mn: 1, max: 2}", "cluster.workers.mn: unknown key. Did you mean 'min'?"),
        ("cluster.workers=many", "cluster.workers: Input should be a valid integer. It is 'many'."),
        ("method.kind=prefix", "method.kind 'prefix' cannot be published: vLLM"),
    ],
)
def test_where_several_kinds_are_allowed_the_path_is_what_the_user_wrote(override: str, says: str) -> None:
    with pytest.raises(ContractError) as caught:
        parse_contract(FinetuneJob, "publish: {name: a}", [override])
    assert f"- {says}" in str(caught.value) or says in str(caught.value)
