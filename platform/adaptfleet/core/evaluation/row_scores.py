"""The scores of each row, and the metrics over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptfleet.core.data.examples import Example
from adaptfleet.core.evaluation.answers import score_answer
from adaptfleet.core.evaluation.intervals import Ratio
from adaptfleet.core.evaluation.rouge import rouge_scores

LOWER_IS_BETTER = frozenset({"perplexity"})


@dataclass(frozen=True)
class RowLoss:
    """The cross-entropies of a row's labelled tokens, summed, in nats."""

    nats: float
    num_labels: int


@dataclass(frozen=True)
class RowResult:
    """What one subject made of one row."""

    example: Example
    answer: str | None
    """None: a plain text, or nothing was asked."""
    loss: RowLoss | None
    """None for endpoints."""

    def scores(self) -> dict[str, float]:
        """Each metric of this row alone, as it is saved beside the answer."""
        scores = {name: numerator / denominator for name, (numerator, denominator) in self.parts().items() if denominator}
        if self.loss is not None:
            scores |= {"loss": self.loss.nats / self.loss.num_labels, "num_labels": self.loss.num_labels}
        return scores

    def parts(self) -> dict[str, tuple[float, float]]:
        """What the row adds to the numerator and to the denominator of each metric of its answer."""
        if self.answer is None or self.example.answer is None:
            return {}
        score = score_answer(self.answer, self.example.answer)
        return {
            "exact_match": (float(score.exact_match), 1.0),
            "field_f1": (2.0 * score.num_common, float(score.num_answered + score.num_expected)),
            "valid_json": (float(score.valid_json), float(score.expects_json)),
            **{name: (value, 1.0) for name, value in rouge_scores(self.answer, self.example.answer).items()},
        }


def metrics_of(results: Sequence[RowResult]) -> dict[str, Ratio]:
    """Every metric that some row defines, each over all rows: `exact_match`, `field_f1`, `valid_json`, `rouge_1`, `rouge_2`, `rouge_l`,
    `perplexity`."""
    parts = [result.parts() for result in results]
    names = list(dict.fromkeys(name for part in parts for name in part))
    metrics = {}
    for name in names:
        pairs = np.array([part.get(name, (0.0, 0.0)) for part in parts], dtype=np.float64)
        metrics[name] = Ratio(pairs[:, 0], pairs[:, 1])
    losses = [result.loss for result in results]
    if any(loss is not None for loss in losses):
        pairs = np.array([(loss.nats, loss.num_labels) if loss else (0.0, 0) for loss in losses], dtype=np.float64)
        metrics["perplexity"] = Ratio(pairs[:, 0], pairs[:, 1], exponential=True)
    return {name: metric for name, metric in metrics.items() if metric.num_rows}
