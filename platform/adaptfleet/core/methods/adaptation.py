"""What a method of adaptation does with a model: the one seam between the training loop and the methods."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adaptfleet.core.export import export_adapter

AdaptedModel = PreTrainedModel | PeftModel


class Adaptation(ABC):
    """One method with its contract. Subclasses say how it is attached and how its result is saved; most need nothing else."""

    compilable = True
    """Whether the adapted decoder layers can be compiled one by one."""
    shardable = True
    """Whether its parameters may be sharded with FSDP2."""

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027  most methods need nothing here
        """ContractError for what does not fit the architecture. `model` may be on the meta device."""

    @abstractmethod
    def attach(self, model: PreTrainedModel, seed: int) -> AdaptedModel:
        """The model with its trainable parameters, the same for every worker: whatever is drawn at random is drawn from the seed."""

    def export(self, model: AdaptedModel, folder: Path, base_id: str) -> None:
        """Saves the trained part: in peft's format unless a method says otherwise."""
        assert isinstance(model, PeftModel)
        export_adapter(model, folder, base_id)

    def merged(self, model: AdaptedModel) -> PreTrainedModel:
        """A plain model that computes what the adapted one does; the adapted model is used up. Only for methods served as a model."""
        assert isinstance(model, PeftModel)
        merged = model.merge_and_unload()
        assert isinstance(merged, PreTrainedModel)
        return merged

    # Methods that do something between the steps of training

    def begin(self, model: AdaptedModel, num_steps: int) -> None:  # noqa: B027  most methods need nothing here
        """Called once before the first step."""

    def penalty(self, model: AdaptedModel) -> torch.Tensor | None:
        """Added to the mean loss of each step."""
        return None

    def after_step(self, model: AdaptedModel, step: int) -> list[str]:
        """After the update, with the step's gradients still there. Returns the names of parameters it changed."""
        return []

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside the trained parameters."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027  most methods need nothing here
        """Takes back what `state` gave."""
