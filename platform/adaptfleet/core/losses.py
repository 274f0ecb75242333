"""Cross-entropy on a large vocabulary without its logits. Shapes: N labelled positions, D hidden, V vocabulary."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  the name everyone knows

CHUNK_POSITIONS = 128
"""Positions whose logits are held at once: 128 x 49,152 in float32 is 25 MB. They come on top of all activations, so they count in the peak
in full; and from 32 MB on glibc would ask the system for zeroed pages each time."""


LogitLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Of logits [C, V] in float32, which it may overwrite, and their slice of the N positions: the summed loss, and its derivative by the
logits."""


class _ChunkedLoss(torch.autograd.Function):
    """A loss of logits, summed; the gradients are formed chunk by chunk in the forward pass, so logits never stay."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        loss: LogitLoss,
        chunk_positions: int,
    ):
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and bias_V.requires_grad else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for begin in range(0, hidden_ND.shape[0], chunk_positions):
            part = slice(begin, begin + chunk_positions)
            loss_of_part, errors_CV = loss(F.linear(hidden_ND[part], weight_VD, bias_V).float(), part)
            total += loss_of_part
            rounded_CV = errors_CV.to(weight_VD.dtype)
            torch.mm(rounded_CV, weight_VD, out=grad_ND[part])
            if grad_VD is not None:
                grad_VD += rounded_CV.T @ hidden_ND[part]
            if grad_V is not None:
                grad_V += errors_CV.sum(0)
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        formed = (g if g is None else (g * grads[0].to(g.dtype)).to(ctx.saved_tensors[0].dtype) for g in ctx.saved_tensors)
        return *formed, None, None


def chunked_loss(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, loss: LogitLoss, chunk_positions: int
) -> torch.Tensor:
    """The loss of the logits hidden W^T + b, summed over N. The head (W, b) gets gradients where it is trained."""
    return _ChunkedLoss.apply(hidden_ND, weight_VD, bias_V, loss, chunk_positions)


def summed_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    """Sum over N of -log softmax(hidden W^T + b)[label], in float32. The head (W, b) gets gradients where it is trained."""

    def loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        labels_C = labels_N[part]
        log_norm_C = torch.logsumexp(logits_CV, dim=-1)
        summed = (log_norm_C - logits_CV.gather(1, labels_C[:, None]).squeeze(1)).sum()
        # d loss / d logits = softmax - one-hot
        errors_CV = logits_CV.sub_(log_norm_C[:, None]).exp_()
        errors_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1.0
        return summed, errors_CV

    if hidden_ND.requires_grad:
        return chunked_loss(hidden_ND, weight_VD, bias_V, loss, CHUNK_POSITIONS)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for begin in range(0, hidden_ND.shape[0], CHUNK_POSITIONS):
        part = slice(begin, begin + CHUNK_POSITIONS)
        total += F.cross_entropy(F.linear(hidden_ND[part], weight_VD, bias_V).float(), labels_N[part], reduction="sum")
    return total


class _ChunkedLogProbs(torch.autograd.Function):
    """Log probabilities of single tokens. The logits are made once more in the backward pass, so they never stay."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor):
        log_probs_N = hidden_ND.new_empty(len(labels_N), dtype=torch.float32)
        for begin in range(0, len(labels_N), CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            logits_CV = F.linear(hidden_ND[part], weight_VD, bias_V).float()
            log_probs_N[part] = logits_CV.gather(1, labels_N[part][:, None]).squeeze(1) - torch.logsumexp(logits_CV, dim=-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        grad_ND = torch.empty_like(hidden_ND)
        for begin in range(0, len(labels_N), CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            probs_CV = F.linear(hidden_ND[part], weight_VD, bias_V).float().softmax(dim=-1).neg_()
            # d log p / d logits = one-hot - softmax
            probs_CV[torch.arange(len(probs_CV), device=labels_N.device), labels_N[part]] += 1.0
            grad_ND[part] = (probs_CV * grads[0][part][:, None]).to(weight_VD.dtype) @ weight_VD
        return grad_ND, None, None, None


def token_log_probs(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor) -> torch.Tensor:
    """[N] log softmax(hidden W^T + b)[label] in nats, float32. The head (W, b) is frozen and gets no gradient."""
    return _ChunkedLogProbs.apply(hidden_ND, weight_VD, bias_V, labels_N)
