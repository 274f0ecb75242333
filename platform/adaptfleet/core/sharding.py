"""How a model lies on its workers: whole on each (DDP), or its parameters sharded over them (FSDP2)."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from adaptfleet.contracts.jobs import ShardMode
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import Call, PackedBatch, plain_base

_OPTIMIZER_BYTES = 12
"""AdamW's float32 weight and two moments, for a trained parameter."""
_ACTIVATION_SHARE = 0.35
"""Memory left for activations, the runtime and the rest."""


@dataclass(frozen=True)
class Placement:
    mode: ShardMode
    """`none`, `ddp` or `fsdp2`."""
    reason: str


def choose_placement(mode: ShardMode, num_workers: int, num_parameters: int, num_trained: int, bytes_each: int, memory: int) -> Placement:
    """What `auto` means here. `memory` is what one worker may use, in bytes.

    Whole copies are faster: only the trained parameters' gradients travel. Sharding gathers each layer for each pass, and is for bases
    that do not fit.
    """
    if num_workers == 1:
        return Placement("none", "one worker")
    if mode != "auto":
        return Placement(mode, f"cluster.shard is {mode!r}")
    needed = num_parameters * bytes_each + num_trained * (bytes_each + _OPTIMIZER_BYTES)
    usable = memory * (1 - _ACTIVATION_SHARE)
    fits = needed <= usable
    return Placement(
        "ddp" if fits else "fsdp2",
        f"the model and its optimizer need {needed / 2**30:.2f} GiB, a worker has {usable / 2**30:.2f} GiB for them",
    )


def shard(model: AdaptedModel, num_workers: int) -> Call:
    """Shards every decoder layer, and what is around them, with FSDP2. Returns the way to call the sharded model on packed rows.

    Gradients of sharded parameters are summed over the workers in float32.
    """
    base = plain_base(model)
    mesh = init_device_mesh(base.device.type, (num_workers,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in decoder_layers(base):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(base, mesh=mesh, mp_policy=policy)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    # FSDP gathers a module's parameters around its forward methods; this is one of them, for ours skip the model's own logits
    def packed(_: nn.Module, function: Callable[[AdaptedModel, PackedBatch], Any], batch: PackedBatch) -> Any:
        return function(model, batch)

    base.packed = MethodType(packed, base)  # type: ignore[assignment]
    register_fsdp_forward_method(base, "packed")
    return base.packed  # type: ignore[return-value]
