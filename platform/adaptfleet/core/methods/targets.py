"""Which modules a method touches, checked before anything is attached."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.methods import ALL_LINEAR
from adaptfleet.contracts.names import near

Shape = tuple[int, int]


def linear_modules(model: PreTrainedModel) -> dict[str, Shape]:
    """Linear modules but the output head, by full name: (inputs, outputs)."""
    head = model.get_output_embeddings()
    return {
        name: linear_shape(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def linear_shape(module: nn.Module) -> Shape:
    """(inputs, outputs). A quantized weight is packed, so its own shape says nothing."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return inputs, outputs
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def named(modules: Iterable[str], target: str) -> list[str]:
    """Full names that a target means: `q_proj`, or `mlp.c_proj` where a last name alone is not enough."""
    return [name for name in modules if name == target or name.endswith(f".{target}")]


def resolve_targets(model: PreTrainedModel, targets: Iterable[str], key: str = "method.targets") -> list[str]:
    """The modules meant, as peft takes them, sorted. ContractError lists those that match nothing."""
    linear, targets = linear_modules(model), tuple(targets)
    last_names = sorted({name.rpartition(".")[2] for name in linear})
    wanted = last_names if ALL_LINEAR in targets else sorted(set(targets))
    unknown = [target for target in wanted if not named(linear, target)]
    if unknown:
        hints = "".join(near(target, last_names) for target in unknown)
        raise ContractError(
            f"{key}: {', '.join(map(repr, unknown))} match no linear module.{hints} "
            f"The model has {', '.join(last_names)}; '{ALL_LINEAR}' takes them all."
        )
    return wanted


def resolve_low_rank_targets(model: PreTrainedModel, targets: Iterable[str], rank: int) -> list[str]:
    """The same; ContractError too where a product of this rank would not fit."""
    wanted, linear = resolve_targets(model, targets), linear_modules(model)
    shapes = {target: sorted({linear[name] for name in named(linear, target)}) for target in wanted}
    narrow = [f"{target} ({i} -> {o})" for target in wanted for i, o in shapes[target] if rank > min(i, o)]
    if narrow:
        raise ContractError(f"method.rank is {rank}, more than the smaller side of {', '.join(narrow)}. Use a smaller rank.")
    return wanted


def has_transposed_weights(model: PreTrainedModel) -> bool:
    """GPT-2 stores its linear weights as (inputs, outputs)."""
    return any(isinstance(module, Conv1D) for module in model.modules())
