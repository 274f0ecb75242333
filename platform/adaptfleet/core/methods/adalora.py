"""AdaLoRA: low-rank products in singular form whose ranks are moved to where they count."""

from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from transformers import PreTrainedModel

from adaptfleet.contracts.methods import AdaLora
from adaptfleet.core.export import write_lora
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel
from adaptfleet.core.methods.seeded import attach_seeded
from adaptfleet.core.methods.targets import has_transposed_weights, resolve_low_rank_targets

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraAdaptation(Adaptation):
    """peft's allocator keeps averages of each weight's importance; they are part of the state, so a resumed run takes the same ranks."""

    shardable = False  # the allocator ranks whole matrices

    def __init__(self, method: AdaLora) -> None:
        self.method = method
        self._model: AdaptedModel | None = None
        self._resumed: dict[str, torch.Tensor] | None = None

    def check(self, model: PreTrainedModel) -> None:
        resolve_low_rank_targets(model, self.method.targets, self.method.initial_rank)

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        config = AdaLoraConfig(
            init_r=self.method.initial_rank,
            target_r=self.method.rank,
            lora_alpha=self.method.alpha,
            lora_dropout=self.method.dropout,
            deltaT=self.method.every_steps,
            orth_reg_weight=self.method.orthogonality,
            target_modules=resolve_low_rank_targets(model, self.method.targets, self.method.initial_rank),
            fan_in_fan_out=has_transposed_weights(model),
            task_type="CAUSAL_LM",
            total_step=1_000_000,  # peft wants a number; `begin` gives the right one
        )
        return attach_seeded(model, config, seed)

    def begin(self, model: AdaptedModel, num_steps: int) -> None:
        config = _schedule(_tuner(model))
        config.total_step = num_steps
        config.tinit = round(num_steps * self.method.warmup)
        config.tfinal = round(num_steps * self.method.settled)
        if self._resumed is not None:
            _restore(_tuner(model), self._resumed)
        self._model = model

    def penalty(self, model: AdaptedModel) -> torch.Tensor:
        """Mean over the singular matrices P of the Frobenius norm of P^T P - I, weighted (equation 4 of the paper)."""
        norms = []
        for layer in _layers(model).values():
            a, b = layer.lora_A["default"].float(), layer.lora_B["default"].float()
            for gram in (a @ a.T, b.T @ b):
                norms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return self.method.orthogonality * torch.stack(norms).mean()

    def after_step(self, model: AdaptedModel, step: int) -> list[str]:
        _tuner(model).update_and_allocate(step)
        return [name for name, _ in model.named_parameters() if ".lora_E." in name]

    def state(self) -> dict[str, torch.Tensor]:
        """The allocator's averages of each weight's importance, and the ranks kept last: without them a resumed run takes other ranks."""
        if self._model is None:
            return {}
        tuner = _tuner(self._model)
        state = {f"{average}.{name}": value for average in _AVERAGES for name, value in getattr(tuner.rankallocator, average).items()}
        kept = _schedule(tuner).rank_pattern or {}
        return state | {f"kept.{name}": torch.tensor(ranks, dtype=torch.uint8) for name, ranks in kept.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._resumed = state

    def export(self, model: AdaptedModel, folder: Path, base_id: str) -> None:
        """As plain LoRA: the singular values go into A, ranks taken away are left out, and shorter products are filled up with zeros."""
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, layer in _layers(model).items():
            a, e, b = (side["default"].detach().float() for side in (layer.lora_A, layer.lora_E, layer.lora_B))
            scale = layer.scaling["default"] / (layer.ranknum["default"].float() + 1e-5)
            kept = e.flatten() != 0
            factors[name] = ((a * e * scale)[kept], b[:, kept])
        rank = max(1, *(len(a) for a, _ in factors.values()))
        filled = {name: (_rows(a, rank), _rows(b.T, rank).T) for name, (a, b) in factors.items()}
        # alpha equal to the rank: a scale of one
        write_lora(folder, base_id, filled, alpha=rank)


def _tuner(model: AdaptedModel) -> AdaLoraModel:
    assert isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)
    return model.base_model


def _schedule(tuner: AdaLoraModel) -> AdaLoraConfig:
    config = tuner.peft_config["default"]
    assert isinstance(config, AdaLoraConfig)
    return config


def _layers(model: AdaptedModel) -> dict[str, Any]:
    assert isinstance(model, PeftModel)
    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, AdaLoraLayer)}


def _restore(tuner: AdaLoraModel, state: dict[str, torch.Tensor]) -> None:
    kept: dict[str, list[bool]] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "kept":
            kept[name] = value.bool().tolist()
        else:
            getattr(tuner.rankallocator, kind)[name] = value
    _schedule(tuner).rank_pattern = kept or None


def _rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Zero rows added up to a count."""
    return torch.cat([matrix, matrix.new_zeros(count - len(matrix), matrix.shape[1])])
