"""Prefix tuning through peft: learnt keys and values before every layer's own."""

from peft import PeftModel, PrefixTuningConfig
from transformers import PreTrainedModel

from adaptfleet.contracts.methods import PrefixTuning
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.seeded import attach_seeded


class PrefixAdaptation(Adaptation):
    compilable = False

    def __init__(self, method: PrefixTuning) -> None:
        self.method = method

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.method.num_virtual_tokens,
            prefix_projection=self.method.projection_size is not None,
            encoder_hidden_size=self.method.projection_size,  # type: ignore[arg-type]  # peft's own default is None
        )
        return attach_seeded(model, config, seed)
