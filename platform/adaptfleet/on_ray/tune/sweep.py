"""A sweep from contract to a measured, published front and its report."""

import logging
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaptfleet.contracts.compression import CompressJob, Quantize
from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import Grid, Point, SweepJob
from adaptfleet.contracts.search_points import grid, job_of, normalised, trial_name
from adaptfleet.on_ray.joining import joined_cluster
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder
from adaptfleet.store.registry import Registry

if TYPE_CHECKING:
    from adaptfleet.on_ray.tune.computing import Place

log = logging.getLogger(__name__)
_MAX_CHECKED = 500
_TRIAL_BYTES = 200 * 2**20
"""Memory of a trial's own process, which only waits. It takes no CPU from the tasks it waits for."""
_TRIAL_FAILURES = 2
"""Times that a trial's process may be killed and begun again; what it had made by then is kept."""


def run_sweep(sweep: SweepJob) -> str:
    """Searches, measures and publishes the front, writes the report: what to do next, in a line.

    The same contract submitted again goes on where it stopped: no finished point is made again.
    """
    registry = Registry.open()
    _check(sweep, registry)
    folder = SweepFolder.open(sweep)
    with folder.held(), joined_cluster():
        # Ray reads its environment when it is imported.
        import ray

        with ray.init(log_to_driver=False):
            from adaptfleet.on_ray.tune.computing import Place
            from adaptfleet.on_ray.tune.finalists import settle
            from adaptfleet.on_ray.tune.searcher import concurrency

            place = Place.here(concurrency(sweep))
            search(sweep, folder, place)
            return settle(sweep, folder, place, registry)


def _check(sweep: SweepJob, registry: Registry) -> None:
    """All that can be wrong with a space's jobs, before a cluster is started."""
    from adaptfleet.on_ray.train.tracking import check_trackers
    from adaptfleet.on_ray.tune.preflight import check

    check_trackers(sweep)
    baseline = job_of(sweep, sweep.space.baseline)
    points = grid(sweep.space)[:_MAX_CHECKED] if sweep.space.is_finite and sweep.space.grid_size <= _MAX_CHECKED else []
    check(sweep, baseline, points or [normalised(sweep.space, sweep.space.baseline)], registry)
    if any(isinstance(job, CompressJob) and job.step(Quantize) for job in (job_of(sweep, point) for point in points)):
        from adaptfleet.core.quantization.environment import quantizer_python

        quantizer_python()


def search(sweep: SweepJob, folder: SweepFolder, place: "Place") -> None:
    """Runs the trials that are left, on Ray Tune."""
    from ray import tune

    from adaptfleet.on_ray.tune.progress import SweepProgress
    from adaptfleet.on_ray.tune.stopping import DominanceStopper
    from adaptfleet.on_ray.tune.tracking import SweepTracking

    attempt = int((folder.read_json("attempt.json") or {"attempt": 0})["attempt"]) + 1
    folder.write_json("attempt.json", {"attempt": attempt})
    folder.start_clock()
    seconds = _seconds_left(sweep, folder)
    if seconds is not None and seconds <= 0:
        log.info("the time of the budget is spent; %d points are known", len(folder.records()))
        return
    match sweep.algorithm:
        case Grid():
            total: int | None = len(grid(sweep.space))
        case Population(size=size):
            total = size
        case _:
            total = sweep.limits.trials
    known = [record for record in folder.records().values() if record.status != "failed"]
    log.info("sweep %s in %s: %s points, %d of them known", sweep.name, folder.path, total or "any number of", len(known))
    stopper = DominanceStopper(sweep)
    # what points of earlier beginnings had come to is no less ahead
    for record in known:
        if record.status == "finished":
            stopper("", {"point_id": record.point_id, "stage": "finished", **record.metrics})
    tracking = SweepTracking(sweep, folder)
    progress = SweepProgress(sweep, folder, stopper, attempt, total, seconds)
    function, chosen, space = _population(sweep, folder) if isinstance(sweep.algorithm, Population) else _trials(sweep, folder)
    if not space:
        return
    tuner = tune.Tuner(
        tune.with_resources(function, {"CPU": 0, "memory": _TRIAL_BYTES}),
        param_space={"place": place, "folder": str(folder.path), "attempt": attempt, **space},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            time_budget_s=seconds,
            trial_dirname_creator=lambda trial: f"{trial_name(trial.config)[:60]}-{trial.trial_id}",
            **chosen,
        ),
        run_config=tune.RunConfig(
            name=f"beginning-{attempt}",
            storage_path=str(folder.path / "tune"),
            stop=stopper,
            callbacks=[progress, tracking],
            failure_config=tune.FailureConfig(max_failures=_TRIAL_FAILURES),
            verbose=0,
        ),
    )
    with progress, tracking:
        tuner.fit()
    folder.tick()
    if not any(record.status == "finished" for record in folder.records().values()):
        reasons = {record.reason for record in folder.records().values() if record.status == "failed"}
        raise TrainingError(f"no point of the sweep came to an end. {'; '.join(sorted(reasons))[:2000]}")


Chosen = tuple[Callable[[dict[str, Any]], None], dict[str, Any], dict[str, Any]]
"""A Tune function, how its trials are chosen and ended, and what they are given. Given nothing: there is none to run."""


def _trials(sweep: SweepJob, folder: SweepFolder) -> Chosen:
    """A trial for each point."""
    from adaptfleet.on_ray.tune.searcher import PointSearcher
    from adaptfleet.on_ray.tune.stopping import scheduler
    from adaptfleet.on_ray.tune.trial import run_trial

    chosen = {"search_alg": PointSearcher(sweep, folder), "scheduler": scheduler(sweep), "num_samples": -1}
    return run_trial, chosen, {"member": None}


def _population(sweep: SweepJob, folder: SweepFolder) -> Chosen:
    """A trial for each member that has not finished."""
    from ray import tune

    from adaptfleet.on_ray.tune.member import run_member
    from adaptfleet.on_ray.tune.population import PopulationScheduler, meeting_step, unfinished_members
    from adaptfleet.on_ray.tune.searcher import concurrency

    members = unfinished_members(sweep, folder)

    def point_of(config: dict[str, Any]) -> Point:
        return members[config["member"]]

    barrier = meeting_step(folder, list(members))
    space = {
        "member": tune.grid_search(list(members)),
        "point": tune.sample_from(point_of),
        "at_a_time": concurrency(sweep),
        "barrier": barrier,
    }
    return run_member, {"scheduler": PopulationScheduler(sweep, barrier)}, space if members else {}


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _seconds_left(sweep: SweepJob, folder: SweepFolder) -> float | None:
    """The smaller of what is left of both times; None: neither is limited."""
    limits = sweep.limits
    found = [limits.wall_s] if limits.wall_s else []
    if limits.cpu_hours:
        found.append(limits.cpu_hours * 3600 / _cpus())
    return min(found) - folder.search_s() if found else None


def remove_steps(folder: SweepFolder, kept: set[str]) -> int:
    """Removes the checkpoints that no kept point stands on; their numbers stay. The bytes freed."""
    freed = 0
    for step in folder.steps.iterdir():
        if step.name not in kept:
            freed += sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
            shutil.rmtree(step, ignore_errors=True)
    return freed
