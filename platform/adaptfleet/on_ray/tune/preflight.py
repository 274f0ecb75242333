"""What can be wrong with a sweep, found before its first trial."""

import shutil
from collections.abc import Sequence

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ContractError, StoreError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.search import Point, SweepJob
from adaptfleet.contracts.search_points import job_of, point_id
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.store.registry import Registry


def check(sweep: SweepJob, baseline: Spec, points: Sequence[Point], registry: Registry) -> None:
    """Model, data, shapes, names and disk. Each fault is told with the point that has it."""
    _check_name(sweep, registry)
    match baseline:
        case CompressJob():
            from adaptfleet.on_ray.tune.compress_steps import check_all, prepared

            found = prepared(sweep.model_dump_json())
            check_all(sweep, points)
            _check_disk(sweep, points, found.parent_bytes)
        case FinetuneJob():
            from adaptfleet.on_ray.train.preflight import prepare

            for point in points:
                job = job_of(sweep, point)
                assert isinstance(job, FinetuneJob)
                try:
                    prepare(job, registry, lambda: None)
                except ContractError as error:
                    raise ContractError(f"{point_id(point)}: {error}") from None
        case ServingSpec():
            from adaptfleet.core.models.loading import resolve_model_folder
            from adaptfleet.on_ray.published_models import at_hand

            if baseline.more_bases:
                raise ContractError("more_bases: a search measures one engine. Leave them out, and search for each base by itself.")
            resolve_model_folder(at_hand(baseline.model, registry))


def _check_name(sweep: SweepJob, registry: Registry) -> None:
    """The finalists' name must be free for what they are."""
    if sweep.space.job == "serve" or not sweep.finalists.max:
        return
    name = sweep.finalists.name or sweep.name
    wanted = "model" if sweep.space.job == "compress" else "adapter"
    listing = registry.snapshot().get(name)
    if listing is not None and listing.versions:
        kind = registry.manifest(name, listing.versions[-1]).kind
        if kind != wanted:
            raise ContractError(f"{name} is of the kind {kind}, but finalists are of the kind {wanted}. Give finalists.name another name.")


def _check_disk(sweep: SweepJob, points: Sequence[Point], parent_bytes: int) -> None:
    """Every distinct step at the parent's size is more than what there will be."""
    names = set()
    for point in points:
        job = job_of(sweep, point)
        assert isinstance(job, CompressJob)
        for number in range(len(job.steps)):
            if job.steps[number].kind != "recover":
                names.add("/".join(step.model_dump_json() for step in job.steps[: number + 1]))
    wanted = len(names) * parent_bytes
    place = next(folder for folder in (home(), *home().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise StoreError(
            f"{place} has {free:,} bytes free, but the sweep's {len(names)} checkpoints may take {wanted:,} until it ends. Free space, set "
            "ADAPTFLEET_HOME to a larger disk, or search fewer points."
        )
