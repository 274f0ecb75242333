"""What a contract's scheme means for llm-compressor: its modifiers, with their arguments as JSON."""

from collections.abc import Mapping
from typing import Any, assert_never

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.schemes import W8A8, Fp8, Mixed, WeightOnly

Modifier = dict[str, Any]
Group = dict[str, Any]

_HEAD = "re:.*(lm_head|embed_out)$"
_EMBEDDING = "Embedding"
"""By its class: vLLM's Llama does not tell its embedding's name to what looks for it (0.32)."""
_KV_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
_OBSERVER = "memoryless_mse"
"""Each scale is the one with the least squared rounding error, not the one that the largest weight asks for."""


def modifiers(spec: Quantize, bits_of: Mapping[str, int] | None = None) -> list[Modifier]:
    """In the order in which llm-compressor applies them. `bits_of`: of a mixed scheme, each linear layer's bits (4 or 8) by full name."""
    scheme = spec.scheme
    found: list[Modifier] = []
    kept = [_exactly(target) for target in spec.keep]
    algorithm = "rtn"
    match scheme:
        case W8A8():
            algorithm = scheme.algorithm
            if scheme.smoothquant is not None:
                found += _smoothing(scheme.smoothquant, spec)
            groups = [_w8a8(["Linear"], scheme.activations)]
        case WeightOnly():
            algorithm = scheme.algorithm
            groups = [_weight_only(["Linear"], scheme.bits, scheme.group_size, scheme.symmetric)]
        case Fp8():
            groups = [_fp8(["Linear"])]
        case Mixed():
            algorithm = scheme.algorithm
            assert bits_of is not None
            groups = [
                group(names)
                for bits, group in ((4, lambda names: _weight_only(names, 4, scheme.group_size, True)), (8, _w8a8))
                if (names := [_exactly(name) for name, own in bits_of.items() if own == bits])
            ]
        case _:
            assert_never(scheme)
    arguments: dict[str, Any] = {"config_groups": {f"group_{i}": group for i, group in enumerate(groups)}, "ignore": [_HEAD, *kept]}
    if spec.kv_cache == "fp8":
        arguments["kv_cache_scheme"] = _KV_FP8
    if algorithm == "awq":
        # it scales the weights; rounding them is the next one's part
        found.append({"name": "AWQModifier", "arguments": {"duo_scaling": "both"}})
    name = "GPTQModifier" if algorithm == "gptq" else "QuantizationModifier"
    found.append({"name": name, "arguments": arguments})
    ends = [_w8a8([_HEAD])] if spec.head == "w8a8" else []
    if spec.embedding != "keep":
        ends.append(_embedding(8 if spec.embedding == "w8" else 4))
    if not ends:
        return found
    if name == "QuantizationModifier":
        arguments |= {"config_groups": {f"group_{i}": group for i, group in enumerate([*ends, *groups])}, "ignore": kept}
    else:
        # the calibrated algorithms see neither the embedding nor the head
        found.append(
            {
                "name": "QuantizationModifier",
                "arguments": {"config_groups": {f"end_{i}": group for i, group in enumerate(ends)}, "ignore": []},
            }
        )
    return found


def _smoothing(strength: float, spec: Quantize) -> list[Modifier]:
    """`place` says which layers' inputs: those behind a norm, which a rotated model has no outliers in, and those of the last layer of a
    gated feed-forward, which llm-compressor leaves out and which want no more than half."""
    places = [("gated", min(strength, 0.5))] if spec.rotate else [("norms", strength), ("gated", min(strength, 0.5))]
    return [{"name": "SmoothQuantModifier", "arguments": {"smoothing_strength": own}, "place": place} for place, own in places]


def needs_data(spec: Quantize) -> bool:
    return spec.scheme.needs_data or spec.kv_cache == "fp8"


def _exactly(name: str) -> str:
    """A target that matches one module, whatever stands before its name."""
    return "re:(.*[.])?" + name.replace(".", "[.]") + "$"


def _w8a8(targets: list[str], activations: str = "dynamic") -> Group:
    is_dynamic = activations == "dynamic"
    return {
        "targets": targets,
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False, "observer": _OBSERVER},
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token" if is_dynamic else "tensor",
            "dynamic": is_dynamic,
        },
    }


def _weight_only(targets: list[str], bits: int, group_size: int, symmetric: bool) -> Group:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size, "dynamic": False}
    return {"targets": targets, "weights": {**weights, "observer": _OBSERVER}}


def _embedding(bits: int) -> Group:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": _OBSERVER}
    weights |= {"strategy": "channel"} if bits == 8 else {"strategy": "group", "group_size": 32}
    return {"targets": [_EMBEDDING], "weights": weights}


def _fp8(targets: list[str]) -> Group:
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "targets": targets,
        "weights": {**kind, "strategy": "channel", "dynamic": False},
        "input_activations": {**kind, "strategy": "token", "dynamic": True},
    }
