"""Evaluations beside a version, on disk and on S3, and the gate that reads them."""

import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import ContractError, CorruptError, NotFoundError, PublishError
from adaptfleet.contracts.evaluating import EvaluationRecord, MetricEstimate
from adaptfleet.store.gate import Requirement, check_requirements
from adaptfleet.store.registry import Registry
from tests.store.drafts import dataset


def record(run: str = "run", **metrics: float) -> EvaluationRecord:
    return EvaluationRecord(
        reference="rows@1",
        data="address-json",
        rows_sha256="0" * 64,
        num_rows=150,
        metrics={name: MetricEstimate(value=v, low=v - 0.05, high=v + 0.05, num_rows=150) for name, v in metrics.items()},
        contract_fingerprint="0" * 16,
        run=run,
        evaluated_at=datetime.now(UTC),
    )


def test_evaluations_stand_beside_a_version_that_stays_as_it_is(registry: Registry, rows: Path) -> None:
    published = registry.publish(dataset(metrics={"exact_match": 0.5}), rows)
    registry.publish(dataset(), rows)
    assert registry.evaluations("rows@1") == []
    first, second = record("a", exact_match=0.7), record("b", exact_match=0.8)
    assert [registry.add_evaluation("rows@1", r) for r in (first, second)] == [1, 2]
    assert registry.evaluations("rows@1") == [first, second] and registry.evaluations("rows") == []
    assert registry.resolve("rows@1") == published and registry.versions("rows") == [1, 2]
    with pytest.raises(NotFoundError, match="rows@9 does not exist"):
        registry.add_evaluation("rows@9", first)


def test_evaluations_added_at_once_are_all_kept(registry: Registry, rows: Path) -> None:
    registry.publish(dataset(), rows)
    records = [record(f"run-{i}", exact_match=i / 10) for i in range(8)]
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda r=r: numbers.append(registry.add_evaluation("rows", r))) for r in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert {r.run for r in registry.evaluations("rows")} == {r.run for r in records}


def test_a_repeated_write_of_the_same_record_is_one(registry: Registry, rows: Path) -> None:
    """A retried request finds its own record: the answer to the first was lost."""
    registry.publish(dataset(), rows)
    one = record(exact_match=0.7)
    objects, put_new = registry._objects, registry._objects.put_new
    objects.put_new = lambda key, content: put_new(key, content) and put_new(key, content)  # type: ignore[method-assign]
    assert registry.add_evaluation("rows", one) == 1
    assert registry.evaluations("rows") == [one]


def test_a_damaged_record_is_named(registry: Registry, rows: Path) -> None:
    registry.publish(dataset(), rows)
    registry.add_evaluation("rows", record(exact_match=0.7))
    (key,) = (info.key for info in registry._objects.list("evaluations"))
    registry._objects.put(key, b'{"reference": 1}')
    with pytest.raises(CorruptError, match=key):
        registry.evaluations("rows")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("exact_match>=0.8", Requirement("exact_match", ">=", 0.8)),
        (" eval_loss < 1e-1 ", Requirement("eval_loss", "<", 0.1)),
        ("lm_eval/task/acc>.5", Requirement("lm_eval/task/acc", ">", 0.5)),
        ("x<=-2", Requirement("x", "<=", -2.0)),
    ],
)
def test_requirements(text: str, parsed: Requirement) -> None:
    assert Requirement.parse(text) == parsed


@pytest.mark.parametrize("text", ["exact_match", "exact_match=0.8", "exact_match>=", ">=1", "a>=nan", "a>=1>=2", "a=>1", "a!=1", ""])
def test_what_is_no_requirement(text: str) -> None:
    with pytest.raises(ContractError, match="is not of the form METRIC SIGN NUMBER"):
        Requirement.parse(text)


@pytest.mark.parametrize(("sign", "holds"), [(">=", [False, True, True]), (">", [False, False, True])])
def test_bounds(sign: str, holds: list[bool]) -> None:
    values = (0.79, 0.8, 0.81)
    assert [Requirement("m", sign, 0.8).holds(v) for v in values] == holds
    other = {">=": "<", ">": "<="}[sign]
    assert [Requirement("m", other, 0.8).holds(v) for v in values] == [not h for h in holds]


def test_the_gate_reads_the_newest_evaluation_and_then_the_manifest(tmp_path: Path, rows: Path) -> None:
    registry = Registry.open((tmp_path / "store").as_uri())
    manifest = registry.publish(dataset(metrics={"exact_match": 0.9, "train_loss": 0.2}), rows)

    def check(*texts: str) -> None:
        check_requirements(registry, manifest, [Requirement.parse(text) for text in texts])

    check("exact_match>=0.9", "train_loss<0.3")
    registry.add_evaluation("rows", record(exact_match=0.95, perplexity=1.5))
    registry.add_evaluation("rows", record(exact_match=0.7))
    check("exact_match>=0.7", "train_loss<0.3")
    with pytest.raises(PublishError) as told:
        check("exact_match>=0.8", "exact_matsh>=0.1", "perplexity<2", "train_loss<0.1")
    for fact in (
        "rows@1 is not promoted",
        "exact_match is 0.7 (evaluated 20",
        "on 150 rows of address-json, 95% interval 0.65 to 0.75), but exact_match >= 0.8 is required",
        "exact_matsh is not known of it, but exact_matsh >= 0.1 is required. Did you mean 'exact_match'? Known: exact_match, train_loss",
        "perplexity is not known of it",
        "train_loss is 0.2 (measured when it was made)",
        "--set 'subjects=[rows@1]'",
    ):
        assert fact in str(told.value)
