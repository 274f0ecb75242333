"""Cuts a model down to the units that stay. The result is a plain, smaller model of the same architecture."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from adaptfleet.contracts.compression import Prune
from adaptfleet.core.pruning.importance import Importance
from adaptfleet.core.pruning.layout import Layout, Sizes, head_size, layout_of, num_groups, planned_sizes, sizes


@dataclass(frozen=True)
class Kept:
    """The units that stay, by number, ascending. `mlp` and `kv_groups` have a list for each layer of the whole model."""

    mlp: list[list[int]]
    kv_groups: list[list[int]]
    hidden: list[int]
    layers: list[int]


def choose(config: PretrainedConfig, spec: Prune, importance: Importance) -> Kept:
    """The best units of each kind, as many as the step leaves."""
    left = planned_sizes(config, spec)
    return Kept(
        [_best(scores_C, left.mlp_width) for scores_C in importance.mlp_LC[spec.importance]],
        [_best(scores_G, left.kv_groups) for scores_G in importance.kv_groups_LG[spec.importance]],
        _best(importance.hidden_D[spec.importance], left.hidden_width),
        _best(importance.layers_L, left.layers),
    )


def _best(scores: torch.Tensor, count: int) -> list[int]:
    """A stable sort: of equal scores the first unit stays."""
    return sorted(torch.argsort(scores, descending=True, stable=True)[:count].tolist())


def planned_config(config: PretrainedConfig, left: Sizes) -> PretrainedConfig:
    """The smaller model's config."""
    smaller = copy.deepcopy(config)
    full = sizes(config)
    setattr(smaller, layout_of(config).width_key, left.mlp_width)
    if left.kv_groups != full.kv_groups:
        smaller.num_attention_heads = config.num_attention_heads // full.kv_groups * left.kv_groups
        smaller.num_key_value_heads = left.kv_groups
    if left.kv_groups != full.kv_groups or left.hidden_width != full.hidden_width:
        smaller.head_dim = head_size(config)
    smaller.hidden_size = left.hidden_width
    smaller.num_hidden_layers = left.layers
    if getattr(config, "layer_types", None):
        smaller.layer_types = config.layer_types[: left.layers]
    if getattr(config, "max_window_layers", None):
        smaller.max_window_layers = min(config.max_window_layers, left.layers)
    return smaller


@torch.no_grad()
def sliced(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model of the kept units; shares no memory with the old one."""
    config = model.config
    layout = layout_of(config)
    left = Sizes(len(kept.mlp[0]), len(kept.kv_groups[0]), len(kept.hidden), len(kept.layers))
    smaller_config = planned_config(config, left)
    if getattr(config, "layer_types", None):
        smaller_config.layer_types = [config.layer_types[i] for i in kept.layers]
    cut = copy.deepcopy(model)
    blocks = list(layout.blocks(cut))
    for i in kept.layers:
        _cut_block(blocks[i], layout, kept.mlp[i], kept.kv_groups[i], config)
    cut.set_submodule(layout.layers, nn.ModuleList(blocks[i] for i in kept.layers))
    if len(kept.hidden) < config.hidden_size:
        _cut_stream(cut, layout, kept.hidden)
    state = {name: tensor.clone() for name, tensor in cut.state_dict().items()}
    made = AutoModelForCausalLM.from_config(smaller_config, dtype=model.dtype, attn_implementation="sdpa")
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.requires_grad_(False).eval()


def _cut_block(block: nn.Module, layout: Layout, channels: list[int], groups: list[int], config: PretrainedConfig) -> None:
    for name in layout.mlp_in:
        _keep_outputs(block.get_submodule(name), channels)
    _keep_inputs(block.get_submodule(layout.mlp_out), channels)
    if len(groups) == num_groups(config):
        return
    size, heads_each = head_size(config), config.num_attention_heads // num_groups(config)
    places_kv = [group * size + i for group in groups for i in range(size)]
    places_q = [group * heads_each * size + i for group in groups for i in range(heads_each * size)]
    _keep_outputs(block.get_submodule(layout.query), places_q)
    for name in layout.key_value:
        _keep_outputs(block.get_submodule(name), places_kv)
    _keep_inputs(block.get_submodule(layout.attention_out), places_q)


def _cut_stream(model: PreTrainedModel, layout: Layout, channels: list[int]) -> None:
    """The residual stream's channels, everywhere: whatever reads it loses inputs, whatever writes it loses outputs."""
    embedding = model.get_submodule(layout.embedding)
    is_tied = model.get_output_embeddings().weight is embedding.weight
    embedding.weight = _parameter(embedding.weight[:, channels])  # type: ignore[index]
    if is_tied:
        model.get_output_embeddings().weight = embedding.weight
    else:
        _keep_inputs(model.get_output_embeddings(), channels)
    for norm in (model.get_submodule(layout.last_norm), *(b.get_submodule(n) for b in layout.blocks(model) for n in layout.norms)):
        norm.weight = _parameter(norm.weight[channels])  # type: ignore[index]
    for block in layout.blocks(model):
        for name in (layout.query, *layout.key_value, *layout.mlp_in):
            _keep_inputs(block.get_submodule(name), channels)
        for name in (layout.attention_out, layout.mlp_out):
            _keep_outputs(block.get_submodule(name), channels)


def _keep_outputs(linear: nn.Module, places: list[int]) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = _parameter(linear.weight[places])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias[places])


def _keep_inputs(linear: nn.Module, places: list[int]) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = _parameter(linear.weight[:, places])


def _parameter(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)
