"""Cross-entropy on a large vocabulary without its logits. Shapes: N labelled positions, D hidden, V vocabulary."""

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  the name everyone knows

CHUNK_POSITIONS = 512
"""Positions whose logits are held at once: 512 x 49,152 in float32 is 100 MB."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients are formed chunk by chunk in the forward pass, so logits never stay."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor):
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and bias_V.requires_grad else None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for begin in range(0, hidden_ND.shape[0], CHUNK_POSITIONS):
            part = slice(begin, begin + CHUNK_POSITIONS)
            logits_CV = F.linear(hidden_ND[part], weight_VD, bias_V).float()
            log_norm_C = torch.logsumexp(logits_CV, dim=-1)
            labels_C = labels_N[part]
            total += (log_norm_C - logits_CV.gather(1, labels_C[:, None]).squeeze(1)).sum()
            # d loss / d logits = softmax - one-hot
            probs_CV = logits_CV.sub_(log_norm_C[:, None]).exp_()
            probs_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1.0
            errors_CV = probs_CV.to(weight_VD.dtype)
            torch.mm(errors_CV, weight_VD, out=grad_ND[part])
            if grad_VD is not None:
                grad_VD += errors_CV.T @ hidden_ND[part]
            if grad_V is not None:
                grad_V += probs_CV.sum(0)
        ctx.save_for_backward(grad_ND, grad_VD, grad_V)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        return *(g if g is None else (g * grads[0].to(g.dtype)).to(ctx.saved_tensors[0].dtype) for g in ctx.saved_tensors), None


def summed_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, labels_N: torch.Tensor
) -> torch.Tensor:
    """Sum over N of -log softmax(hidden W^T + b)[label], in float32. The head (W, b) gets gradients where it is trained."""
    if hidden_ND.requires_grad:
        return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, labels_N)
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
