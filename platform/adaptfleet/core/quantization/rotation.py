"""Before rounding, a model is turned into an equal one without outliers: QuaRot's rotations that cost nothing when it runs
(arXiv 2404.00456).

The residual stream is multiplied by an orthogonal matrix R, which RMS norms do not feel once their weights stand in the layers behind them:
what writes the stream is multiplied by R, what reads it by its inverse. A channel far larger than the others, which would take the 8-bit
range of each token for itself, becomes a small share of all channels. A second one, S, turns each head's values, and back in the output
projection. The model computes what it computed; adapters of it, which read the stream, no longer fit.
Shapes: D residual channels, O outputs, I inputs, H heads (or groups), S size of a head.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adaptfleet.contracts.errors import ModelError
from adaptfleet.core.pruning.layout import head_size, layout_of

ROTATABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose every norm over the residual stream is an RMS norm."""


def orthogonal(size: int, seed: int) -> torch.Tensor:
    """A random rotation in float64, the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0) -> None:
    """In place; the head gets weights of its own. ModelError: an architecture with other norms."""
    config = model.config
    if config.model_type not in ROTATABLE:
        raise ModelError(f"rotate works for {', '.join(ROTATABLE)}, not for {config.model_type}; leave it out.")
    layout, size = layout_of(config), head_size(config)
    stream_DD, values_SS = orthogonal(config.hidden_size, seed), orthogonal(size, seed + 1)
    untie(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    last_norm: Any = model.get_submodule(layout.last_norm)
    _read(head, last_norm, stream_DD)
    _set(embedding, embedding.weight.double() @ stream_DD)
    last_norm.weight.fill_(1.0)
    for block in layout.blocks(model):
        norms: list[Any] = [block.get_submodule(name) for name in layout.norms]
        for name in (layout.query, *layout.key_value):
            _read(block.get_submodule(name), norms[0], stream_DD)
        for name in layout.mlp_in:
            _read(block.get_submodule(name), norms[1], stream_DD)
        for norm in norms:
            norm.weight.fill_(1.0)
        _turn_values(block.get_submodule(layout.key_value[-1]), block.get_submodule(layout.attention_out), values_SS)
        for writer in (layout.attention_out, layout.mlp_out):
            _write(block.get_submodule(writer), stream_DD)


def untie(model: Any) -> None:
    """The output head's weights become its own."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def _read(linear: Any, norm: Any, stream_DD: torch.Tensor) -> None:
    """W diag(norm) R: it takes the turned stream, and the norm's weights are its own."""
    _set(linear, (linear.weight.double() * norm.weight.double()) @ stream_DD)


def _write(linear: Any, stream_DD: torch.Tensor) -> None:
    """R^T W: it gives the turned stream."""
    _set(linear, stream_DD.T @ linear.weight.double(), None if linear.bias is None else linear.bias.double() @ stream_DD)


def _turn_values(value: Any, out: Any, values_SS: torch.Tensor) -> None:
    """Attention adds values up with weights, head by head, so a turn of each head's values goes through it."""
    size = len(values_SS)
    weight_HSI = value.weight.double().unflatten(0, (-1, size))
    bias = None if value.bias is None else (value.bias.double().unflatten(0, (-1, size)) @ values_SS).flatten()
    _set(value, (values_SS.T @ weight_HSI).flatten(0, 1), bias)
    _set(out, (out.weight.double().unflatten(1, (-1, size)) @ values_SS).flatten(1))


def _set(module: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)
