"""Trackers of a run's curves: TensorBoard, MLflow and Weights & Biases behind one small protocol.

MLflow and W&B are imported by name and only where the contract asks for them: they are no dependency of the library.
"""

import importlib
import importlib.util
import json
import logging
import netrc
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from torch.utils.tensorboard import SummaryWriter

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.search import SweepJob
from adaptfleet.contracts.tracking import MlflowSpec, WandbSpec
from adaptfleet.on_ray.train.cluster_metrics import ClusterMetrics

log = logging.getLogger(__name__)
INSTALL = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""Modules and the packages that bring them."""
_MAX_PARAMETERS = 100
"""MLflow takes so many in one message."""


class Tracker(Protocol):
    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """The numbers of an update (`train`) or of an evaluation."""

    def close(self) -> None: ...


def check_trackers(job: FinetuneJob | SweepJob) -> None:
    """ContractError for each tracker that is not installed, not reachable or without a key, before anything is trained."""
    offenders = [
        f"tracking.{name} is set, but {name} is not installed. Install it where the workers run: pip install {package}; or set "
        f"tracking.{name}=null."
        for name, package in INSTALL.items()
        if getattr(job.tracking, name) is not None and importlib.util.find_spec(name) is None
    ]
    if not offenders and job.tracking.mlflow is not None:
        offenders += _mlflow_offenders(job.tracking.mlflow)
    if not offenders and job.tracking.wandb is not None:
        offenders += _wandb_offenders(job.tracking.wandb)
    if offenders:
        raise ContractError("\n".join(offenders))


def open_trackers(job: FinetuneJob, folder: Path, step: int) -> list[Tracker]:
    """The cluster's metrics, and what the contract asks for. A resumed run goes on in the runs it began there, after `step`."""
    trackers: list[Tracker] = [ClusterMetrics(job.run_name(), folder)]
    if job.tracking.tensorboard:
        trackers.append(TensorBoard(folder, step))
    if job.tracking.mlflow is not None:
        tags = {"adaptfleet.fingerprint": job.fingerprint(), "adaptfleet.publish": job.publish.name if job.publish else "-"}
        parameters = flat(job.model_dump(mode="json"))
        trackers.append(Mlflow(job.tracking.mlflow, folder / "mlflow.json", job.run_name(), tags, parameters))
    if job.tracking.wandb is not None:
        trackers.append(Wandb(job.tracking.wandb, job, folder))
    return trackers


class TensorBoard:
    """Event files under `tensorboard/`; what lies after the checkpoint is marked as overwritten."""

    def __init__(self, folder: Path, step: int) -> None:
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self._board.close()


class Mlflow:
    """A run of an MLflow experiment. Its id is kept in a file, so that a resumed run goes on in it."""

    def __init__(
        self,
        spec: MlflowSpec,
        kept: Path,
        name: str,
        tags: dict[str, str],
        parameters: Iterable[tuple[str, str]],
        parent: str | None = None,
    ) -> None:
        """`parent`: the id of the run that this one is shown under."""
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=spec.uri)
        if kept.exists():
            self.run_id: str = json.loads(kept.read_text())["run_id"]
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(spec.experiment)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(spec.experiment)
        nested = {"mlflow.parentRunId": parent} if parent else {}
        self.run_id = self._client.create_run(experiment, run_name=name, tags={**tags, **nested}).info.run_id
        told = [self._entities.Param(key, value) for key, value in parameters]
        for begin in range(0, len(told), _MAX_PARAMETERS):
            self._client.log_batch(self.run_id, params=told[begin : begin + _MAX_PARAMETERS])
        kept.write_text(json.dumps({"uri": spec.uri, "run_id": self.run_id}))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(f"{kind}/{key}", value, now, step) for key, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, status: str = "FINISHED") -> None:
        self._client.set_terminated(self.run_id, status)


class Wandb:
    """A run of a W&B project. Its id is the run's folder's name, so that a resumed run goes on in it."""

    def __init__(self, spec: WandbSpec, job: FinetuneJob, folder: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=spec.project,
            entity=spec.entity,
            mode=spec.mode,
            id=job.run_name(),
            name=job.run_name(),
            resume="allow",
            dir=str(folder),
            config=job.model_dump(mode="json"),
        )

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"train": {"epochs": 2}}` as (`train.epochs`, `2`)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _mlflow_offenders(spec: MlflowSpec) -> list[str]:
    # MLflow's own default would try for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        mlflow: Any = importlib.import_module("mlflow")
        mlflow.MlflowClient(tracking_uri=spec.uri).get_experiment_by_name(spec.experiment)
    except Exception as error:  # whatever its store raises: a wrong URL, no driver, no such host
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        return [f"tracking.mlflow.uri {spec.uri!r} cannot be used: {reason[:300]}. Correct it, or set tracking.mlflow=null."]
    return []


def _wandb_offenders(spec: WandbSpec) -> list[str]:
    if spec.mode == "offline" or os.environ.get("WANDB_API_KEY"):
        return []
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        if netrc.netrc().authenticators(host):
            return []
    except (OSError, netrc.NetrcParseError):
        pass
    return [f"tracking.wandb has no key for {host}: set WANDB_API_KEY, or tracking.wandb.mode=offline, or tracking.wandb=null."]
