"""Learning rates by step."""

import math


def warmup_cosine(step: int, num_steps: int, warmup_fraction: float) -> float:
    """The factor of optimizer step `step` (from 0): a linear warm-up, then half a cosine down to 0 after the last, arXiv 1608.03983."""
    num_warmup = math.ceil(num_steps * warmup_fraction)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))
