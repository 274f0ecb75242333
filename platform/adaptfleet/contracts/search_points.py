"""From a point of a space to the job that it stands for, and the checks that every point is one."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from adaptfleet.contracts.base import Spec
from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import DistillJob, FinetuneJob
from adaptfleet.contracts.loading import offenders
from adaptfleet.contracts.names import near
from adaptfleet.contracts.serving import ServingSpec

if TYPE_CHECKING:
    from adaptfleet.contracts.search import Point, Space, SweepJob

KINDS: dict[str, type[Spec]] = {"compress": CompressJob, "finetune": FinetuneJob, "distill": DistillJob, "serve": ServingSpec}
_MAX_CHECKED = 2000
"""Points of a grid that are all checked beforehand; of a larger space each value is, on the baseline and on the base."""
_MAX_SHOWN = 6


def check_points(sweep: "SweepJob") -> None:
    """ContractError lists the paths that lead nowhere, and the points that are no legal job."""
    space = sweep.space
    kind = KINDS[space.job]
    values = base_values(sweep)
    try:
        base = kind.model_validate(values)
    except ValidationError as error:
        raise ContractError("the space's base is no contract: " + "; ".join(offenders(kind, error))) from None
    if getattr(base, "publish", None) is not None or (isinstance(base, CompressJob) and base.published_names()):
        raise ContractError("the space's base publishes; leave that out (publish: null, no publish step): finalists are published")
    wrong = []
    for name, axis in space.axes.items():
        wrong += [f"axes.{name}.path: {reason}" for reason in [_why_no_path(base, values, axis.path)] if reason]
        wrong += [f"axes.{name}.without: {reason}" for path in axis.without for reason in [_why_no_path(base, values, path)] if reason]
        if not axis.without and (axis.when or None in [axis.value(label) for label in axis.labels()]):
            missing = "it does not always apply" if axis.when else "it has a null value"
            wrong.append(f"axes.{name}: {missing}, so write in `without` which paths are left out then, such as without: [{axis.path}]")
    if wrong:
        raise ContractError("; ".join(wrong))
    for point in _checked_points(space):
        try:
            job_of(sweep, point)
        except ContractError as error:
            wrong.append(f"{point_id(point)}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _MAX_SHOWN} more points" if len(wrong) > _MAX_SHOWN else ""
        raise ContractError("points of the space are no legal job: " + "; ".join(wrong[:_MAX_SHOWN]) + more)


def _checked_points(space: "Space") -> Iterator["Point"]:
    yield normalised(space, space.baseline)
    if space.is_finite and space.grid_size <= _MAX_CHECKED:
        yield from grid(space)
        return
    for name, axis in space.axes.items():
        for label in axis.labels():
            yield normalised(space, {**space.baseline, name: label})


def grid(space: "Space") -> list["Point"]:
    """All points of a finite space, each once. The first axes change fastest: those that cost most come first in a space's file, so that
    what points share is made once and not waited for."""
    names = list(space.axes)
    product = itertools.product(*(space.axes[name].labels() for name in reversed(names)))
    points = (normalised(space, dict(zip(reversed(names), labels, strict=True))) for labels in product)
    return list({point_id(point): point for point in points}.values())


def normalised(space: "Space", point: "Point") -> "Point":
    """In the axes' order; axes that do not apply have None."""
    return {
        name: point[name] if all(point[other] in labels for other, labels in axis.when.items()) else None
        for name, axis in space.axes.items()
    }


def point_id(point: "Point") -> str:
    """Such as `rank8-ratio0.1-bits4`: readable, and safe in a path, a URL and a command."""
    parts = []
    for name, label in point.items():
        shown = "none" if label is None else f"{label:.6g}" if isinstance(label, float) else str(label).lower()
        parts.append(f"{name}{shown}")
    return "-".join(parts).replace("/", "_").replace(" ", "_")


def trial_name(config: Mapping[str, Any]) -> str:
    """Of a trial, by its configuration: its point, or its number in a population, whose points change."""
    return point_id(config["point"]) if config.get("member") is None else f"member{config['member']}"


def baseline_name(sweep: "SweepJob") -> str:
    """Of the trial that all others are compared with."""
    point = normalised(sweep.space, sweep.space.baseline)
    return trial_name({"point": point, "member": 0 if sweep.algorithm.kind == "population" else None})


def base_values(sweep: "SweepJob") -> dict[str, Any]:
    laid: dict[str, Any] = _laid_over(copy.deepcopy(sweep.space.base), sweep.over)
    steps = laid.get("steps")
    if isinstance(steps, list):
        laid["steps"] = [{"kind": step} if isinstance(step, str) else step for step in steps]
    return laid


def _laid_over(values: Any, over: Any) -> Any:
    """Keys of `over` replace or join those below; a list's members are named by their `kind`, as in an axis's path."""
    if isinstance(values, list) and isinstance(over, dict):
        merged = list(values)
        for kind, inner in over.items():
            places = [i for i, member in enumerate(merged) if _kind(member) == kind]
            if not places:
                raise ContractError(f"over names {kind!r}, but the base has {', '.join(map(str, map(_kind, merged)))}")
            member = merged[places[0]]
            merged[places[0]] = _laid_over({"kind": member} if isinstance(member, str) else member, inner)
        return merged
    if not isinstance(values, dict) or not isinstance(over, dict):
        return over
    return {**values, **{key: _laid_over(values[key], inner) if key in values else inner for key, inner in over.items()}}


def job_of(sweep: "SweepJob", point: "Point") -> Spec:
    """The contract of a point. ContractError: it is none."""
    space = sweep.space
    values = copy.deepcopy(base_values(sweep))
    dropped: list[str] = []
    for name, axis in space.axes.items():
        label = point[name]
        applies = all(point[other] in labels for other, labels in axis.when.items())
        value = axis.value(label) if applies else None
        if value is None:
            dropped += axis.without
        else:
            _put(values, axis.path, value)
    for path in dropped:
        _drop(values, path)
    kind = KINDS[space.job]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ContractError("; ".join(offenders(kind, error))) from None


def _kind(member: Any) -> Any:
    return member if isinstance(member, str) else member.get("kind") if isinstance(member, dict) else getattr(member, "kind", None)


def _step(place: Any, part: str) -> Any:
    if isinstance(place, list):
        return next(member for member in place if _kind(member) == part)
    return place[part]


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split(".")
    place: Any = values
    for part in parts:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _step(place, part)
    place[last] = copy.deepcopy(value)


def _drop(values: dict[str, Any], path: str) -> None:
    *parts, last = path.split(".")
    place: Any = values
    for part in parts:
        if isinstance(place, dict) and part not in place:
            return
        place = _step(place, part)
    if isinstance(place, list):
        place[:] = [member for member in place if _kind(member) != last]
    else:
        place.pop(last, None)


def _why_no_path(base: Spec, values: dict[str, Any], path: str) -> str | None:
    """Follows the path through the base's contract. None: it leads to a key."""
    place: Any = base
    walked: list[str] = []
    for part in path.split("."):
        at = ".".join(walked) or "the contract"
        if isinstance(place, BaseModel):
            known = list(type(place).model_fields)
            if part not in known:
                return f"{part!r} is no key of {at}.{near(part, known)} It has {', '.join(known)}"
            place = getattr(place, part)
        elif isinstance(place, tuple) and place and all(_kind(member) for member in place):
            kinds = [str(_kind(member)) for member in place]
            if part not in kinds:
                return f"{part!r} is none of {at}.{near(part, kinds)} The base has {', '.join(kinds)}"
            place = place[kinds.index(part)]
        elif isinstance(place, dict):
            place = place.get(part)
        else:
            return f"{at} is {place!r} in the base, which has no keys; write it there, so that {path!r} leads somewhere"
        walked.append(part)
    return None
