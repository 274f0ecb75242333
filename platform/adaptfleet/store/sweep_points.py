"""Points of sweeps by name: `sweep/NAME#POINT` is the newest version that says it is this point."""

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import ContractError, NotFoundError
from adaptfleet.contracts.names import check_name, near
from adaptfleet.store.registry import Registry

_PREFIX = "sweep/"


def is_point(reference: str) -> bool:
    return reference.startswith(_PREFIX)


def version_of_point(registry: Registry, reference: str) -> Manifest:
    """NotFoundError names the points of the sweep that are published; ContractError: it is of another form."""
    sweep, hash_sign, point = reference.removeprefix(_PREFIX).partition("#")
    check_name(sweep)
    if not hash_sign or not point:
        raise ContractError(f"{reference!r} names no point. Write sweep/NAME#POINT; report.html and front.json of the sweep name them.")
    found: dict[str, Manifest] = {}
    sweeps: set[str] = set()
    for name, listing in registry.snapshot().items():
        for version in listing.versions:
            manifest = registry.manifest(name, version)
            origin = manifest.method or {}
            if "sweep" not in origin:
                continue
            sweeps.add(str(origin["sweep"]))
            if origin["sweep"] == sweep:
                known = found.get(str(origin.get("point")))
                if known is None or known.created_at < manifest.created_at:
                    found[str(origin.get("point"))] = manifest
    if not found:
        raise NotFoundError(f"no point of the sweep {sweep!r} is published.{near(sweep, sweeps)}")
    if point not in found:
        raise NotFoundError(f"the sweep {sweep!r} has published no point {point!r}.{near(point, found)} Published: {', '.join(found)}.")
    return found[point]
