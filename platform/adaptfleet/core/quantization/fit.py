"""Whether a scheme fits a model's shapes, and how many bytes it will take: from the config alone, before anything is computed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.names import near
from adaptfleet.contracts.schemes import Mixed, Target, WeightOnly
from adaptfleet.core.methods.targets import Shape, linear_modules, named

CPU_MULTIPLE = 32
"""vLLM's 4-bit CPU kernel takes inputs and outputs in blocks of 32."""
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""vLLM computes these as one layer: their outputs count together, and they share one scheme."""


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint is made of, from its config."""

    linear: dict[str, Shape]
    """Linear modules but the output head, by full name: (inputs, outputs)."""
    embedding: Shape
    """(rows, width)."""
    head: Shape
    is_tied: bool
    num_other: int
    """Parameters outside of these: norms, biases, positions."""


def shapes_of(config: PretrainedConfig, trust_remote_code: bool = False) -> Shapes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = linear_modules(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = bool(config.tie_word_embeddings)
    total = sum(p.numel() for p in _distinct(model))
    known = sum(i * o for i, o in linear.values()) + embedding.weight.numel() + (0 if is_tied else head.weight.numel())
    rows, width = embedding.weight.shape
    outputs, inputs = head.weight.shape
    return Shapes(linear, (rows, width), (inputs, outputs), is_tied, total - known)


def _distinct(model: PreTrainedModel) -> Iterable[nn.Parameter]:
    return {id(p): p for p in model.parameters()}.values()


def check_fit(shapes: Shapes, spec: Quantize, target: Target) -> None:
    """ContractError lists every kind of layer that the scheme or the target's kernel cannot take."""
    wrong: list[str] = []
    scheme = spec.scheme
    unknown = [target for target in spec.keep if not named(shapes.linear, target)]
    if unknown:
        last_names = sorted({name.rpartition(".")[2] for name in shapes.linear})
        hints = "".join(near(target, last_names) for target in unknown)
        wrong.append(f"keep: {', '.join(map(repr, unknown))} match no linear module.{hints} The model has {', '.join(last_names)}.")
    rounded = rounded_linear(shapes, spec)
    halves = [unit for unit in fused_units(shapes.linear) if 0 < sum(name in rounded for name in unit) < len(unit)]
    if halves:
        parts = ", ".join(name.rpartition(".")[2] for name in halves[0])
        wrong.append(f"keep leaves a part of {parts} in 16 bits, which the engine computes as one layer: keep all of them or none.")
    group = scheme.group_size if isinstance(scheme, WeightOnly | Mixed) else None
    if group is not None:
        odd = _by_name((name, inputs) for name, (inputs, _) in rounded.items() if inputs % group)
        if odd:
            fitting = [str(g) for g in (32, 64, 128) if all(inputs % g == 0 for inputs, _ in rounded.values())]
            way = f"Use group_size {' or '.join(fitting)}, or keep them." if fitting else "No group size divides them all; use kind w8a8."
            wrong.append(f"group_size {group} does not divide the inputs of {odd}. {way}")
        if target == "cpu":
            narrow = _by_name((name, size) for name, size in _cpu_sizes(rounded) if size % CPU_MULTIPLE)
            if narrow:
                wrong.append(f"vLLM's 4-bit CPU kernel takes sizes in multiples of {CPU_MULTIPLE}, but {narrow}. Use kind w8a8.")
    if spec.embedding == "w4" and shapes.embedding[1] % 32:
        wrong.append(f"embedding w4 rounds in groups of 32, which do not divide the width {shapes.embedding[1]}. Use w8 or keep.")
    if wrong:
        raise ContractError("quantize: " + " ".join(wrong))


def rounded_linear(shapes: Shapes, spec: Quantize) -> dict[str, Shape]:
    """The linear modules that the scheme rounds: all but those that are kept."""
    kept = {name for target in spec.keep for name in named(shapes.linear, target)}
    return {name: shape for name, shape in shapes.linear.items() if name not in kept}


def _cpu_sizes(linear: Mapping[str, Shape]) -> Iterable[tuple[str, int]]:
    for names in fused_units(linear):
        yield names[0], linear[names[0]][0]
        yield "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])]), sum(linear[name][1] for name in names)


def fused_units(linear: Mapping[str, Shape]) -> list[list[str]]:
    """Modules that the engine fuses stand together; others alone. In the model's order."""
    units: dict[str, list[str]] = {}
    for name in linear:
        parent, _, last = name.rpartition(".")
        together = next((group for group in _FUSED if last in group and all(f"{parent}.{other}" in linear for other in group)), (last,))
        units.setdefault(f"{parent}.{together[0]}", []).append(name)
    return list(units.values())


def _by_name(offenders: Iterable[tuple[str, int]]) -> str:
    """`q_proj (576), down_proj (1408)`: each kind of layer once."""
    found = dict.fromkeys((name.rpartition(".")[2] if "+" not in name else _last(name), size) for name, size in offenders)
    return ", ".join(f"{name} ({size})" for name, size in found)


def _last(name: str) -> str:
    first, *rest = name.split("+")
    return "+".join([first.rpartition(".")[2], *rest])


def rounded_bytes(shape: Shape, bits: int, group_size: int | None, zero_points: bool = False) -> int:
    """Of one weight: its codes, its 16-bit scales and, where there are any, its zero points, as wide as the codes."""
    inputs, outputs = shape
    scales = outputs * (inputs // group_size if group_size else 1)
    return (inputs * outputs + zero_points * scales) * bits // 8 + 2 * scales


def dense_bytes(shapes: Shapes) -> int:
    """Of the weights in bfloat16."""
    matrices = [*shapes.linear.values(), shapes.embedding, *([] if shapes.is_tied else [shapes.head])]
    return 2 * (sum(i * o for i, o in matrices) + shapes.num_other)


def end_bytes(shapes: Shapes, spec: Quantize) -> int:
    """Of what the scheme of the linear layers leaves: embedding, head, norms, biases and kept layers."""
    rows, width = shapes.embedding
    embedding = {"keep": 2 * rows * width, "w8": rounded_bytes((width, rows), 8, None), "w4": rounded_bytes((width, rows), 4, 32)}
    head = rounded_bytes(shapes.head, 8, None) if spec.head == "w8a8" else 0 if shapes.is_tied else 2 * shapes.head[0] * shapes.head[1]
    rounded = rounded_linear(shapes, spec)
    kept = sum(2 * i * o for name, (i, o) in shapes.linear.items() if name not in rounded)
    return embedding[spec.embedding] + head + kept + 2 * shapes.num_other


def planned_bytes(shapes: Shapes, spec: Quantize) -> int:
    """Of the rounded checkpoint's weights, within a percent; of a mixed one the most that its budget allows."""
    scheme = spec.scheme
    if isinstance(scheme, Mixed):
        return mixed_budget(shapes, scheme, dense_bytes(shapes))
    bits, group, zeros = (scheme.bits, scheme.group_size, not scheme.symmetric) if isinstance(scheme, WeightOnly) else (8, None, False)
    return end_bytes(shapes, spec) + sum(rounded_bytes(shape, bits, group, zeros) for shape in rounded_linear(shapes, spec).values())


def mixed_budget(shapes: Shapes, scheme: Mixed, parent_bytes: int) -> int:
    return scheme.max_bytes if scheme.max_bytes is not None else int(parent_bytes * (scheme.max_bytes_ratio or 0))
