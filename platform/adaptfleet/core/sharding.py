"""How a model lies on its workers: whole on each (DDP), its parameters sharded over them (FSDP2), its layers cut between them too."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from adaptfleet.contracts.jobs import ShardMode
from adaptfleet.core.compilation import decoder_layers
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import Call, PackedBatch, plain_base
from adaptfleet.core.tensor_parallel import split_layers

_OPTIMIZER_BYTES = 12
"""AdamW's float32 weight and two moments, for a trained parameter."""
_ACTIVATION_SHARE = 0.35
"""Memory left for activations, the runtime and the rest."""
DATA, TENSOR = "data", "tensor"
"""Dimensions of the mesh of workers. Those of one tensor-parallel group see the same samples."""


@dataclass(frozen=True)
class Placement:
    mode: ShardMode
    """`none`, `ddp` or `fsdp2`."""
    reason: str
    resident_bytes: int
    """Of the model and its optimizer on each worker."""


def choose_placement(
    mode: ShardMode,
    num_workers: int,
    num_parameters: int,
    num_trained: int,
    bytes_each: int,
    memory: int,
    tensor_parallel: int = 1,
) -> Placement:
    """What `auto` means here. `memory` is what one worker may use, in bytes.

    Whole copies are faster: only the trained parameters' gradients travel. Sharding gathers each layer for each pass, and is for bases
    that do not fit.
    """
    needed = num_parameters * bytes_each + num_trained * (bytes_each + _OPTIMIZER_BYTES)
    if num_workers == 1:
        return Placement("none", "one worker", needed)
    if tensor_parallel > 1:
        mode, reason = "fsdp2", f"every layer cut between {tensor_parallel} workers (cluster.tensor_parallel)"
    elif mode != "auto":
        reason = f"cluster.shard is {mode!r}"
    else:
        usable = memory * (1 - _ACTIVATION_SHARE)
        mode = "ddp" if needed <= usable else "fsdp2"
        reason = f"the model and its optimizer need {needed / 2**30:.2f} GiB, a worker has {usable / 2**30:.2f} GiB for them"
    return Placement(mode, reason, needed // num_workers if mode == "fsdp2" else needed)


def worker_mesh(device_type: str, num_workers: int, tensor_parallel: int) -> DeviceMesh:
    """[data, tensor]: neighbours make a tensor-parallel group, for they talk most."""
    return init_device_mesh(device_type, (num_workers // tensor_parallel, tensor_parallel), mesh_dim_names=(DATA, TENSOR))


def shard(model: AdaptedModel, mesh: DeviceMesh) -> Call:
    """Shards every decoder layer, and what is around them, with FSDP2. Returns the way to call the sharded model on packed rows.

    Layers are cut over the mesh's tensor dimension, and the parts sharded over its data dimension. What is around them has no parts and is
    sharded over all workers. Gradients of sharded parameters are summed over the workers of the data dimension in float32.
    """
    base = plain_base(model)
    tensor_parallel = mesh[TENSOR].size()
    if tensor_parallel > 1:
        split_layers(base, mesh[TENSOR])
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in decoder_layers(base):
        fully_shard(layer, mesh=mesh[DATA], mp_policy=policy)
    everyone = init_device_mesh(mesh.device_type, (mesh.size(),))
    fully_shard(base, mesh=everyone, mp_policy=policy)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            # all workers of a tensor-parallel group have the gradients of the same samples
            module.set_gradient_divide_factor(float(tensor_parallel) if module is base else 1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum

    for parameter in model.parameters():
        # what is learnt outside of the base is no shard, and small
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(mesh.device_type)

    # FSDP gathers a module's parameters around its forward methods; this is one of them, for ours skip the model's own logits
    def packed(_: nn.Module, function: Callable[[AdaptedModel, PackedBatch], Any], batch: PackedBatch) -> Any:
        return function(model, batch)

    base.packed = MethodType(packed, base)  # type: ignore[assignment]
    register_fsdp_forward_method(base, "packed")
    return base.packed  # type: ignore[return-value]
