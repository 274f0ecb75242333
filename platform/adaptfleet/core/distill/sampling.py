"""Answers that the model in training writes itself. Shapes: B rows, T tokens, D hidden, V vocabulary."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812  the name everyone knows
from transformers import DynamicCache

from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.packed_forward import plain_base

ROWS_TOGETHER = 32


@torch.no_grad()
def sampled_answers(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    seeds: Sequence[int],
    temperature: float,
    end_ids: Collection[int],
) -> list[list[int]]:
    """For each prompt at most `limits` tokens, up to and with the first that ends an answer; greedy at temperature 0.

    What is drawn for a row depends on the row's own seed alone, so it is the same in any company.
    """
    training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for begin in range(0, len(by_length), ROWS_TOGETHER):
        _answer(model, prompts, limits, seeds, temperature, frozenset(end_ids), by_length[begin : begin + ROWS_TOGETHER], answers)
    model.train(training)
    return answers


def _answer(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    seeds: Sequence[int],
    temperature: float,
    end_ids: frozenset[int],
    rows: Sequence[int],
    answers: list[list[int]],
) -> None:
    """Prompts are padded on the left; a row that has ended goes on unheard until all have."""
    base: Any = plain_base(model)
    head = base.get_output_embeddings()
    longest = max(len(prompts[i]) for i in rows)
    ids_BT = torch.tensor([[0] * (longest - len(prompts[i])) + list(prompts[i]) for i in rows], device=base.device)
    seen_BT = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=base.device)
    draws = [np.random.Generator(np.random.Philox(seeds[i])) for i in rows]
    cache = DynamicCache(config=base.config)
    positions_BT = (seen_BT.cumsum(1) - 1).clamp_min(0)
    is_open = [limits[i] > 0 for i in rows]
    while any(is_open):
        hidden_BTD = base.base_model(
            input_ids=ids_BT, attention_mask=seen_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits_BV = F.linear(hidden_BTD[:, -1], head.weight, getattr(head, "bias", None)).float()
        ids_BT = _drawn(logits_BV, temperature, draws)[:, None]
        for place, i in enumerate(rows):
            if is_open[place]:
                answers[i].append(int(ids_BT[place]))
                is_open[place] = answers[i][-1] not in end_ids and len(answers[i]) < limits[i]
        seen_BT = torch.cat([seen_BT, torch.ones_like(ids_BT)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1


def _drawn(logits_BV: torch.Tensor, temperature: float, draws: Sequence[np.random.Generator]) -> torch.Tensor:
    """[B] tokens, by the inverse of the cumulated probabilities."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    cumulated_BV = (logits_BV / temperature).softmax(dim=-1).double().cumsum(dim=-1)
    points_B1 = torch.tensor([[draw.random()] for draw in draws], dtype=torch.float64, device=logits_BV.device)
    found_B = torch.searchsorted(cumulated_BV, points_B1 * cumulated_BV[:, -1:], right=True).squeeze(1)
    return found_B.clamp_max(logits_BV.shape[1] - 1)
