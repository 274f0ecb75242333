"""QLoRA: LoRA over a base in 4-bit NormalFloat, by bitsandbytes."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from adaptfleet.contracts.methods import QLora
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel
from adaptfleet.core.methods.lora import lora_config
from adaptfleet.core.methods.seeded import attach_seeded
from adaptfleet.core.methods.targets import resolve_low_rank_targets


class QLoraAdaptation(Adaptation):
    """Sharded, each worker holds its part of the 4-bit weights and all of their scales, which bitsandbytes keeps beside them: an eighth of
    a bit for each weight, half a bit without double quantization."""

    compilable = False

    def __init__(self, method: QLora) -> None:
        self.method = method

    def check(self, model: PreTrainedModel) -> None:
        resolve_low_rank_targets(model, self.method.targets, self.method.rank)

    def attach(self, model: PreTrainedModel, seed: int) -> PeftModel:
        keep_as_quantized(model)
        return attach_seeded(model, lora_config(model, self.method), seed)

    def merged(self, model: AdaptedModel) -> PreTrainedModel:
        """The base as the adapter saw it, dequantized, with the adapter's product added. peft's own merge would round to 4 bits again."""
        assert isinstance(model, PeftModel)
        base = model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        dtype = next(p.dtype for p in base.parameters() if p.is_floating_point())
        for name, module in list(base.named_modules()):
            adapter: Any = module if isinstance(module, LoraLayer) else None
            layer: Any = adapter.get_base_layer() if adapter else module
            if ".lora_" in name or not _is_quantized(layer) or name.endswith(".base_layer"):
                continue
            weight = dequantized(layer)
            if adapter:
                a, b = adapter.lora_A["default"].weight.float(), adapter.lora_B["default"].weight.float()
                weight = weight + adapter.scaling["default"] * (b @ a)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype, device=weight.device)
            plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, plain)
        for attribute in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(base.config, attribute):
                delattr(base.config, attribute)
        for attribute, value in (("is_quantized", False), ("hf_quantizer", None)):
            setattr(base, attribute, value)
        return base


def quantization_config(method: QLora, dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards parameters of one floating type
    )


def keep_as_quantized(model: PreTrainedModel) -> None:
    """Call it before the model's first forward pass."""
    layers: list[Any] = [module for module in model.modules() if _is_quantized(module)]
    for layer in layers:
        # bitsandbytes would repack the weights in evaluation, with scales in bfloat16: another model than was trained
        layer.support_avx512bf16_for_cpu = False
        # FSDP gathers the bare numbers; bitsandbytes then looks for their scales here
        layer.quant_state = layer.weight.quant_state


def dequantized(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer computes with, [outputs, inputs], in float32."""
    import bitsandbytes.functional as bnb

    weight = layer.weight
    return bnb.dequantize_4bit(weight.data, weight.quant_state).float().reshape(layer.out_features, layer.in_features)


def _is_quantized(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Linear4bit"
