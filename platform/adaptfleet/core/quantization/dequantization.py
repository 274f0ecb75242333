"""Reads a compressed-tensors checkpoint back as a plain model that computes what the engine computes: weights as they were rounded, and
inputs rounded the same way where the scheme rounds them. For measuring and for training on top, never for publishing.

Shapes: O outputs, I inputs, G groups of inputs.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adaptfleet.contracts.errors import ModelError

_METHOD = "compressed-tensors"
_FP8_MAX = 448.0
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte")


def is_compressed(folder: Path) -> bool:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return (config.get("quantization_config") or {}).get("quant_method") == _METHOD


def load_compressed(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with plain weights. ModelError: tensors that the model has no place for, or lacks."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    quantization = config.quantization_config
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code)
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    weights, scales = _plain(stored, quantization, dtype)
    missing, unknown = model.load_state_dict(weights, strict=False)
    if config.tie_word_embeddings:
        model.tie_weights()
        missing = [name for name in missing if not name.startswith(("lm_head", "embed_out"))]
    if missing or unknown:
        raise ModelError(f"{folder} is no whole checkpoint of {type(model).__name__}: {', '.join([*missing, *unknown][:5])}.")
    _round_inputs(model, quantization, scales)
    return model


def _plain(
    stored: dict[str, torch.Tensor], quantization: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The plain weights by name, and the static scales of inputs by module."""
    plain: dict[str, torch.Tensor] = {}
    input_scales: dict[str, torch.Tensor] = {}
    rounded = {name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if module not in rounded or part == "bias":
            if part not in ("k_scale", "v_scale", "q_scale"):  # of the KV cache: the engine's alone
                plain[name] = tensor.to(dtype)
        elif part == "input_scale":
            input_scales[module] = tensor.float()
    for module in rounded:
        parts = {part: stored[f"{module}.{part}"] for part in _PARTS if f"{module}.{part}" in stored}
        bits = int(group_of(module, quantization)["weights"]["num_bits"])
        plain[f"{module}.weight"] = dequantized(parts, bits).to(dtype)
    return plain, input_scales


_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def dequantized(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """(code - zero point) x scale, float32 [O, I], from a module's tensors as compressed-tensors stores them."""
    scale_OG = parts["weight_scale"].float()
    zero_OG: torch.Tensor | float = 0.0
    if "weight_packed" in parts:
        num_outputs, num_inputs = parts["weight_shape"].tolist()
        codes_OI = unpacked(parts["weight_packed"], bits, num_inputs)
        if "weight_zero_point" in parts:
            zero_OG = unpacked(parts["weight_zero_point"].T, bits, num_outputs).T.float()
    else:
        codes_OI = parts["weight"]
        num_inputs = codes_OI.shape[1]
        if "weight_zero_point" in parts:
            zero_OG = parts["weight_zero_point"].float()
    if "weight_g_idx" in parts:
        group_I = parts["weight_g_idx"].long()
        scale_OI = scale_OG[:, group_I]
        zero_OI = zero_OG[:, group_I] if isinstance(zero_OG, torch.Tensor) else zero_OG
    else:
        times = num_inputs // scale_OG.shape[1]
        scale_OI = scale_OG.repeat_interleave(times, dim=1)
        zero_OI = zero_OG.repeat_interleave(times, dim=1) if isinstance(zero_OG, torch.Tensor) else zero_OG
    return (codes_OI.float() - zero_OI) * scale_OI


def unpacked(packed_OP: torch.Tensor, bits: int, num_values: int) -> torch.Tensor:
    """int8 [O, num_values]: codes of `bits` bits one after another in 32-bit words, lowest bits first, each raised by 2^(bits-1)."""
    words_OP = packed_OP.contiguous()
    places_32 = torch.arange(32, dtype=torch.int32)
    stream = ((words_OP[..., None] >> places_32) & 1).to(torch.uint8).flatten(1)[:, : num_values * bits]
    weights_b = (2 ** torch.arange(bits)).to(torch.uint8)
    codes = (stream.view(len(stream), num_values, bits) * weights_b).sum(-1, dtype=torch.int16)
    return (codes - 2 ** (bits - 1)).to(torch.int8)


def _round_inputs(model: PreTrainedModel, quantization: dict[str, Any], scales: dict[str, torch.Tensor]) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        group = group_of(name, quantization, required=False)
        inputs = group.get("input_activations") if group else None
        if inputs:
            module.register_forward_pre_hook(_rounding(inputs["type"] == "float", scales.get(name)))


def _rounding(is_float: bool, scale: torch.Tensor | None) -> Any:
    def round_input(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs = arguments[0]
        return (inputs + (rounded_input(inputs.detach(), is_float, scale) - inputs.detach()), *arguments[1:])

    return round_input


def rounded_input(inputs: torch.Tensor, is_float: bool, scale: torch.Tensor | None) -> torch.Tensor:
    """The values the engine's 8-bit kernel sees: a scale for each token, or the given one for all."""
    values = inputs.float()
    limit = _FP8_MAX if is_float else 127.0
    if scale is None:
        scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=1e-7) / limit
    codes = values / scale
    codes = codes.clamp(-limit, limit).to(torch.float8_e4m3fn).float() if is_float else codes.round().clamp(-128, 127)
    return (codes * scale).to(inputs.dtype)


def group_of(module: str, quantization: dict[str, Any], required: bool = True) -> dict[str, Any]:
    """The config group that the module's name falls into."""
    if any(_matches(target, module) for target in quantization.get("ignore") or ()):
        return {}
    groups = list(quantization["config_groups"].values())
    named = [group for group in groups if any(_matches(target, module) for target in group["targets"])]
    kind = "Embedding" if module.endswith(_EMBEDDINGS) else "Linear"
    wide = [group for group in groups if kind in group["targets"]]
    if named or wide:
        return (named or wide)[0]
    if required:
        raise ModelError(f"{module} is rounded, but no group of the checkpoint's quantization_config names it.")
    return {}


def _matches(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module
