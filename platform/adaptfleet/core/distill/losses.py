"""The loss of distilled positions on a large vocabulary without its logits. Shapes: N labelled positions, C of them at once, D hidden,
V vocabulary, K kept tokens, B outcomes (V, or K and the bucket of the rest)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.core.distill.divergences import divergence
from adaptfleet.core.losses import chunked_loss

CHUNK_POSITIONS = 128
"""Positions whose distributions are held at once: five tensors of 128 x 49,152 in float32 are 126 MB."""


@dataclass(frozen=True)
class Distributions:
    """What the teacher says of some positions, its logits divided by the temperature."""

    log_p_CB: torch.Tensor
    """Log probabilities in nats, float32, each position's adding up to one."""
    ids_CK: torch.Tensor | None = None
    """The tokens that the outcomes are; None: outcome i is token i. Where K = B - 1 the last outcome is all other tokens."""


Targets = Callable[[slice], Distributions]
"""Gives the distributions of a slice of the N positions."""


def distilled_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    labels_N: torch.Tensor,
    hard_N: torch.Tensor,
    targets: Targets,
    spec: Distillation,
) -> torch.Tensor:
    """Sum over N of alpha T^2 D(teacher, student) - (1 - alpha) hard log softmax(hidden W^T + b)[label], in float32.

    `hard_N` is 1 where the label is the data's, 0 where it is the student's own. The head (W, b) gets gradients where it is trained.
    """

    def loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        loss_C, errors_CV = hard_losses(logits_CV, labels_N[part], (1 - spec.alpha) * hard_N[part])
        if spec.alpha:
            soft_C, soft_errors_CV = soft_losses(logits_CV, targets(part), spec)
            loss_C = loss_C + spec.alpha * soft_C
            errors_CV[:, : soft_errors_CV.shape[1]].add_(soft_errors_CV, alpha=spec.alpha)
        return loss_C.sum(), errors_CV

    return chunked_loss(hidden_ND, weight_VD, bias_V, loss, CHUNK_POSITIONS)


def hard_losses(logits_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[C] weighted cross-entropies, and their derivatives by the logits: softmax - one-hot."""
    log_q_CV = torch.log_softmax(logits_CV, dim=-1)
    loss_C = -log_q_CV.gather(1, labels_C[:, None]).squeeze(1)
    errors_CV = log_q_CV.exp_()
    errors_CV[torch.arange(len(labels_C), device=labels_C.device), labels_C] -= 1.0
    return loss_C * weights_C, errors_CV.mul_(weights_C[:, None])


def soft_losses(logits_CV: torch.Tensor, teacher: Distributions, spec: Distillation) -> tuple[torch.Tensor, torch.Tensor]:
    """[C] divergences times T^2, and their derivatives by the student's logits.

    Where the models' heads are padded to different sizes the first ones, as many as the smaller has, are compared.
    """
    if teacher.ids_CK is None:
        logits_CV = logits_CV[:, : teacher.log_p_CB.shape[1]]
    log_q_CV = torch.log_softmax(logits_CV / spec.temperature, dim=-1)
    log_q_CB = log_q_CV if teacher.ids_CK is None else bucketed(log_q_CV, teacher.ids_CK, teacher.log_p_CB.shape[1])
    loss_C, slope_CB = divergence(spec, teacher.log_p_CB, log_q_CB)
    # logits are divided by T, and the whole is multiplied by its square
    errors_CV = -log_q_CV.exp() * slope_CB.sum(-1, keepdim=True)
    if teacher.ids_CK is None:
        errors_CV += slope_CB
    else:
        num_kept = teacher.ids_CK.shape[1]
        if num_kept < slope_CB.shape[1]:
            # the bucket's slope falls to its tokens by their shares of it
            rest_CV = (log_q_CV - log_q_CB[:, -1:]).exp_().mul_(slope_CB[:, -1:])
            errors_CV += rest_CV.scatter_(1, teacher.ids_CK, 0.0)
        errors_CV.scatter_add_(1, teacher.ids_CK, slope_CB[:, :num_kept])
    return loss_C * spec.temperature**2, errors_CV.mul_(spec.temperature)


def bucketed(log_p_CV: torch.Tensor, ids_CK: torch.Tensor, num_outcomes: int) -> torch.Tensor:
    """[C, B] the log probabilities of the given tokens and, where B = K + 1, of all others together."""
    kept_CK = log_p_CV.gather(1, ids_CK)
    if num_outcomes == ids_CK.shape[1]:
        return kept_CK
    rest_C1 = log_p_CV.scatter(1, ids_CK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([kept_CK, rest_C1], dim=1)
