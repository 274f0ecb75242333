"""How `jobs/evaluate.py` shows what it found."""

from adaptfleet.cli.tables import print_table
from adaptfleet.on_ray.evaluate.outcome import Outcome


def print_outcome(outcome: Outcome) -> None:
    """The metrics of each subject, then each further subject beside the first."""
    print_table(
        ("subject", "metric", "value", "95% interval", "rows"),
        [
            (label, name, f"{m.value:.4g}", f"{m.low:.4g} to {m.high:.4g}", str(m.num_rows))
            for label, metrics in outcome.metrics.items()
            for name, m in metrics.items()
        ],
    )
    for comparison in outcome.comparisons:
        first, second = outcome.metrics[comparison.first], outcome.metrics[comparison.second]
        print(f"\n{comparison.second} less {comparison.first}, on the same rows")
        print_table(
            ("metric", comparison.first, comparison.second, "difference", "95% interval", "p"),
            [
                (
                    name,
                    f"{first[name].value:.4g}",
                    f"{second[name].value:.4g}",
                    f"{d.value:+.4g}",
                    f"{d.low:+.4g} to {d.high:+.4g}",
                    f"{d.p_value:.2g}",
                )
                for name, d in comparison.differences.items()
            ],
        )
    for note in outcome.notes:
        print(f"note: {note}.")
    print(f"\nresults.json and every row's answer: {outcome.folder}")
