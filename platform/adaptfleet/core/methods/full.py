"""Full fine-tuning: every weight is trained."""

from pathlib import Path

from transformers import PreTrainedModel

from adaptfleet.contracts.methods import Full
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel


class FullAdaptation(Adaptation):
    def __init__(self, method: Full) -> None:
        self.method = method

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        return model.requires_grad_(True)

    def export(self, model: AdaptedModel, folder: Path, base_id: str) -> None:
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(str(folder), safe_serialization=True)

    def merged(self, model: AdaptedModel) -> PreTrainedModel:
        assert isinstance(model, PreTrainedModel)
        return model
