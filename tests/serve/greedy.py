"""Is a served answer the reference's greedy one?

The reference reads the prompt and the served answer in one pass. At each step the served token must be the reference's first choice, or tie
with it: its logit is below the highest by no more than `resolution` times the highest one's size. Judging each step on the answer that was
really given keeps a tie from making everything after it incomparable.
"""

from collections.abc import Sequence

import torch

FLOAT32 = 1e-4
"""Sums of a few thousand float32 products in another order."""
BFLOAT16 = 2**-7
"""One unit in the last place of a bfloat16 logit."""


@torch.inference_mode()
def disagreements(model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], resolution: float) -> list[str]:
    """One line for each step at which the reference would have gone another way. Empty: equal, ties aside."""
    ids = torch.tensor([[*prompt, *answer]])
    logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    found = []
    for step, (logits_V, token) in enumerate(zip(logits_TV, answer, strict=True)):
        best = logits_V.max()
        gap = (best - logits_V[token]).item()
        if gap > resolution * max(1.0, best.abs().item()):
            found.append(f"step {step}: {token} served, {int(logits_V.argmax())} expected, {gap:.4f} apart at {best.item():.3f}")
    return found
