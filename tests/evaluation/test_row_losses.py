"""Each row's loss: padding and batching change nothing, and together they are the loss that training measures."""

from collections.abc import Sequence

import pytest

from adaptfleet.core.data.encoding import encode_all
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.evaluation import row_losses as module
from adaptfleet.core.evaluation.held_out import held_out_loss
from adaptfleet.core.evaluation.row_losses import row_losses
from adaptfleet.core.evaluation.row_scores import RowResult, metrics_of
from tests.training.conftest import CONFIGS, make_model, make_tokenizer

EXAMPLES = [Example((Message("user", "x" * n), Message("assistant", f"What is {n}?"))) for n in (3, 40, 11, 27, 8)]


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_rows_together_are_rows_alone_and_training_measures_the_same(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer()
    rows = encode_all(EXAMPLES, tokenizer, 200)
    pad_id = tokenizer.pad_token_id
    done: Sequence[int] = []
    together = row_losses(model, rows, pad_id, done.append)  # type: ignore[attr-defined]
    assert done == [5]
    alone = [row_losses(model, [row], pad_id)[0] for row in rows]
    # float32 sums in another order
    assert [r.nats for r in together] == pytest.approx([r.nats for r in alone], rel=1e-4)
    assert [r.num_labels for r in together] == [row.num_labels for row in rows]
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 90)
    assert [r.nats for r in row_losses(model, rows, pad_id)] == pytest.approx([r.nats for r in alone], rel=1e-4)
    perplexity = metrics_of([RowResult(e, None, loss) for e, loss in zip(EXAMPLES, together, strict=True)])["perplexity"].value()
    assert perplexity == pytest.approx(held_out_loss(model, rows, 200, pad_id).perplexity, rel=1e-3)
