"""Causal attention of packed rows, one example at a time: no work on the pairs that a mask would throw away.

A row of 1,024 tokens that packs twelve examples has a million pairs, of which a mask lets 45,000 through. Here each segment's own square
is computed, by plain matrix products where it is short and by PyTorch's flash kernel where it is long. On the CPU only: there the products
of a square of a hundred tokens are several times as fast as the flash kernel, which is made for long ones.

Shapes: B rows, H heads, T tokens, L tokens of a segment, D numbers of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "segments"
"""Of this implementation among transformers' own."""
LONGEST_SQUARE = 512
"""Tokens of a segment whose square of scores is held at once; the flash kernel takes longer ones."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def use_segment_attention(model: PreTrainedModel) -> None:
    """Lets the model's attention take segment ids in place of a mask. Calls without them stay what they were; on another device, or where
    the architecture does not let its attention be chosen, the model does too."""
    if model.device.type == "cpu" and model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)


def takes_segments(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation == NAME and model.device.type == "cpu"


def segment_mask(segment_ids_BT: torch.Tensor, dtype: torch.dtype, num_seen_by_all: int = 0) -> torch.Tensor:
    """[B, 1, T, P + T], 0 where the key is of the query's segment and not after it, else the type's lowest number.

    The first P = `num_seen_by_all` keys are a prefix that every segment sees.
    """
    num_rows, num_tokens = segment_ids_BT.shape
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segment_ids_BT.device).tril_()
    seen_BTP = torch.ones(num_rows, num_tokens, num_seen_by_all, dtype=torch.bool, device=segment_ids_BT.device)
    allowed_BTK = torch.cat([seen_BTP, same_BTT & causal_TT], dim=2)
    mask_BTK = torch.zeros(allowed_BTK.shape, dtype=dtype, device=segment_ids_BT.device)
    return mask_BTK.masked_fill_(~allowed_BTK, torch.finfo(dtype).min)[:, None]


def _segments(segment_ids_BT: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Each run of equal ids, as its row and its tokens."""
    num_tokens = segment_ids_BT.shape[1]
    for row, ids_T in enumerate(segment_ids_BT):
        cuts = (torch.nonzero(ids_T[1:] != ids_T[:-1]).flatten() + 1).tolist()
        for begin, end in zip([0, *cuts], [*cuts, num_tokens], strict=True):
            yield row, slice(begin, end)


def _probs(query_HLD: torch.Tensor, key_HLD: torch.Tensor, scale: float, later_LL: torch.Tensor) -> torch.Tensor:
    """[H, L, L]: what each query gives to the keys up to its own."""
    scores_HLL = torch.baddbmm(later_LL, query_HLD, key_HLD.transpose(1, 2), alpha=scale)
    return torch.softmax(scores_HLL, dim=-1)


def _later(num_tokens: int, like: torch.Tensor) -> torch.Tensor:
    """[L, L] of -inf where the key comes after the query, else 0."""
    return torch.full((num_tokens, num_tokens), float("-inf"), dtype=like.dtype).triu_(1)


@torch.library.custom_op("adaptfleet::segment_attention", mutates_args=())
def _attention(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, segment_ids_BT: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention's output, and the log of each query's sum of exponents where the flash kernel will ask for it."""
    out_BHTD = torch.empty_like(query_BHTD)
    log_sums_BHT = query_BHTD.new_zeros(query_BHTD.shape[:3], dtype=torch.float32)
    later_LL = _later(min(LONGEST_SQUARE, query_BHTD.shape[2]), query_BHTD)
    for row, part in _segments(segment_ids_BT):
        query, key, value = query_BHTD[row, :, part], key_BHTD[row, :, part], value_BHTD[row, :, part]
        length = part.stop - part.start
        if length > LONGEST_SQUARE:
            out, log_sums = _flash(query[None], key[None], value[None], 0.0, True, scale=scale)
            out_BHTD[row, :, part], log_sums_BHT[row, :, part] = out[0], log_sums[0]
        else:
            out_BHTD[row, :, part] = _probs(query, key, scale, later_LL[:length, :length]) @ value
    return out_BHTD, log_sums_BHT


@_attention.register_fake
def _(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, segment_ids_BT: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query_BHTD), query_BHTD.new_empty(query_BHTD.shape[:3], dtype=torch.float32)


@torch.library.custom_op("adaptfleet::segment_attention_backward", mutates_args=())
def _attention_backward(
    grad_BHTD: torch.Tensor,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    out_BHTD: torch.Tensor,
    log_sums_BHT: torch.Tensor,
    segment_ids_BT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value. The probabilities of short segments are made once more: keeping them would cost more memory
    than the time is worth."""
    grads_q, grads_k, grads_v = torch.empty_like(query_BHTD), torch.empty_like(key_BHTD), torch.empty_like(value_BHTD)
    later_LL = _later(min(LONGEST_SQUARE, query_BHTD.shape[2]), query_BHTD)
    for row, part in _segments(segment_ids_BT):
        at = (row, slice(None), part)
        grad, query, key, value = grad_BHTD[at], query_BHTD[at], key_BHTD[at], value_BHTD[at]
        length = part.stop - part.start
        if length > LONGEST_SQUARE:
            out, log_sums = out_BHTD[at][None], log_sums_BHT[at][None]
            found = _flash_backward(grad[None], query[None], key[None], value[None], out, log_sums, 0.0, True, scale=scale)
            grads_q[at], grads_k[at], grads_v[at] = (g[0] for g in found)
        else:
            probs_HLL = _probs(query, key, scale, later_LL[:length, :length])
            grads_v[at] = probs_HLL.transpose(1, 2) @ grad
            grad_scores_HLL = torch._softmax_backward_data(grad @ value.transpose(1, 2), probs_HLL, -1, probs_HLL.dtype) * scale
            grads_q[at] = grad_scores_HLL @ key
            grads_k[at] = grad_scores_HLL.transpose(1, 2) @ query
    return grads_q, grads_k, grads_v


@_attention_backward.register_fake
def _(
    grad_BHTD: torch.Tensor,
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    out_BHTD: torch.Tensor,
    log_sums_BHT: torch.Tensor,
    segment_ids_BT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query_BHTD), torch.empty_like(key_BHTD), torch.empty_like(value_BHTD)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, segment_ids_BT, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, segment_ids_BT)


def _backward(ctx: Any, grad_BHTD: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    return *_attention_backward(grad_BHTD, *ctx.saved_tensors, ctx.scale), None, None


_attention.register_autograd(_backward, setup_context=_keep)


def segment_attention(
    query_BHTD: torch.Tensor, key_BHTD: torch.Tensor, value_BHTD: torch.Tensor, segment_ids_BT: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale * Q K^T) V [B, H, T, D], where a query sees its own segment up to itself. A segment is a run of equal ids."""
    return _attention(query_BHTD, key_BHTD, value_BHTD, segment_ids_BT, scale)[0]


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer. A mask of whole numbers [B, 1, 1, T] is segment ids; any other goes to PyTorch's attention."""
    if attention_mask is None or attention_mask.is_floating_point() or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    segment_ids_BT = attention_mask[:, 0, 0]
    if dropout or value.shape[-1] != query.shape[-1] or kwargs.get("position_bias") is not None:
        mask = segment_mask(segment_ids_BT, query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_BHTD = segment_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), segment_ids_BT, scale)
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
