"""Bottleneck adapters, ours: no maintained library places them in today's decoders."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.methods import Bottleneck
from adaptfleet.core.methods.adaptation import Adaptation, AdaptedModel
from adaptfleet.core.methods.targets import linear_modules

_SUBLAYER_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2")
"""Last linear modules of attention and feed-forward, by the names that decoders give them."""
_ATTENTION = ("attn", "attention")
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
CONFIG = "bottleneck_config.json"
WEIGHTS = "bottleneck.safetensors"


class AdapterNetwork(nn.Module):
    """h + up(activation(down(h))). `up` begins at zero, so the network begins as the identity."""

    def __init__(self, width: int, bottleneck: int, activation: str, like: torch.Tensor) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck, device=like.device, dtype=like.dtype)
        self.up = nn.Linear(bottleneck, width, device=like.device, dtype=like.dtype)
        self.activation = _ACTIVATIONS[activation]
        nn.init.normal_(self.down.weight, std=0.02)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return hidden_BTD + self.up(self.activation(self.down(hidden_BTD)))


class WithAdapter(nn.Module):
    """A sublayer's last linear module, and the network after it. What stands around it needs no change."""

    def __init__(self, module: nn.Module, network: AdapterNetwork) -> None:
        super().__init__()
        self.module = module
        self.bottleneck = network

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(self.module(hidden_BTD))


class BottleneckAdaptation(Adaptation):
    def __init__(self, method: Bottleneck) -> None:
        self.method = method

    def check(self, model: PreTrainedModel) -> None:
        self._places(model)

    def attach(self, model: PreTrainedModel, seed: int) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in self._places(model):
                parent, _, last = name.rpartition(".")
                module = model.get_submodule(name)
                width = model.config.hidden_size
                size = max(1, round(width / self.method.reduction))
                network = AdapterNetwork(width, size, self.method.activation, next(module.parameters()))
                setattr(model.get_submodule(parent), last, WithAdapter(module, network))
        return model

    def _places(self, model: PreTrainedModel) -> list[str]:
        """Full names of the modules that get a network after them. ContractError where the architecture's names are unknown."""
        width = model.config.hidden_size
        outputs = [
            name for name, (_, out) in linear_modules(model).items() if name.rpartition(".")[2] in _SUBLAYER_OUTPUTS and out == width
        ]
        attention = [name for name in outputs if any(part in name.rpartition(".")[0] for part in _ATTENTION)]
        feedforward = [name for name in outputs if name not in attention]
        wanted = attention + feedforward if self.method.placement == "houlsby" else feedforward
        layers = model.config.num_hidden_layers
        if len(feedforward) != layers or (self.method.placement == "houlsby" and len(attention) != layers):
            raise ContractError(
                f"method.kind bottleneck finds {len(attention)} attention and {len(feedforward)} feed-forward outputs in the "
                f"{layers} layers of {type(model).__name__}; it knows outputs called {', '.join(_SUBLAYER_OUTPUTS)}. Use lora."
            )
        return sorted(wanted)

    def export(self, model: AdaptedModel, folder: Path, base_id: str) -> None:
        """Our own format: the contract as JSON beside the networks' tensors."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters() if ".bottleneck." in name}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"base": base_id, **self.method.model_dump(mode="json")}, indent=1))


def load_bottleneck(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A base with the networks that `export` saved."""
    config = json.loads((folder / CONFIG).read_text())
    config.pop("base")
    adapted = BottleneckAdaptation(Bottleneck.model_validate(config)).attach(model, seed=0)
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS).items():
            parameters[name].copy_(tensor)
    return adapted
