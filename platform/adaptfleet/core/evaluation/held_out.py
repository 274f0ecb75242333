"""Held-out loss, perplexity and greedy answers of a model in training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptfleet.core.data.encoding import Encoded, encode_prompt
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.evaluation.answers import AnswerScores, score_answers
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.objectives import Preference
from adaptfleet.core.packed_forward import Call, PackedBatch, num_virtual_tokens, summed_loss

GENERATION_ROWS = 32
"""Rows that generate together."""


@dataclass(frozen=True)
class HeldOutLoss:
    loss: float
    perplexity: float
    num_labels: int


@torch.no_grad()
def held_out_loss(
    model: PeftModel | PreTrainedModel,
    rows: Rows | list[Encoded],
    pack_tokens: int,
    pad_id: int,
    call: Call | None = None,
) -> HeldOutLoss:
    """Mean cross-entropy in nats over all labelled tokens, and its exponential. `call`: as the training loop has it."""
    model.eval()
    total, num_labels = 0.0, 0
    for pack in plan_packs([len(row) for row in rows], pack_tokens, list(range(len(rows)))):
        batch = PackedBatch.stack([pack_arrays(pack, rows, pack_tokens, pad_id)], model.device)
        total += float(call(summed_loss, batch) if call else summed_loss(model, batch))
        num_labels += batch.num_labels
    loss = total / num_labels
    return HeldOutLoss(loss, math.exp(min(loss, 700.0)), num_labels)


@torch.no_grad()
def held_out_preferences(
    model: AdaptedModel,
    preference: Preference,
    rows: Rows | list[Encoded],
    pack_tokens: int,
    pad_id: int,
    call: Call | None = None,
) -> dict[str, float]:
    """Mean loss over the pairs, the share of them whose chosen answer is preferred, and by how much on average."""
    model.eval()
    found: list[torch.Tensor] = []
    for pack in plan_packs([len(row) for row in rows], pack_tokens, list(range(len(rows)))):
        batch = PackedBatch.stack([pack_arrays(pack, rows, pack_tokens, pad_id)], model.device)
        measure = preference.losses_and_margins
        found.append(torch.stack(call(measure, batch) if call else measure(model, batch)))
    losses_P, margins_P = torch.cat(found, dim=1).float()
    return {
        "eval_loss": float(losses_P.mean()),
        "preference_accuracy": float((margins_P > 0).float().mean()),
        "preference_margin": float(margins_P.mean()),
    }


@torch.no_grad()
def greedy_answers(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's answer to each example's messages but the last, in the examples' order."""
    model.eval()
    generating: Any = model
    answers: list[str] = []
    # padding would stand between a learnt prompt and the row's own tokens
    rows_together = 1 if num_virtual_tokens(model) else GENERATION_ROWS
    for begin in range(0, len(examples), rows_together):
        prompts = [encode_prompt(example, tokenizer) for example in examples[begin : begin + rows_together]]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        outputs = generating.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=tokenizer.pad_token_id
        )
        answers += tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        progress(len(answers))
    return answers


def answer_scores(answers: list[str], examples: list[Example]) -> AnswerScores:
    return score_answers(answers, [example.messages[-1].content for example in examples])
