"""Where an architecture keeps the units that can be pruned: modules of a decoder layer, and the config's names for their counts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from adaptfleet.contracts.compression import Prune
from adaptfleet.contracts.errors import ContractError, ModelError


@dataclass(frozen=True)
class Layout:
    layers: str
    """The list of decoder layers."""
    mlp_in: tuple[str, ...]
    """Each output of these is one channel of the feed-forward."""
    mlp_out: str
    """Takes the channels as inputs."""
    width_key: str
    """The config's name for the number of channels."""
    query: str = "self_attn.q_proj"
    key_value: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms over the residual stream, inside a layer; the last one is outside."""
    last_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    prunes_groups: bool = False
    """The engine takes a head size that is not hidden size / heads."""
    prunes_hidden: bool = False

    def blocks(self, model: PreTrainedModel) -> Iterator[nn.Module]:
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return iter(layers)


_LLAMA = Layout("model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")
_FREE_HEADS = Layout(
    "model.layers", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size", prunes_groups=True, prunes_hidden=True
)
LAYOUTS = {
    "llama": _FREE_HEADS,
    "mistral": _FREE_HEADS,
    "qwen3": _FREE_HEADS,
    # vLLM's Qwen2 computes the head size from the hidden size
    "qwen2": _LLAMA,
    "opt": Layout(
        "model.decoder.layers",
        ("fc1",),
        "fc2",
        "ffn_dim",
        attention_out="self_attn.out_proj",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        last_norm="model.decoder.final_layer_norm",
        embedding="model.decoder.embed_tokens",
    ),
}
"""By the config's `model_type`."""


def layout_of(config: PretrainedConfig) -> Layout:
    """ModelError: an architecture that is not known here."""
    found = LAYOUTS.get(config.model_type)
    if found is None:
        raise ModelError(
            f"models of the type {config.model_type!r} cannot be pruned yet; known are {', '.join(sorted(LAYOUTS))}. Leave prune out."
        )
    return found


def head_size(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def num_groups(config: PretrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


@dataclass(frozen=True)
class Sizes:
    """What is left of each kind of unit."""

    mlp_width: int
    kv_groups: int
    hidden_width: int
    layers: int


def sizes(config: PretrainedConfig) -> Sizes:
    return Sizes(getattr(config, layout_of(config).width_key), num_groups(config), config.hidden_size, config.num_hidden_layers)


def planned_sizes(config: PretrainedConfig, spec: Prune) -> Sizes:
    """What a step leaves. ContractError lists all that cannot be taken."""
    layout, full = layout_of(config), sizes(config)
    wrong: list[str] = []
    if spec.kv_groups and not layout.prunes_groups:
        free = ", ".join(name for name, known in LAYOUTS.items() if known.prunes_groups)
        wrong.append(
            f"kv_groups is {spec.kv_groups}, but the engine derives the head size of {config.model_type!r} from its hidden size, so heads "
            f"cannot go alone; leave it 0 (it works for {free})"
        )
    elif spec.kv_groups >= full.kv_groups:
        wrong.append(f"kv_groups is {spec.kv_groups}, but the model has {full.kv_groups} a layer, one of which must stay")
    if spec.layers >= full.layers:
        wrong.append(f"layers is {spec.layers}, but the model has {full.layers}, one of which must stay")
    if spec.hidden_width and not layout.prunes_hidden:
        wrong.append(f"hidden_width is {spec.hidden_width}, which {config.model_type!r} has no way to lose; leave it 0")
    if wrong:
        raise ContractError("prune: " + "; ".join(wrong) + ".")
    return Sizes(
        _rounded(full.mlp_width, spec.mlp_width, spec.round_to),
        full.kv_groups - spec.kv_groups,
        _rounded(full.hidden_width, spec.hidden_width, spec.round_to),
        full.layers - spec.layers,
    )


def _rounded(full: int, share: float, multiple: int) -> int:
    """The width left, the nearest multiple; all of it where nothing is asked for."""
    if not share:
        return full
    return min(full, max(multiple, round(full * (1 - share) / multiple) * multiple))
