"""LoRA, rsLoRA, DoRA and PiSSA through peft."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from adaptfleet.contracts.methods import Lora, QLora
from adaptfleet.core.export import export_adapter, write_lora
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel
from adaptfleet.core.methods.seeded import attach_seeded
from adaptfleet.core.methods.targets import has_transposed_weights, resolve_low_rank_targets


class LoraAdaptation(Adaptation):
    def __init__(self, method: Lora) -> None:
        self.method = method
        self._initial: dict[str, torch.Tensor] = {}

    def check(self, model: PreTrainedModel) -> None:
        resolve_low_rank_targets(model, self.method.targets, self.method.rank)

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        pissa = self.method.init == "pissa"
        options: dict[str, Any] = {"use_dora": self.method.use_dora, "init_lora_weights": "pissa" if pissa else True}
        adapted = attach_seeded(model, lora_config(model, self.method, **options), seed)
        if pissa:
            self._initial = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
        return adapted

    def export(self, model: AdaptedModel, folder: Path, base_id: str) -> None:
        assert isinstance(model, PeftModel)
        if self._initial:
            self._export_difference(model, folder, base_id)
        else:
            export_adapter(model, folder, base_id)

    def _export_difference(self, model: PeftModel, folder: Path, base_id: str) -> None:
        """PiSSA moved a part B0 A0 of each weight into its adapter. Beside the untouched base serves B A - B0 A0, of twice the rank."""
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        trained = dict(model.named_parameters())
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                prefix = f"base_model.model.{name}"
                sides = []
                for side, dim in (("A", 0), ("B", 1)):
                    key = f"{prefix}.lora_{side}.default.weight"
                    sign = -1 if side == "B" else 1
                    sides.append(torch.cat([trained[key].detach().float(), sign * self._initial[key].float()], dim=dim))
                factors[name] = (sides[0], sides[1])
        # peft divides alpha by the rank (by its root in rsLoRA), which has doubled
        doubling = 2**0.5 if self.method.use_rslora else 2
        write_lora(folder, base_id, factors, alpha=self.method.alpha * doubling, use_rslora=self.method.use_rslora)


def lora_config(model: PreTrainedModel, method: Lora | QLora, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=resolve_low_rank_targets(model, method.targets, method.rank),
        use_rslora=method.use_rslora,
        task_type="CAUSAL_LM",
        fan_in_fan_out=has_transposed_weights(model),
        **options,
    )
