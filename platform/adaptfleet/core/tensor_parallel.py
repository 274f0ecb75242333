"""Tensor parallelism (arXiv 1909.08053): the workers of a group each compute with a part of every layer's columns or rows.

Which modules are cut by columns and which by rows says transformers' plan of the architecture; torch's DTensor styles cut them and add up
what must be added: going forward the outputs of attention and feed-forward, going back the gradient of what each module cut by columns
reads. A LoRA is cut along with its module: by columns its B, by rows its A; the other half is whole on each worker, and its gradients are
equal there without a message.
"""

import re
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, SequenceParallel, parallelize_module
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ContractError
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.methods.targets import linear_shape

_BY_COLUMNS, _BY_ROWS, _PER_HEAD = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""Styles of transformers' plans. The last is a norm of each head's numbers, whose one weight sees only the heads of its worker."""
_HEADS_DIM = 2
"""Of a head's numbers [B, T, heads, D]."""


def check_splittable(model: PreTrainedModel, size: int) -> None:
    """ContractError where the architecture cannot be cut into `size` parts. `model` may be on the meta device."""
    plan, name = layer_plan(model), type(model).__name__
    if not plan:
        raise ContractError(
            f"cluster.tensor_parallel is {size}, but transformers has no tensor-parallel plan for {name}. "
            "Use cluster.tensor_parallel=1 with cluster.shard=fsdp2, which shards any architecture."
        )
    unknown = sorted(set(plan.values()) - {_BY_COLUMNS, _BY_ROWS, _PER_HEAD})
    if unknown:
        raise ContractError(
            f"cluster.tensor_parallel is {size}, but {name} has layers to be cut in ways not supported here ({', '.join(unknown)}). "
            "Use cluster.tensor_parallel=1 with cluster.shard=fsdp2."
        )
    config: Any = model.config
    counts = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    for module, style in plan.items():
        if style != _PER_HEAD:
            inputs, outputs = linear_shape(model.get_submodule(module))
            counts[module.rpartition(".")[2]] = outputs if style == _BY_COLUMNS else inputs
    uneven = [f"{key} {count}" for key, count in counts.items() if count and count % size]
    if uneven:
        raise ContractError(
            f"cluster.tensor_parallel is {size}, which does not divide {', '.join(uneven)} of {name}. Use a number that divides them all."
        )


def layer_plan(base: PreTrainedModel) -> dict[str, str]:
    """Style of each planned module in the decoder's layers, by full name. Empty where transformers has no plan.

    Embedding and output head stay out: FSDP shards these over all workers, and the loss reads the head's whole weight.
    """
    layers = decoder_layers(base)
    prefix = next(name for name, module in base.named_modules() if module is layers)
    styles = {re.compile(pattern.replace(".", r"\.").replace("*", r"\d+")): style for pattern, style in base.tp_plan.items()}
    return {
        name: style
        for name, _ in base.named_modules()
        if name.startswith(f"{prefix}.")
        for pattern, style in styles.items()
        if pattern.fullmatch(name)
    }


def split_layers(base: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cuts the layers over a one-dimensional mesh, adapters included. Whatever the plan leaves out stays whole on each worker."""
    for name, style in layer_plan(base).items():
        module = base.get_submodule(name)
        parallelize_module(module, mesh, _module_styles(module, style))


def _module_styles(module: nn.Module, style: str) -> ParallelStyle | dict[str, ParallelStyle]:
    if style == _PER_HEAD:
        return SequenceParallel(sequence_dim=_HEADS_DIM, use_local_output=True)
    by_columns = style == _BY_COLUMNS
    cut: type[ParallelStyle] = ColwiseParallel if by_columns else RowwiseParallel
    if not isinstance(module, LoraLayer):
        return cut()
    halves = module.lora_B if by_columns else module.lora_A
    half = "lora_B" if by_columns else "lora_A"
    return {"base_layer": cut()} | {f"{half}.{adapter}": cut() for adapter in halves}
