"""What one process writes down of a cluster so that another can find it, use it, and stop it."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from adaptfleet.contracts.errors import AdaptfleetError
from adaptfleet.contracts.home import home
from adaptfleet.on_ray.cluster.processes import ProcessId


@dataclass(frozen=True)
class ClusterRecord:
    marker: str
    folder: str
    address: str
    """Host and port of the cluster's control store: RAY_ADDRESS."""
    dashboard_url: str
    num_cpus: int
    leader: ProcessId
    owner: ProcessId | None
    """The process whose end ends the cluster. None: it runs until it is stopped."""


def default_record() -> Path:
    return home() / "local-cluster.json"


def write_record(record: ClusterRecord, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as handle:
        json.dump(asdict(record), handle, indent=1)
    written.replace(file)


def read_record(file: Path) -> ClusterRecord | None:
    """None: no cluster was written down. Whether it still runs is for the reader to see."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise AdaptfleetError(f"{file} is no cluster record. Remove it once no local cluster runs.") from None
    try:
        owner = values.pop("owner")
        return ClusterRecord(leader=ProcessId(**values.pop("leader")), owner=ProcessId(**owner) if owner else None, **values)
    except (TypeError, KeyError, AttributeError):
        raise AdaptfleetError(f"{file} is no cluster record of this version. Remove it once no local cluster runs.") from None


def remove_record(file: Path, marker: str) -> None:
    """Only where it still is this cluster's."""
    record = read_record(file)
    if record is not None and record.marker == marker:
        with contextlib.suppress(FileNotFoundError):
            file.unlink()
