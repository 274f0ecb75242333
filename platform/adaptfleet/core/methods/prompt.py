"""Prompt tuning through peft: learnt embeddings before the first token."""

import torch
from peft import PeftModel, PromptTuningConfig
from transformers import PreTrainedModel

from adaptfleet.contracts.methods import PromptTuning
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.seeded import attach_seeded


class PromptAdaptation(Adaptation):
    def __init__(self, method: PromptTuning, init_ids: list[int] | None = None) -> None:
        self.method = method
        self.init_ids = init_ids
        """Token ids of `init_text`."""

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.method.num_virtual_tokens)
        adapted = attach_seeded(model, config, seed)
        embeddings: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        count = self.method.num_virtual_tokens
        if self.init_ids:
            chosen = torch.tensor((self.init_ids * count)[:count])
        else:
            chosen = torch.randint(0, embeddings.shape[0], (count,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            next(adapted.prompt_encoder["default"].parameters()).copy_(embeddings[chosen.to(embeddings.device)])
        return adapted
