"""Is a served answer the reference's greedy one?

The reference, in float32, reads the prompt and the served answer in one pass. At each step the served token must be the reference's first
choice or tie with it. Judging each step on the answer that was really given keeps a tie from making everything after it incomparable.

A tie is a gap to the first choice that the arithmetic's own error can close. Served in float32, that is `FLOAT32` times the highest logit.
Served in bfloat16 it is measured: the same reference is run in bfloat16 too, and e is its root mean square distance from float32 over that
step's logits. The error of a difference of two logits has the deviation sqrt(2) * e; three of those are the width.
"""

from collections.abc import Sequence

import torch

FLOAT32 = 1e-4
"""Sums of a few thousand float32 products in another order."""


@torch.inference_mode()
def disagreements(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], rounded: torch.nn.Module | None = None
) -> list[str]:
    """One line for each step at which the reference would have gone another way. Empty: equal, ties aside. `rounded` is the reference in
    bfloat16, for an answer served in bfloat16."""
    ids = torch.tensor([[*prompt, *answer]])
    logits_TV = _logits(model, ids, len(prompt))
    if rounded is None:
        widths_T = FLOAT32 * logits_TV.max(-1).values.abs().clamp(min=1.0)
    else:
        widths_T = 3 * 2**0.5 * (_logits(rounded, ids, len(prompt)) - logits_TV).pow(2).mean(-1).sqrt()
    found = []
    for step, (logits_V, width, token) in enumerate(zip(logits_TV, widths_T.tolist(), answer, strict=True)):
        gap = (logits_V.max() - logits_V[token]).item()
        if gap > width:
            found.append(f"step {step}: {token} served, {int(logits_V.argmax())} expected, {gap:.4f} apart, a tie is {width:.4f}")
    return found


def _logits(model: torch.nn.Module, ids: torch.Tensor, num_prompt: int) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0, num_prompt - 1 : -1].float()
