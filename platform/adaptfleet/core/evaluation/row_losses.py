"""Each row's own loss, by the model's plain forward call: it holds for any causal language model, packable or not."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.evaluation.row_scores import RowLoss

TOKENS_PER_PASS = 2048
"""Positions, padding included, of one forward pass; a longer row goes alone."""


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Encoded], pad_id: int, progress: Callable[[int], None] = lambda done: None) -> list[RowLoss]:
    """In the rows' order. Rows of like length run together, so that little is padding."""
    model.eval()
    losses: dict[int, RowLoss] = {}
    for batch in _batches([len(row) for row in rows]):
        num_tokens = max(len(rows[i]) for i in batch)
        input_ids_BT = torch.full((len(batch), num_tokens), pad_id)
        label_mask_BT = torch.zeros((len(batch), num_tokens), dtype=torch.bool)
        attention_mask_BT = torch.zeros((len(batch), num_tokens), dtype=torch.long)
        for b, i in enumerate(batch):
            length = len(rows[i])
            input_ids_BT[b, :length] = torch.tensor(rows[i].input_ids)
            label_mask_BT[b, :length] = torch.tensor(rows[i].label_mask)
            attention_mask_BT[b, :length] = 1
        inputs = {"input_ids": input_ids_BT.to(model.device), "attention_mask": attention_mask_BT.to(model.device)}
        logits_BTV = model(**inputs, use_cache=False).logits
        for b, i in enumerate(batch):
            places = label_mask_BT[b, 1:].nonzero().squeeze(1).to(logits_BTV.device)
            labels_N = inputs["input_ids"][b, 1:][places]
            nats = F.cross_entropy(logits_BTV[b, :-1][places].float(), labels_N, reduction="sum")
            losses[i] = RowLoss(float(nats), len(labels_N))
        progress(len(losses))
    return [losses[i] for i in range(len(rows))]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers, the longest rows first: what does not fit in memory fails at once."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > TOKENS_PER_PASS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
