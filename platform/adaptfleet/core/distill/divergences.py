"""Divergences of a teacher P and a student Q, with what the student's logits feel of them. Shapes: C positions, B outcomes.

Outcomes are the tokens of the vocabulary, or the k most likely ones and one bucket for all others: a divergence of the coarser
distributions is never above that of the finer ones.
"""

from typing import assert_never

import torch

from adaptfleet.contracts.distillation import Distillation


def divergence(spec: Distillation, log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """D [C] in nats and its slope Q dD/dQ [C, B], in float32.

    With logits z, Q = softmax(z): dD/dz = slope - Q * sum(slope). A number added to all of dD/dQ cancels there, and is left out.
    """
    match spec.divergence:
        case "forward_kl":
            return forward_kl(log_p_CB, log_q_CB)
        case "reverse_kl":
            return reverse_kl(log_p_CB, log_q_CB)
        case "jsd":
            return generalised_jsd(log_p_CB, log_q_CB, spec.beta)
        case _:
            assert_never(spec.divergence)


def forward_kl(log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(P || Q) = sum P (log P - log Q); dD/dQ = -P / Q. arXiv 1503.02531, less the entropy of P."""
    p_CB = log_p_CB.exp()
    return (p_CB * (log_p_CB - log_q_CB)).sum(-1), -p_CB


def reverse_kl(log_p_CB: torch.Tensor, log_q_CB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(Q || P) = sum Q (log Q - log P); dD/dQ = log Q - log P. arXiv 2306.08543."""
    slope_CB = log_q_CB.exp() * (log_q_CB - log_p_CB)
    return slope_CB.sum(-1), slope_CB


def generalised_jsd(log_p_CB: torch.Tensor, log_q_CB: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q; dD/dQ = (1 - beta) (log Q - log M). arXiv 2306.13649.

    D / beta is KL(P || Q) as beta goes to 0, and D / (1 - beta) is KL(Q || P) as it goes to 1.
    """
    log_beta, log_rest = log_p_CB.new_tensor([beta, 1 - beta]).log()
    log_m_CB = torch.logaddexp(log_p_CB + log_beta, log_q_CB + log_rest)
    of_teacher_C = (log_p_CB.exp() * (log_p_CB - log_m_CB)).sum(-1)
    slope_CB = (1 - beta) * log_q_CB.exp() * (log_q_CB - log_m_CB)
    return beta * of_teacher_C + slope_CB.sum(-1), slope_CB
