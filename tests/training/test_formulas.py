"""Attention and positions of each architecture, in the call that training makes, against their formulas written out.

Two examples stand in one packed row; each is computed alone here, from position 0.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.packing import Pack, pack_arrays
from adaptfleet.core.packed_forward import PackedBatch, hidden_states
from tests.training.conftest import VOCABULARY, make_model

LENGTHS = (9, 6)
HEADS = 4


def packed() -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    rows = [Encoded(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist(), [False] + [True] * (n - 1)) for n in LENGTHS]
    return PackedBatch.stack([pack_arrays(Pack((0, 1)), rows, sum(LENGTHS), 0)], torch.device("cpu"))


def seen(model: Any, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into a module and what comes out of it, [T, D] each, in one packed pass."""
    caught: list[tuple[torch.Tensor, torch.Tensor]] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        caught.append((given[0], (output[0] if isinstance(output, tuple) else output).reshape(given[0].shape)))

    handle = module.register_forward_hook(catch, with_kwargs=True)
    with torch.no_grad():
        hidden_states(model, packed())
    handle.remove()
    return caught[0]


def rope(x_HTD: torch.Tensor, theta: float, num_rotated: int | None = None) -> torch.Tensor:
    """Rotary positions, arXiv 2104.09864: the pair (i, i + d/2) is turned by the angle t * theta^(-2i/d); d of the D numbers take part."""
    width = num_rotated or x_HTD.shape[-1]
    turned_HTD, rest = x_HTD[..., :width], x_HTD[..., width:]
    half = width // 2
    angle_TI = torch.arange(x_HTD.shape[1])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = turned_HTD[..., :half], turned_HTD[..., half:]
    cos, sin = angle_TI.cos(), angle_TI.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attention(q_HTD: torch.Tensor, k_HTD: torch.Tensor, v_HTD: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V with a causal mask, arXiv 1706.03762; groups of query heads share a key head, arXiv 2305.13245."""
    group = q_HTD.shape[0] // k_HTD.shape[0]
    k_HTD, v_HTD = k_HTD.repeat_interleave(group, 0), v_HTD.repeat_interleave(group, 0)
    scores_HTT = q_HTD @ k_HTD.transpose(1, 2) / math.sqrt(q_HTD.shape[-1])
    scores_HTT = scores_HTT.masked_fill(torch.ones_like(scores_HTT[0]).triu(1).bool(), -math.inf)
    return (scores_HTT.softmax(-1) @ v_HTD).transpose(0, 1).flatten(1)


def heads(x_TD: torch.Tensor, width: int) -> torch.Tensor:
    return x_TD.unflatten(1, (-1, width)).transpose(0, 1)


def llama_like(module: Any, x_TD: torch.Tensor, theta: float) -> torch.Tensor:
    q, k, v = (heads(projection(x_TD), module.head_dim) for projection in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):  # Qwen3 normalizes each head's query and key
        q, k = (F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon) for x, norm in ((q, module.q_norm), (k, module.k_norm)))
    return module.o_proj(attention(rope(q, theta), rope(k, theta), v))


def gpt2(module: Any, x_TD: torch.Tensor, theta: float) -> torch.Tensor:
    q, k, v = (heads(x, 32 // HEADS) for x in (x_TD @ module.c_attn.weight + module.c_attn.bias).split(32, dim=1))
    return attention(q, k, v) @ module.c_proj.weight + module.c_proj.bias


def gpt_neox(module: Any, x_TD: torch.Tensor, theta: float) -> torch.Tensor:
    q, k, v = heads(module.query_key_value(x_TD), 3 * 32 // HEADS).chunk(3, dim=-1)
    num_rotated = int(32 // HEADS * 0.25)
    return module.dense(attention(rope(q, theta, num_rotated), rope(k, theta, num_rotated), v))


def opt(module: Any, x_TD: torch.Tensor, theta: float) -> torch.Tensor:
    q, k, v = (heads(projection(x_TD), 32 // HEADS) for projection in (module.q_proj, module.k_proj, module.v_proj))
    return module.out_proj(attention(q, k, v))


CASES: dict[str, tuple[str, Callable[[Any, torch.Tensor, float], torch.Tensor]]] = {
    "llama": ("model.layers.1.self_attn", llama_like),
    "qwen2": ("model.layers.1.self_attn", llama_like),
    "qwen3": ("model.layers.1.self_attn", llama_like),
    "gpt2": ("transformer.h.1.attn", gpt2),
    "gpt_neox": ("gpt_neox.layers.1.attention", gpt_neox),
    "opt": ("model.decoder.layers.1.self_attn", opt),
}


@pytest.mark.parametrize("architecture", CASES)
def test_attention_is_its_formula(architecture: str) -> None:
    model = make_model(architecture)
    name, formula = CASES[architecture]
    module = model.get_submodule(name)
    given_TD, output_TD = seen(model, module)
    with torch.no_grad():
        expected = torch.cat([formula(module, part, 10_000.0) for part in given_TD.split(list(LENGTHS))])
    torch.testing.assert_close(output_TD, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "first_layer", "tokens", "positions", "offset"),
    [
        ("gpt2", "transformer.h.0", "transformer.wte", "transformer.wpe", 0),
        ("opt", "model.decoder.layers.0", "model.decoder.embed_tokens", "model.decoder.embed_positions", 2),
    ],
)
def test_learned_positions_begin_anew_with_each_example(
    architecture: str, first_layer: str, tokens: str, positions: str, offset: int
) -> None:
    model = make_model(architecture)
    given_TD, _ = seen(model, model.get_submodule(first_layer))
    at_T = torch.cat([torch.arange(n) for n in LENGTHS]) + offset
    weights = [model.get_submodule(name).weight for name in (tokens, positions)]
    torch.testing.assert_close(given_TD, weights[0][packed().input_ids_BT[0]] + weights[1][at_T])
