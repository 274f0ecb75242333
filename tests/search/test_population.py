"""Population-based training: what a contract may say of it, who takes over from whom, and a real population through kill -9."""

import json
import math
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import load_contract, parse_contract
from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import SPACES, SweepJob
from adaptfleet.on_ray.tune.lineage import Leg, Lineage, schedule
from adaptfleet.on_ray.tune.population import first_points, meeting_step, unfinished_members
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder
from adaptfleet.store.registry import Registry
from tests.search.test_sweep import LIMIT_S, said, started

SPACE: dict[str, Any] = yaml.safe_load((SPACES / "learning_rate_population.yaml").read_text())
POPULATION = {"kind": "population", "size": 4, "interval_steps": 20}


def sweep(algorithm: dict[str, Any] | None = None, **space: Any) -> SweepJob:
    values = {"job": "sweep", "name": "s", "space": {**SPACE, **space}, "algorithm": {**POPULATION, **(algorithm or {})}}
    return parse_contract(SweepJob, yaml.safe_dump(values, sort_keys=False))


@pytest.mark.parametrize(
    ("algorithm", "space", "messages"),
    [
        (
            {},
            {
                "axes": {**SPACE["axes"], "rank": {"path": "method.rank", "values": [8, 16]}},
                "baseline": {**SPACE["baseline"], "rank": 16},
                "early_stopping": {"kind": "asha"},
                "budget": {"trials": 3},
            },
            [
                "axes.rank (method.rank) cannot change in the middle of a training; a population changes train.learning_rate, ",
                "early_stopping.kind is 'asha', but members of a population take over from others instead of ending; leave it out",
                "budget.trials is 3, but a population has algorithm.size (4) members; leave it out",
            ],
        ),
        (
            {"interval_steps": 80},
            {},
            ["algorithm.interval_steps is 80, but the training ends at step 80 (train.max_steps)", "use 20 or so"],
        ),
        ({}, {"objectives": [{"metric": "bytes"}]}, ["compares by eval_loss alone, but objectives has bytes (min)"]),
        ({}, {"budget": {"train_tokens": 1000}}, ["budget.train_tokens is 1,000, but 4 members of 80 steps may take 163,840"]),
        ({"factors": [1.0]}, {}, ["algorithm.factors is [1.0]; use numbers above 0 that change something"]),
        ({"quantile": 0.6}, {}, ["algorithm.quantile", "less than or equal to 0.5"]),
        (
            {},
            {"axes": {"weight_decay": {"path": "train.weight_decay", "values": [0.0, 0.1]}}, "baseline": {"weight_decay": 0.0}},
            ["algorithm.size is 4, but the axes have only 2 points; use a smaller size, or a range"],
        ),
    ],
)
def test_what_a_population_is_not_told(algorithm: dict[str, Any], space: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ContractError) as told:
        sweep(algorithm, **space)
    assert all(message in str(told.value) for message in messages), told.value


def test_only_trainings_are_populations() -> None:
    with pytest.raises(ContractError, match="'population', which trains, but the space is of compress jobs; use a finetune or distill"):
        parse_contract(SweepJob, "{job: sweep, name: s, space: joint, algorithm: {kind: population}}")


def test_members_begin_with_distinct_points_of_a_seed_and_the_baseline_is_the_first() -> None:
    space = sweep().space
    points = first_points(space, Population(size=6, seed=3))
    assert points[0] == space.baseline and len({json.dumps(point) for point in points}) == 6
    assert points == first_points(space, Population(size=6, seed=3)) != first_points(space, Population(size=6, seed=4))


def test_an_interrupted_population_goes_on_with_what_was_begun(fresh_home: Path) -> None:
    job = sweep({"size": 3})
    folder = SweepFolder.open(job)
    lineage = Lineage(folder)
    firsts = first_points(job.space, Population(size=3))
    good = Leg("segment-a", firsts[0], 0, 20, eval_loss=1.0)
    bad = Leg("segment-b", firsts[1], 0, 20, eval_loss=math.inf, reason="the loss is nan")
    taken = Leg("segment-c", {"learning_rate": 6e-4, "weight_decay": 0.01}, 20, 40, before="segment-a", taken_from=0)
    lineage.write(0, [good])
    lineage.write(1, [bad, taken])
    folder.record(Record("member2", firsts[2], "finished", {"eval_loss": 2.0}))
    assert unfinished_members(job, folder) == {0: firsts[0], 1: taken.point}
    assert meeting_step(folder, [0, 1]) == 40, "member 1 was on its way there"
    assert lineage.of(1) == [bad, taken] and lineage.descent(taken) == [good, taken]
    assert schedule([good, taken]) == [(0, firsts[0]), (20, taken.point)]


def test_checkpoints_stay_while_someone_may_begin_with_them(fresh_home: Path) -> None:
    folder = SweepFolder.open(sweep())
    lineage = Lineage(folder)
    legs = [
        Leg(f"segment-{n}", {}, n * 20, n * 20 + 20, f"segment-{n - 1}" if n else None, eval_loss=1.0, is_last=n == 3) for n in range(4)
    ]
    for leg in legs:
        lineage.checkpoint(leg).mkdir(parents=True)
    lineage.write(0, legs)
    lineage.write(1, [Leg("segment-x", {}, 20, 40, before="segment-0", taken_from=0)])
    lineage.trim()
    assert [lineage.checkpoint(leg).is_dir() for leg in legs] == [True, False, True, True]
    lineage.trim(is_over=True)
    assert [lineage.checkpoint(leg).is_dir() for leg in legs] == [True, False, False, False], "an unfinished leg began with the first"


@pytest.mark.usefixtures("local_cluster")
def test_members_that_leave_diverge_or_are_the_baseline(tmp_path: Path) -> None:
    """Ray's own scheduling, with members that count instead of training."""
    import ray
    from ray import tune

    from adaptfleet.on_ray.tune.population import PopulationScheduler

    def count(config: dict[str, Any]) -> None:
        member, begun, source = config["member"], 0, None
        checkpoint = tune.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                source, begun = json.loads((Path(folder) / "at.json").read_text())
        for step in range(begun + 10, 41, 10):
            if member == 2 and step == 20:
                return  # the others wait for it, or will
            with (tmp_path / f"{member}.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step, "source": source, "point": config["point"]}) + "\n")
            told = {"stage": f"step {step}", "step": step, "eval_loss": math.inf if (member, step) == (3, 10) else 1.0 + member}
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "at.json").write_text(json.dumps([member, step]))
                tune.report(told, checkpoint=tune.Checkpoint.from_directory(folder))
            source = member
        tune.report({"stage": "finished", "step": 40, "eval_loss": 1.0 + member})

    job = sweep({"size": 4, "interval_steps": 10, "quantile": 0.5})
    points = first_points(job.space, Population(size=4))
    with ray.init(log_to_driver=False):
        tuner = tune.Tuner(
            tune.with_resources(count, {"CPU": 0, "memory": 2**20}),
            param_space={"member": tune.grid_search([0, 1, 2, 3]), "point": tune.sample_from(lambda config: points[config["member"]])},
            tune_config=tune.TuneConfig(scheduler=PopulationScheduler(job), reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
        )
        assert tuner.fit().num_errors == 0
    lines = {n: [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in range(4)}
    assert [len(lines[n]) for n in range(4)] == [4, 4, 1, 4], "the one that left holds up nobody"
    assert {line["source"] for line in lines[0]} == {None, 0} and all(line["point"] == points[0] for line in lines[0])
    assert lines[3][1]["source"] in (0, 1) and lines[3][1]["point"] != points[3], "it had diverged"
    low, high = job.space.axes["learning_rate"].labels()
    rates = [line["point"]["learning_rate"] for told in lines.values() for line in told]
    assert all(low <= rate <= high for rate in rates) and len(set(rates)) > 4


def contract(folder: Path, base: Path, rows: Path) -> tuple[Path, SweepJob]:
    """Two members: the baseline learns, and the other one's learning rate teaches it nothing."""
    space = {
        "job": "finetune",
        "base": {
            "model": {"source": str(base)},
            "data": {"train": str(rows)},
            "method": {"kind": "lora", "rank": 8},
            "train": {"epochs": 8, "max_steps": 16, "pack_tokens": 64, "packs_per_step": 2, "warmup_fraction": 0.0, "compile": "off"},
            "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0},
            "checkpoint": {"every_steps": 4},
            "cluster": {"cpus_per_worker": 1},
            "publish": None,
        },
        "axes": {"learning_rate": {"path": "train.learning_rate", "values": [1e-6, 0.01]}},
        "baseline": {"learning_rate": 0.01},
        "objectives": [{"metric": "eval_loss"}],
    }
    file = folder / "population.yaml"
    values = {
        "job": "sweep",
        "name": "population",
        "space": space,
        "algorithm": {"kind": "population", "size": 2, "interval_steps": 8, "quantile": 0.5, "resample": 0.0},
        "max_concurrent": 1,
        "finalists": {"max": 1, "name": "population-adapter"},
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file, load_contract(SweepJob, file)


def train_losses(home: Path, sweep: SweepJob, leg: Leg) -> dict[int, float]:
    run = home / "runs" / f"sweep-{sweep.run_name()[-16:]}-{leg.name.partition('-')[2]}"
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.slow
def test_a_bad_learning_rate_takes_over_a_good_ones_weights_through_kill_9(
    embedded_home: Path, small_base: Path, sums: Path, tmp_path: Path
) -> None:
    file, job = contract(tmp_path, small_base, sums)
    folder = SweepFolder(embedded_home / "runs" / job.run_name())
    # a cluster of its own, which ends with the driver
    process = started(file, RAY_ADDRESS="")
    end = time.monotonic() + LIMIT_S

    def second_has_begun() -> bool:
        return any(leg.begins == 8 and leg.taken_from == 0 for leg in Lineage(folder).of(1)) if folder.path.is_dir() else False

    while not second_has_begun():
        assert process.poll() is None and time.monotonic() < end, said(file)[-3000:]
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = {step: step.stat().st_mtime_ns for step in folder.steps.glob("segment-*")}
    assert len(made) >= 2

    process = started(file, RAY_ADDRESS="")
    assert process.wait(timeout=LIMIT_S) == 0, said(file)[-3000:]
    lineage = Lineage(folder)
    good, bad = lineage.of(0), lineage.of(1)
    assert all((step / "metrics.json").stat().st_mtime_ns <= at for step, at in made.items()), "finished legs are not made again"
    assert [(leg.begins, leg.ends) for leg in good] == [(0, 8), (8, 16)] == [(leg.begins, leg.ends) for leg in bad]
    assert [leg.taken_from for leg in good] == [None, None] and {leg.point["learning_rate"] for leg in good} == {0.01}
    assert good[1].before == good[0].name and bad[0].point == {"learning_rate": 1e-6}
    assert bad[1].taken_from == 0 and bad[1].before == good[0].name and bad[1].point == {"learning_rate": 1e-6}, "of two the other one"
    # the next step's loss is of the weights that were taken over, before any update of its own
    assert train_losses(embedded_home, job, bad[1])[9] == pytest.approx(train_losses(embedded_home, job, good[1])[9], rel=1e-6)
    assert (bad[1].eval_loss or math.inf) < (bad[0].eval_loss or 0.0) / 2, "which its own learning rate had taught nothing"

    records = folder.records()
    assert {name: record.status for name, record in records.items()} == {"member0": "finished", "member1": "finished"}
    for number, legs in enumerate((good, bad)):
        record = records[f"member{number}"]
        assert record.metrics["eval_loss"] == legs[-1].eval_loss and record.steps == [leg.name for leg in lineage.descent(legs[-1])]
    events = [json.loads(line)["point"] for line in (folder.path / "history.jsonl").read_text().splitlines()]
    assert sorted(events) == ["member0", "member1"]
    costs = folder.costs()
    names = {leg.name for leg in [*good, *bad]}
    assert names <= set(costs) and all(costs[name].tokens > 0 and costs[name].cpu_s > 0 for name in names)
    assert not list(folder.steps.glob("segment-*/checkpoint")), "no one will begin with them"
    manifest = Registry.open().resolve("population-adapter@1")
    assert manifest.method and manifest.method["schedule"][0]["from_step"] == 0
    page = (folder.path / "report.html").read_text()
    assert "The population" in page and page.count("<td>member0</td>") >= 4, "its own legs, and those of the one that took over"
    boards = {board.name for board in (folder.path / "tensorboard").iterdir()}
    assert boards == {"member0", "member1"}
    assert f"sweep/{job.name}#{manifest.method['point']}" in said(file)
