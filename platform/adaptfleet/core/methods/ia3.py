"""(IA)^3 through peft: learnt scales of activations."""

from peft import IA3Config, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.methods import IA3
from adaptfleet.core.methods.adaptation import Adaptation
from adaptfleet.core.methods.seeded import attach_seeded
from adaptfleet.core.methods.targets import has_transposed_weights, resolve_targets


class IA3Adaptation(Adaptation):
    def __init__(self, method: IA3) -> None:
        self.method = method

    def check(self, model: PreTrainedModel) -> None:
        self._modules(model)

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        scaled, feedforward = self._modules(model)
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[*scaled, *feedforward],
            feedforward_modules=feedforward,
            fan_in_fan_out=has_transposed_weights(model),
        )
        return attach_seeded(model, config, seed)

    def _modules(self, model: PreTrainedModel) -> tuple[list[str], list[str]]:
        """Those whose outputs are scaled, and those whose inputs are."""
        kind = model.config.model_type
        feedforward = self.method.feedforward or tuple(FEEDFORWARD.get(kind, ()))
        scaled = self.method.targets or tuple(name for name in TARGETS.get(kind, ()) if name not in feedforward)
        if not scaled and not feedforward:
            raise ContractError(
                f"method.targets is empty, and no usual choice is known for the architecture {kind!r}; "
                "name the key and value modules in method.targets and the feed-forward's last in method.feedforward."
            )
        return resolve_targets(model, scaled), resolve_targets(model, feedforward, "method.feedforward") if feedforward else []
