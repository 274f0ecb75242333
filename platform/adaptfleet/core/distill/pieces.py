"""Distillation from a teacher of another tokenizer: on pieces of text, not on tokens.

Both models give each piece that both tokenizations have (`shared_text`) a probability, the product of its tokens'. The divergence is
between the two outcomes "this piece" and "any other": approximate likelihood matching, arXiv 2503.20083. Shapes: B packed rows, T tokens,
D hidden, V vocabulary, N labelled tokens of the student, C pieces.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from adaptfleet.contracts.distillation import Distillation
from adaptfleet.core.data.packing import pack_arrays, plan_packs
from adaptfleet.core.distill.divergences import divergence
from adaptfleet.core.distill.losses import CHUNK_POSITIONS, hard_losses
from adaptfleet.core.distill.shared_text import SharedPieces, TokenBytes, shared_pieces
from adaptfleet.core.losses import chunked_loss, token_log_probs
from adaptfleet.core.methods.adaptation import AdaptedModel
from adaptfleet.core.objectives import Objective
from adaptfleet.core.packed_forward import Call, PackedBatch, label_log_probs, predictions

_LEAST_SURPRISE = 1e-5
"""In nats: a piece that is surer than this counts as if it were no surer, so that "any other" keeps a probability."""
_ROWS_REMEMBERED = 4096


class TextTeacher:
    """A frozen model that reads the training rows in its own tokenization and template."""

    def __init__(self, model: PreTrainedModel, rows: Sequence[Any], pack_tokens: int, pad_id: int, call: Call | None = None) -> None:
        """`rows` has the training rows under the student's numbers, none longer than `pack_tokens`. `call`: as the training loop has it,
        where the teacher is sharded."""
        self.model = model.requires_grad_(False).eval()
        self.rows = rows
        self.pack_tokens = pack_tokens
        self.pad_id = pad_id
        self.call = call or (lambda function, batch: function(self.model, batch))

    @torch.no_grad()
    def log_probs(self, numbers: Sequence[int]) -> torch.Tensor:
        """Of the labelled tokens of these rows one after another, in nats, float32."""
        rows = [self.rows[i] for i in numbers]
        packs = plan_packs([len(row) for row in rows], self.pack_tokens, range(len(rows)))
        arrays = [pack_arrays(pack, rows, self.pack_tokens, self.pad_id) for pack in packs]
        found_M = self.call(label_log_probs, PackedBatch.stack(arrays, self.model.device))
        order = [i for pack in packs for i in pack.indices]
        parts = dict(zip(order, found_M.split([rows[i].num_labels for i in order]), strict=True))
        return torch.cat([parts[i] for i in range(len(rows))])


class PieceDistillation(Objective):
    """alpha T D(teacher, student) of each piece and (1 - alpha) cross-entropy of each labelled token, summed."""

    def __init__(
        self, spec: Distillation, teacher: TextTeacher, rows: Sequence[Any], my_bytes: TokenBytes, their_bytes: TokenBytes
    ) -> None:
        self.spec = spec
        self.teacher = teacher

        @lru_cache(_ROWS_REMEMBERED)
        def shared(number: int) -> SharedPieces:
            return shared_pieces(rows[number], teacher.rows[number], my_bytes, their_bytes)

        self._shared = shared

    def summed_loss(self, model: AdaptedModel, batch: PackedBatch) -> torch.Tensor:
        theirs_M = self.teacher.log_probs(batch.rows)
        hidden_ND, weight_VD, bias_V, labels_N = predictions(model, batch)
        if not len(labels_N):
            return hidden_ND.sum()
        with torch.no_grad():
            mine_N = token_log_probs(hidden_ND, weight_VD, bias_V, labels_N)
        value, slope_N = self._value_and_slope(mine_N, theirs_M, batch.rows)

        def loss(logits_CV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
            loss_C, errors_CV = hard_losses(logits_CV, labels_N[part], -slope_N[part])
            return loss_C.sum(), errors_CV

        # its gradients are those of the loss: to a token's logits both say the token's slope times those of its log probability
        weighted = chunked_loss(hidden_ND, weight_VD, bias_V, loss, CHUNK_POSITIONS)
        return value + weighted - weighted.detach()

    def _value_and_slope(self, mine_N: torch.Tensor, theirs_M: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and its derivative by the student's log probability of each labelled token."""
        alpha, temperature = self.spec.alpha, self.spec.temperature
        shared = [self._shared(number) for number in rows]
        starts = np.cumsum([0, *(pieces.count for pieces in shared)])
        count = int(starts[-1])
        my_piece_N = _numbered([pieces.mine_N for pieces in shared], starts, mine_N.device)
        log_p_C = _summed(theirs_M, _numbered([pieces.theirs_M for pieces in shared], starts, mine_N.device), count)
        log_q_C = _summed(mine_N, my_piece_N, count).requires_grad_()
        with torch.enable_grad():
            losses_C, _ = divergence(self.spec, _outcomes(log_p_C / temperature), _outcomes(log_q_C / temperature))
            soft = temperature * losses_C.sum()
        (slope_C,) = torch.autograd.grad(soft, log_q_C)
        slope_N = torch.where(my_piece_N < count, torch.cat([slope_C, slope_C.new_zeros(1)])[my_piece_N], 0.0)
        value = alpha * soft.detach() - (1 - alpha) * mine_N.sum()
        return value, alpha * slope_N - (1 - alpha)


def _numbered(pieces: list[Any], starts: Any, device: torch.device) -> torch.Tensor:
    """The rows' pieces numbered through; tokens of no piece get the number after the last."""
    count = int(starts[-1])
    numbers = [np.where(row >= 0, row + start, count) for row, start in zip(pieces, starts, strict=False)]
    return torch.from_numpy(np.concatenate(numbers)).to(device)


def _summed(log_probs_N: torch.Tensor, piece_N: torch.Tensor, count: int) -> torch.Tensor:
    return log_probs_N.new_zeros(count + 1).index_add(0, piece_N, log_probs_N)[:count]


def _outcomes(log_p_C: torch.Tensor) -> torch.Tensor:
    """[C, 2] log probabilities of a piece and of any other."""
    log_p_C = log_p_C.clamp(max=-_LEAST_SURPRISE)
    # log(1 - p), each form where it is exact
    rest_C = torch.where(log_p_C > -0.6931, torch.log(-torch.expm1(log_p_C)), torch.log1p(-torch.exp(log_p_C)))
    return torch.stack([log_p_C, rest_C], dim=1)
