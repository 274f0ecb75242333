"""LLaMA-Adapter through peft: gated prompts in the upper layers' attention."""

from peft import AdaptionPromptConfig, PeftModel
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.methods import LlamaAdapter
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.seeded import attach_seeded

_UNTOUCHED_LAYERS = 2
"""The paper leaves the lowest layers alone."""


class LlamaAdapterAdaptation(Adaptation):
    compilable = False

    def __init__(self, method: LlamaAdapter) -> None:
        self.method = method

    def check(self, model: PreTrainedModel) -> None:
        kind, layers = model.config.model_type, model.config.num_hidden_layers
        if kind not in TRANSFORMERS_MODEL_CONFIG:
            raise ContractError(
                f"method.kind llama-adapter knows the architectures {', '.join(sorted(TRANSFORMERS_MODEL_CONFIG))}, not {kind!r}; "
                "use lora or prefix."
            )
        if self.method.num_layers is not None and self.method.num_layers > layers:
            raise ContractError(f"method.num_layers is {self.method.num_layers}, but the model has {layers} layers.")

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        self.check(model)
        layers = model.config.num_hidden_layers
        config = AdaptionPromptConfig(
            task_type="CAUSAL_LM",
            adapter_len=self.method.num_virtual_tokens,
            adapter_layers=self.method.num_layers or max(1, layers - _UNTOUCHED_LAYERS),
        )
        return attach_seeded(model, config, seed)
