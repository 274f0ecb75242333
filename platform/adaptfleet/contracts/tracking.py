"""Where a run's curves go beside its own folder."""

from typing import Annotated, Literal

from pydantic import Field

from adaptfleet.contracts.base import Spec


class MlflowSpec(Spec):
    uri: Annotated[str, Field(min_length=1)]
    """A tracking server's URL, such as `http://mlflow:5000`, or a store's, such as `sqlite:////shared/mlflow.db`."""
    experiment: Annotated[str, Field(min_length=1)] = "adaptfleet"


class WandbSpec(Spec):
    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    """The user or team. None: the key's own."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run's folder, to be sent later by `wandb sync`."""


class TrackingSpec(Spec):
    """`metrics.jsonl` is always written. The other trackers get the same numbers; MLflow and W&B are packages to install."""

    tensorboard: bool = True
    mlflow: MlflowSpec | None = None
    wandb: WandbSpec | None = None
