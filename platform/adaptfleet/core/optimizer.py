"""AdamW over float32 master copies of the trainable parameters."""

import torch
from torch import nn


class MasterAdamW:
    """AdamW (arXiv 1711.05101) whose weights and moments are float32 whatever type the model computes in.

    A bfloat16 weight has 8 bits of mantissa: an update smaller than 1/256 of it would be lost.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}
        self._adam = torch.optim.AdamW(self.masters.values(), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, foreach=True)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """One update from the parameters' gradients, which are then dropped. Returns their norm before clipping."""
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self.masters[name].grad = torch.zeros_like(self.masters[name]) if gradient is None else gradient.float()
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters.values(), max_grad_norm, foreach=True)
        self._adam.param_groups[0]["lr"] = learning_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._write_back()
        return float(norm)

    @torch.no_grad()
    def _write_back(self) -> None:
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a resumed run needs, as named tensors: `weight.*`, `exp_avg.*`, `exp_avg_sq.*` and `updates`."""
        state = {f"weight.{name}": master for name, master in self.masters.items()}
        updates = 0.0
        for name, master in self.masters.items():
            moments = self._adam.state.get(master)
            if moments:
                state[f"exp_avg.{name}"] = moments["exp_avg"]
                state[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
                updates = float(moments["step"])
        return {**{key: value.detach().cpu().contiguous() for key, value in state.items()}, "updates": torch.tensor(updates)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        updates = state["updates"].clone()
        for name, master in self.masters.items():
            master.copy_(state[f"weight.{name}"])
            if float(updates):
                self._adam.state[master] = {
                    "step": updates.clone(),
                    "exp_avg": state[f"exp_avg.{name}"].to(master.device, copy=True),
                    "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(master.device, copy=True),
                }
        self._write_back()
