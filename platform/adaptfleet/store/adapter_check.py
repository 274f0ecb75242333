"""Checks a PEFT LoRA folder before it is published: whole, of the rank it says, and of a kind that vLLM serves as it was trained.

The list of what vLLM refuses follows `vllm.lora.peft_helper.PEFTHelper`; checking here tells the publisher, not the first caller.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.store.safetensors_header import TensorEntry, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Inits that set only the adapter. Others, such as PiSSA, change the base too, so the plain base with the adapter is another model."""
_UNSERVED = {
    "use_dora": "DoRA is not served; train with use_dora=False, or merge the adapter and publish a model",
    "modules_to_save": "whole modules saved beside the adapter are not served; leave modules_to_save out, or merge and publish a model",
    "lora_bias": "biases of LoRA matrices are not served; train with lora_bias=False",
    "alora_invocation_tokens": "activated LoRA is not served; leave alora_invocation_tokens out",
    "layer_replication": "replicated layers are not served; merge the adapter and publish a model",
    "trainable_token_indices": "trained token embeddings are not served; leave trainable_token_indices out, or merge and publish a model",
    "target_parameters": "LoRA on bare parameters is not served; name modules in target_modules",
    "use_bdlora": "block-diagonal LoRA is not served; train plain LoRA",
    "use_qalora": "QALoRA is not served; train plain LoRA",
    "fan_in_fan_out": "transposed weights are not served; train on linear modules with fan_in_fan_out=False",
}
_SHOWN = 5


def adapter_offenders(draft: Draft, folder: Path) -> Iterator[str]:
    """Every reason why the adapter must not be published."""
    for field in ("base", "base_revision"):
        if getattr(draft, field) is None:
            yield f"{field} is missing: an adapter is served only on the base it was trained on; give the base's id and its content hash"
    if draft.base is not None and draft.base == draft.name:
        yield f"the name {draft.name!r} is the base's own id on the endpoint; give the adapter another name"
    config: dict[str, Any] | None = None
    tensors: Mapping[str, TensorEntry] | None = None
    if not (folder / CONFIG).is_file():
        yield f"{CONFIG} is missing: save the adapter with PEFT's save_pretrained"
    else:
        try:
            parsed = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            config = parsed if isinstance(parsed, dict) else None
            if config is None:
                yield f"{CONFIG} holds no JSON object"
        except (ValueError, RecursionError) as error:
            yield f"{CONFIG} is no JSON: {error}"
    if not (folder / WEIGHTS).is_file():
        yield f"{WEIGHTS} is missing: save the adapter with save_pretrained(..., safe_serialization=True)"
    else:
        try:
            tensors = read_header(folder / WEIGHTS)
        except ValueError as error:
            yield f"{WEIGHTS}: {error}; save the adapter again"
    if config is not None:
        yield from _config_offenders(config)
    if config is not None and tensors is not None:
        yield from _tensor_offenders(config, tensors)
        rank = (draft.method or {}).get("rank")
        if rank is not None and rank != config.get("r"):
            yield f"the method's contract says rank {rank}, {CONFIG} says r={config.get('r')}"


def _config_offenders(config: dict[str, Any]) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"{CONFIG}: peft_type is {config.get('peft_type')!r}; only 'LORA' is served"
    if not _is_rank(config.get("r")):
        yield f"{CONFIG}: r is {config.get('r')!r}; a rank is a whole number from 1 up"
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
        yield f"{CONFIG}: lora_alpha is {alpha!r}; it is a number above 0"
    if not config.get("target_modules"):
        yield f"{CONFIG}: target_modules is {config.get('target_modules')!r}; name the modules that carry the adapter"
    if config.get("bias", "none") != "none":
        yield f"{CONFIG}: bias is {config['bias']!r}; trained biases are not served; train with bias='none'"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        yield (
            f"{CONFIG}: init_lora_weights is {init!r}, which changes the base's own weights; save the adapter with PEFT's "
            f"path_initial_model_for_weight_conversion"
        )
    for field, reason in _UNSERVED.items():
        if config.get(field):
            yield f"{CONFIG}: {field} is {config[field]!r}: {reason}"


def _tensor_offenders(config: dict[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    if not tensors:
        yield f"{WEIGHTS} holds no tensor"
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    foreign: list[str] = []
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name)
        if match is None or tensor.dtype not in ("F32", "F16", "BF16") or len(tensor.shape) != 2:
            foreign.append(f"{name} ({tensor.dtype}{list(tensor.shape)})")
        else:
            sides.setdefault(match["module"], {})[match["side"]] = tensor.shape
    if foreign:
        yield (
            f"{WEIGHTS}: {_some(foreign)}: only floating base_model.model.MODULE.lora_A.weight and .lora_B.weight of two axes are served"
        )
    single = [module for module, pair in sides.items() if len(pair) == 1]
    if single:
        yield f"{WEIGHTS}: {_some(single)}: only one of lora_A and lora_B is there"
    if not _is_rank(config.get("r")):
        return
    wrong = []
    for module, pair in sides.items():
        rank = _rank_of(module, config)
        if ("A" in pair and pair["A"][0] != rank) or ("B" in pair and pair["B"][1] != rank):
            shapes = ", ".join(f"lora_{side} {list(shape)}" for side, shape in sorted(pair.items()))
            wrong.append(f"{module} ({shapes}, not rank {rank})")
    if wrong:
        yield f"{WEIGHTS}: the shapes are not of the rank in {CONFIG}: {_some(wrong)}"


def _rank_of(module: str, config: dict[str, Any]) -> int:
    """The module's rank by PEFT's rule: the first pattern that matches the end of its name, else `r`."""
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return int(rank)
    return int(config["r"])


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
