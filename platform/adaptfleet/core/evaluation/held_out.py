"""Held-out loss, perplexity and greedy answers of a model in training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptfleet.core.data.encoding import Encoded, encode_prompt
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.data.tokens import Rows
from adaptfleet.core.evaluation.answers import AnswerScores, score_answers
from adaptfleet.core.packed_forward import PackedBatch, num_virtual_tokens, summed_loss

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
    loss_of: Callable[[PackedBatch], torch.Tensor] | None = None,
) -> HeldOutLoss:
    """Mean cross-entropy in nats over all labelled tokens, and its exponential. `loss_of`: as in training, by default `summed_loss`."""
    loss_of = loss_of or partial(summed_loss, model)
    model.eval()
    total, num_labels = 0.0, 0
    for pack in plan_packs([len(row) for row in rows], pack_tokens, list(range(len(rows)))):
        batch = PackedBatch.stack([pack_arrays(pack, rows, pack_tokens, pad_id)], model.device)
        total += float(loss_of(batch))
        num_labels += batch.num_labels
    loss = total / num_labels
    return HeldOutLoss(loss, math.exp(min(loss, 700.0)), num_labels)


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
