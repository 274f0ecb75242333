"""One layer's adapters stacked into few matrix products.

    h = (x @ stacked A) * mask          every slice and every adapter of the layer in one product
    out[slice] = h[slice] @ stacked B   one product for each slice
    y += out                            one sum where the products can write side by side

A column of the stack belongs to one adapter. The mask keeps a row's own adapter and zeroes the others; for a row of the base it zeroes all.

Shape suffixes: T tokens (rows), S adapters' slots, R ranks (columns of the stack), K inputs, N outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel

_PRIMITIVES_KEPT = 32
"""oneDNN primitives (one for each number of rows) cached with each packed weight; vLLM's own linear layers keep as many."""

MERGED_OUTPUTS = 1024
"""Up to so many outputs, and where products cannot write side by side, one product with a block-diagonal B costs less than the calls of a
product and a sum for each slice."""

PADDING = -2
"""In place of a slot, for a column of zeros."""
_TILE_INPUTS, _TILE_OUTPUTS = 32, 16

_packed_product: Any = torch.ops._C.onednn_mm.default if vllm_ops._supports_onednn else None
_tiled_product: Any = torch.ops._C.weight_packed_linear.default if hasattr(torch.ops._C, "weight_packed_linear") else None


class Product:
    """out_TN = x_TK @ weight_NK.T with the weight packed once, as vLLM packs the base's own layers; 1.5 to 2 times as fast as
    `torch.mm` at the few rows of a decoding batch. Small weights take the kernel for AMX tiles, by vLLM's own rule."""

    def __init__(self, weight_NK: torch.Tensor) -> None:
        num_outputs, num_inputs = weight_NK.shape
        self.writes_columns = num_outputs >= _TILE_OUTPUTS and _takes_tiles(num_outputs, num_inputs, weight_NK.dtype)
        """Whether `out_TN` may be some columns of a wider tensor. Otherwise it has to be contiguous; oneDNN's operator does not check."""
        self._weight_NK = weight_NK
        self._packed: Any = None
        if self.writes_columns:
            self._weight_NK = torch.ops._C.convert_weight_packed(weight_NK)
        elif vllm_ops._supports_onednn:
            self._packed = vllm_ops.create_onednn_mm(weight_NK.t(), _PRIMITIVES_KEPT)
        self._handler = None if self._packed is None else self._packed.handler_tensor

    def __call__(self, out_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
        """The rows of `x_TK` may be strided."""
        if self.writes_columns:
            _tiled_product(out_TN, x_TK, self._weight_NK, None, True)
        elif self._handler is None:
            torch.mm(x_TK, self._weight_NK.t(), out=out_TN)
        else:
            _packed_product(out_TN, x_TK, None, self._handler)


def _takes_tiles(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    return _tiled_product is not None and check_cpu_sgl_kernel(num_outputs, num_inputs, dtype)


@dataclass(frozen=True, slots=True)
class Expand:
    """The product of one slice: columns `ranks` of h into columns `outputs` of y."""

    product: Product
    ranks: slice
    outputs: slice | None
    """None: all of them."""
    num_outputs: int


@dataclass(frozen=True, slots=True)
class Stack:
    """One layer's matrices of some slots. Ranks that are zero (padding to max_lora_rank, modules left alone) are left out."""

    shrink: Product | None
    """None for an embedding, whose A product is a look-up that vLLM has done."""
    expands: tuple[Expand, ...]
    side_by_side: bool
    """The products write columns of one tensor, which together are all of y's."""
    column_slots: tuple[int, ...]
    """The slot each column of the stack belongs to, or PADDING. Empty: no slot changes this layer."""
    column_ranks: tuple[int, ...]
    """The rank each column is within its adapter."""


def build_stack(
    a_S1RK: Sequence[torch.Tensor] | None, b_S1NR: Sequence[torch.Tensor], slots: Sequence[int], offsets: Sequence[int], limit: int
) -> Stack:
    """Stacks the matrices of `slots`. Slice i of the layer writes y's columns from `offsets[i]` on, and none beyond `limit`: layer and
    adapter may pad their outputs differently."""
    rows_of_a: list[torch.Tensor] = []
    parts: list[tuple[torch.Tensor, int, int]] = []
    column_slots: list[int] = []
    column_ranks: list[int] = []
    chosen = torch.tensor(list(slots), dtype=torch.long)
    for i, b in enumerate(b_S1NR):
        b_SNR = b[chosen].squeeze(1) if b.ndim == 4 else b[chosen]
        width = min(b_SNR.shape[1], limit - offsets[i])
        b_SRN = b_SNR[:, :width].transpose(1, 2)
        used_SR = b_SRN.ne(0).any(-1)
        if a_S1RK is not None:
            a = a_S1RK[i][chosen]
            a_SRK = a.squeeze(1) if a.ndim == 4 else a
            used_SR = used_SR & a_SRK.ne(0).any(-1)
            rows_of_a.append(a_SRK[used_SR])
        places = used_SR.nonzero().tolist()
        if not places:
            continue
        start = len(column_slots)
        b_NR = b_SRN[used_SR].t()
        num_padded = -len(places) % _TILE_INPUTS if _takes_tiles(_TILE_OUTPUTS, _TILE_INPUTS, b_NR.dtype) else 0
        column_slots += [slots[s] for s, _ in places] + [PADDING] * num_padded
        column_ranks += [r for _, r in places] + [0] * num_padded
        parts.append((torch.nn.functional.pad(b_NR, (0, num_padded)).contiguous(), start, offsets[i]))
        if a_S1RK is not None and num_padded:
            rows_of_a.append(rows_of_a[-1].new_zeros(num_padded, rows_of_a[-1].shape[1]))
    expands = _apart(parts, limit)
    side_by_side = sum(e.num_outputs for e in expands) == limit and all(e.product.writes_columns for e in expands)
    if len(parts) > 1 and limit <= MERGED_OUTPUTS and not side_by_side:
        expands = _merged(parts, limit)
    shrink = Product(torch.cat(rows_of_a).contiguous()) if column_slots and a_S1RK is not None else None
    return Stack(shrink, tuple(expands), side_by_side, tuple(column_slots), tuple(column_ranks))


def _apart(parts: Sequence[tuple[torch.Tensor, int, int]], limit: int) -> list[Expand]:
    """A product for each (B, its first column of h, its first column of y)."""
    return [
        Expand(
            Product(b_NR),
            slice(start, start + b_NR.shape[1]),
            None if b_NR.shape[0] == limit else slice(offset, offset + b_NR.shape[0]),
            b_NR.shape[0],
        )
        for b_NR, start, offset in parts
    ]


def _merged(parts: Sequence[tuple[torch.Tensor, int, int]], limit: int) -> list[Expand]:
    num_ranks = sum(b_NR.shape[1] for b_NR, _, _ in parts)
    whole_NR = parts[0][0].new_zeros(limit, num_ranks)
    for b_NR, start, offset in parts:
        whole_NR[offset : offset + b_NR.shape[0], start : start + b_NR.shape[1]] = b_NR
    return [Expand(Product(whole_NR), slice(0, num_ranks), None, limit)]


def mask_for(token_slots: Sequence[int], column_slots: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
    """mask_TR: 1 where the column belongs to the row's slot. None: it would be all ones."""
    if len(set(token_slots)) == 1 and set(column_slots) - {PADDING} == {token_slots[0]}:
        return None
    rows_T = torch.tensor(list(token_slots), dtype=torch.long)
    columns_R = torch.tensor(list(column_slots), dtype=torch.long)
    return (rows_T[:, None] == columns_R[None]).to(dtype)
