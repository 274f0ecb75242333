"""vLLM's LoRA wrapper for CPUs, with stacked and masked products in place of a gathered matrix per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from adaptfleet.on_ray.serve.batch_plan import BASE, segments
from adaptfleet.on_ray.serve.stacked_products import Product, Stack, build_stack, mask_for

RECENT_BATCHES = 16
"""Changes of the batch's make-up for which an absent adapter stays in the stacks."""

_wrappers: list["StackedPunicaWrapper"] = []


@dataclass(slots=True)
class _Step:
    """The products of one segment of the batch for one layer, with the buffers they write and the columns of y (None: all) that these are
    added to. `hidden` and `mask` are TR."""

    rows: slice | None
    """None: all of them."""
    shrink: Product | None
    column_ranks: torch.Tensor
    hidden: torch.Tensor
    mask: torch.Tensor | None
    products: list[tuple[Product, torch.Tensor, torch.Tensor]]
    sums: list[tuple[slice | None, torch.Tensor]]


class _Plan:
    """What a batch of one make-up does at each layer; filled as the layers are first met and kept until the make-up changes."""

    def __init__(self, token_slots: list[int], recent_slots: frozenset[int]) -> None:
        self.token_slots = token_slots
        self.segments = segments(token_slots, recent_slots)
        self.steps: dict[int, list[_Step]] = {}
        self._masks: dict[Any, torch.Tensor | None] = {}
        self._buffers: dict[Any, torch.Tensor] = {}

    def mask(self, rows: slice, stack: Stack, dtype: torch.dtype) -> torch.Tensor | None:
        key = (rows.start, rows.stop, stack.column_slots, dtype)
        if key not in self._masks:
            self._masks[key] = mask_for(self.token_slots[rows], stack.column_slots, dtype)
        return self._masks[key]

    def buffer(self, use: str, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Scratch that all layers share: a CPU runs them one after the other."""
        key = (use, num_rows, width, dtype)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(num_rows, width, dtype=dtype)
        return self._buffers[key]


@dataclass(slots=True)
class _Kept:
    generations: tuple[int, ...]
    stack: Stack


class StackedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc, unused-ignore]
    """Takes the place of `PunicaWrapperCPU`; the rows' slots and the weights come from vLLM unchanged."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._generations: dict[int, int] = {}
        self._last_seen: dict[int, int] = {}
        self._num_updates = 0
        self._tokens: _Plan | None = None
        self._samples: _Plan | None = None
        self._stacks: dict[int, dict[tuple[int, ...], _Kept]] = {}
        self._owners: dict[int, torch.Tensor] = {}
        self._number = len(_wrappers)
        _wrappers.append(self)

    def slot_changed(self, slot: int) -> None:
        """The weights of a slot are new; `stacked_lora.register` has vLLM's adapter manager say so."""
        self._generations[slot] = self._generations.get(slot, 0) + 1
        self._last_seen.pop(slot, None)
        self._tokens = self._samples = None

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._num_updates += 1
        self._tokens = self._samples = None

    def _token_plan(self, num_rows: int) -> _Plan:
        plan = self._tokens
        if plan is None or len(plan.token_slots) != num_rows:
            slots = _fit(self.token_lora_indices.tolist(), num_rows)
            for slot in set(slots) - {BASE}:
                self._last_seen[slot] = self._num_updates
            recent = frozenset(slot for slot, seen in self._last_seen.items() if self._num_updates - seen < RECENT_BATCHES)
            plan = self._tokens = _Plan(slots, recent)
        return plan

    def _stack(
        self, a: Sequence[torch.Tensor] | None, b: Sequence[torch.Tensor], slots: tuple[int, ...], offsets: Sequence[int], limit: int
    ) -> Stack:
        layer = b[0].data_ptr()
        self._owners[layer] = b[0]  # holds the storage, so that no other layer can come to have this address
        kept = self._stacks.setdefault(layer, {})
        generations = tuple(self._generations.get(slot, 0) for slot in slots)
        found = kept.get(slots)
        if found is None or found.generations != generations:
            if len(slots) > 1:
                for other in [key for key in kept if len(key) > 1]:
                    del kept[other]
            found = kept[slots] = _Kept(generations, build_stack(a, b, slots, offsets, limit))
        return found.stack

    def _steps(
        self,
        plan: _Plan,
        y: torch.Tensor,
        a: Sequence[torch.Tensor] | None,
        b: Sequence[torch.Tensor],
        offsets: Sequence[int],
    ) -> list[_Step]:
        steps: list[_Step] = []
        for segment in plan.segments:
            stack = self._stack(a, b, segment.slots, offsets, y.shape[1])
            if not stack.column_slots:
                continue
            rows = slice(segment.start, segment.stop)
            num_rows = segment.stop - segment.start
            dtype = b[0].dtype
            h_TR = plan.buffer("h", num_rows, len(stack.column_slots), dtype)
            if stack.side_by_side:
                whole_TN = plan.buffer("out", num_rows, y.shape[1], dtype)
                outs_TN = [whole_TN if expand.outputs is None else whole_TN[:, expand.outputs] for expand in stack.expands]
                sums: list[tuple[slice | None, torch.Tensor]] = [(None, whole_TN)]
            else:
                outs_TN = [plan.buffer(f"out {i}", num_rows, expand.num_outputs, dtype) for i, expand in enumerate(stack.expands)]
                sums = [(expand.outputs, out_TN) for expand, out_TN in zip(stack.expands, outs_TN, strict=True)]
            products = [(expand.product, h_TR[:, expand.ranks], out_TN) for expand, out_TN in zip(stack.expands, outs_TN, strict=True)]
            all_rows = num_rows == y.shape[0]
            mask_TR = plan.mask(rows, stack, dtype)
            column_ranks = torch.tensor(stack.column_ranks, dtype=torch.long)
            steps.append(_Step(None if all_rows else rows, stack.shrink, column_ranks, h_TR, mask_TR, products, sums))
        plan.steps[b[0].data_ptr()] = steps
        return steps

    def _add(
        self,
        plan: _Plan,
        y_TN: torch.Tensor,
        x_TK: torch.Tensor,
        a: Sequence[torch.Tensor] | None,
        b: Sequence[torch.Tensor],
        offsets: Sequence[int],
        scale: float,
    ) -> None:
        """y_TN += the adapters' share; x_TK is the layer's input, or an embedding's looked-up A when `a` is None."""
        steps = plan.steps.get(b[0].data_ptr())
        if steps is None:
            steps = self._steps(plan, y_TN, a, b, offsets)
        for step in steps:
            y, x, h = y_TN, x_TK, step.hidden
            if step.rows is not None:
                y, x = y[step.rows], x[step.rows]
            if x.dtype != h.dtype:
                x = x.to(h.dtype)
            if step.shrink is not None:
                step.shrink(h, x)
            else:
                torch.index_select(x, 1, step.column_ranks, out=h)
            if step.mask is not None:
                h.mul_(step.mask)
            if scale != 1.0:
                h.mul_(scale)
            for product, part_TR, out_TN in step.products:
                product(out_TN, part_TR)
            for columns, out_TN in step.sums:
                (y if columns is None else y[:, columns]).add_(out_TN)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        if torch.compiler.is_compiling():
            torch.ops.adaptfleet.add_stacked_lora(
                y, x, list(lora_a_stacked), list(lora_b_stacked), scale, list(output_slices), self._number
            )
        else:
            self.add_linear_now(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_linear_now(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
    ) -> None:
        y_TN, x_TK = _rows(y), _rows(x)
        plan = self._token_plan(x_TK.shape[0])
        if plan.segments:
            self._add(plan, y_TN, x_TK, a, b, list(accumulate(output_slices[:-1], initial=0)), scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """The rows of the base looked up slot 0's A; the mask takes that out."""
        if torch.compiler.is_compiling():
            torch.ops.adaptfleet.add_stacked_lora(y, x, [], [lora_b_stacked], 1.0, [y.shape[-1]], self._number)
        else:
            self.add_embedding_now(y, x, lora_b_stacked)

    def add_embedding_now(self, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> None:
        plan = self._token_plan(x.shape[0])
        if plan.segments:
            self._add(plan, y, x, None, (b,), (0,), 1.0)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        y_TN, x_TK = _rows(y), _rows(x)
        plan = self._samples
        if plan is None:
            slots = self.sampler_indices.tolist()
            recent = frozenset(slots) - {BASE}
            plan = self._samples = _Plan(slots, recent)
        if len(plan.token_slots) != x_TK.shape[0]:
            self._check_no_output_head_adapter(x_TK.shape[0], lora_a_stacked, lora_b_stacked)
            return
        if plan.segments:
            self._add(plan, y_TN, x_TK, (lora_a_stacked,), (lora_b_stacked,), (0,), scale)

    def _check_no_output_head_adapter(self, num_rows: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Log probabilities of a prompt come in rows that vLLM names no adapter for. No loss while no adapter changes the head, and the
        endpoint makes sure of that (`catalog`)."""
        present = set(self.sampler_indices.tolist()) - {BASE}
        if any(self._stack((a,), (b,), (slot,), (0,), b.shape[-2]).column_slots for slot in present):
            raise NotImplementedError(
                f"{num_rows} rows of logits, {len(self.sampler_indices)} of them with a known adapter, and an adapter of the output head: "
                f"vLLM does not say which adapter the other rows have. Ask for no prompt_logprobs."
            )

    def add_shrink(
        self,
        y: tuple[torch.Tensor, ...] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """y[i] = x @ A[i] * scale, 0 for rows of the base. For fully sharded adapters, whose ranks are gathered between the products."""
        x_TK = x.reshape(-1, x.shape[-1])
        slots_T = self.token_lora_indices[: x_TK.shape[0]]
        for h, a_S1RK in zip(y, lora_a_stacked, strict=True):
            h_TR = h.view(-1, h.shape[-1])
            h_TR.zero_()
            for slot in _present(slots_T):
                rows = (slots_T == slot).nonzero().squeeze(1)
                product_TR = x_TK[rows] @ a_S1RK[slot, 0].t()
                h_TR[rows, : product_TR.shape[1]] = product_TR.to(h_TR.dtype) * scale

    def add_expand(
        self,
        y: torch.Tensor,
        x: tuple[torch.Tensor, ...] | torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[:, slice i] += x[i] @ B[i], or `=` without `add_inputs`; rows of the base get nothing."""
        y_TN = y.view(-1, y.shape[-1])
        slots_T = self.token_lora_indices[: y_TN.shape[0]]
        offset = offset_start
        for h, b_S1NR, width in zip(x, lora_b_stacked, output_slices, strict=True):
            part_TN = y_TN[:, offset : offset + width]
            if not add_inputs:
                part_TN.zero_()
            for slot in _present(slots_T):
                rows = (slots_T == slot).nonzero().squeeze(1)
                b_NR = b_S1NR[slot, 0]
                part_TN.index_add_(0, rows, (h.view(-1, h.shape[-1])[rows].to(b_NR.dtype) @ b_NR.t()).to(y_TN.dtype))
            offset += width


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Two dimensions; a view, as y is written in place."""
    return tensor if tensor.ndim == 2 else tensor.view(-1, tensor.shape[-1])


def _present(slots_T: torch.Tensor) -> list[int]:
    return [slot for slot in slots_T.unique().tolist() if slot != BASE]


def _fit(slots: list[int], num_rows: int) -> list[int]:
    """Rows beyond those vLLM named are padding: the base's."""
    return slots[:num_rows] + [BASE] * (num_rows - len(slots))


def _add_stacked_lora(
    y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], scale: float, output_slices: list[int], wrapper: int
) -> None:
    """What a compiled graph calls, so that the compiler does not bake one batch's make-up into the graph."""
    if a:
        _wrappers[wrapper].add_linear_now(y, x, a, b, scale, output_slices)
    else:
        _wrappers[wrapper].add_embedding_now(y, x, b[0])


def _no_result(*_: Any) -> None:
    return None


_library = torch.library.Library("adaptfleet", "DEF")
_library.define("add_stacked_lora(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float scale, int[] output_slices, int wrapper) -> ()")
_library.impl("add_stacked_lora", _add_stacked_lora, "CPU")
torch.library.register_fake("adaptfleet::add_stacked_lora", _no_result, lib=_library)
