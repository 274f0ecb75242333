"""AdamW over float32 master copies of the trainable parameters."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


class MasterAdamW:
    """AdamW (arXiv 1711.05101) whose weights and moments are float32 whatever type the model computes in.

    A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/256 of it would be lost. Of a sharded parameter each worker keeps and
    updates its own shard; AdamW works on each number by itself.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: _local(p.detach()).to(torch.float32, copy=True) for name, p in self.parameters.items()}
        self._adam = torch.optim.AdamW(self.masters.values(), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """One update from the parameters' gradients, which stay until `zero_grad`. Returns their norm before clipping."""
        gradients = {}
        for name, parameter in self.parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients[name] = _local(gradient).to(torch.float32, copy=True)
        norm = self._norm(gradients)
        if norm > max_grad_norm:
            torch._foreach_mul_(list(gradients.values()), max_grad_norm / (norm + 1e-6))
        for name, master in self.masters.items():
            master.grad = gradients[name]
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._write_back()
        return norm

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def take_zeros(self, names: Iterable[str]) -> None:
        """Weights that a method has set to zero become zero in the master copies too."""
        for name in names:
            self.masters[name].mul_(_local(self.parameters[name]) != 0)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs, as named tensors: `weight.*`, `exp_avg.*`, `exp_avg_sq.*` and `updates`.

        A snapshot: later updates do not change it. Sharded parameters give sharded tensors.
        """
        state, updates = {}, 0.0
        for name, master in self.masters.items():
            moments = self._adam.state.get(master)
            average, square = (moments["exp_avg"], moments["exp_avg_sq"]) if moments else (torch.zeros_like(master),) * 2
            for kind, value in (("weight", master), ("exp_avg", average), ("exp_avg_sq", square)):
                state[f"{kind}.{name}"] = self._laid_out(name, value.detach().to("cpu", copy=True))
            updates = float(moments["step"]) if moments else updates
        return state | {"updates": torch.tensor([updates])}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        updates = state["updates"].reshape(())
        for name, master in self.masters.items():
            master.copy_(_local(state[f"weight.{name}"]))
            if float(updates):
                self._adam.state[master] = {
                    "step": updates.to(master.device, copy=True),
                    "exp_avg": _local(state[f"exp_avg.{name}"]).to(master.device, copy=True),
                    "exp_avg_sq": _local(state[f"exp_avg_sq.{name}"]).to(master.device, copy=True),
                }
        self._write_back()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights, shards gathered: every worker must call it where parameters are sharded."""
        laid_out = {name: self._laid_out(name, master) for name, master in self.masters.items()}
        return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in laid_out.items()}

    def _laid_out(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """A local tensor as the part of the whole that its parameter is."""
        parameter = self.parameters[name]
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(), run_check=False
        )

    def _norm(self, gradients: Mapping[str, torch.Tensor]) -> float:
        """The norm of the whole gradient. Workers that hold the same part of a sharded one count it once."""
        own: list[torch.Tensor] = []
        shared: dict[int, list[torch.Tensor]] = {}
        for name, gradient in gradients.items():
            parameter = self.parameters[name]
            (shared.setdefault(_num_holders(parameter), []) if isinstance(parameter, DTensor) else own).append(gradient)
        total = _square(own)
        if shared:
            squares = torch.stack([_square(parts) / holders for holders, parts in shared.items()]).sum()
            dist.all_reduce(squares)
            total = total.to(squares.device) + squares
        return float(total.sqrt())

    @torch.no_grad()
    def _write_back(self) -> None:
        torch._foreach_copy_([_local(p) for p in self.parameters.values()], list(self.masters.values()))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_holders(parameter: DTensor) -> int:
    """How many workers hold the same part of it."""
    mesh = parameter.device_mesh
    parts = math.prod(mesh.size(dim) for dim, placement in enumerate(parameter.placements) if not placement.is_replicate())
    return dist.get_world_size() // parts


def _square(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The squared norm of all together."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum() if tensors else torch.zeros(())
