"""What the report tells of a population: who trained what from whose checkpoint, and the recommended member's settings by step."""

from adaptfleet.contracts.populations import Population
from adaptfleet.contracts.search import SweepJob
from adaptfleet.core.reports.charts import line_chart
from adaptfleet.core.reports.page import charts, table
from adaptfleet.on_ray.tune.lineage import Leg, Lineage
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder


def population_section(sweep: SweepJob, folder: SweepFolder, recommended: Record) -> str:
    """Empty for any other search."""
    if not isinstance(sweep.algorithm, Population):
        return ""
    lineage = Lineage(folder)
    rows = [_row(sweep, f"member{member}", leg) for member in lineage.members() for leg in lineage.of(member)]
    descent = lineage.descent(lineage.named(recommended.steps[-1]))
    drawn = []
    for axis in sweep.space.axes:
        places = [(step, float(leg.point[axis] or 0)) for leg in descent for step in (leg.begins, leg.ends)]
        drawn.append(line_chart(f"{axis} of {recommended.point_id}", places))
    return table(("member", "steps", *sweep.space.axes, "weights of", "held-out loss at the end"), rows) + charts(drawn)


def _row(sweep: SweepJob, member: str, leg: Leg) -> tuple[str, ...]:
    origin = "the base" if leg.before is None else member if leg.taken_from is None else f"member{leg.taken_from}"
    loss = "not done" if leg.eval_loss is None else f"diverged: {leg.reason[:200]}" if leg.reason else f"{leg.eval_loss:.5g}"
    return (member, f"{leg.begins} to {leg.ends}", *(f"{leg.point[axis]:.4g}" for axis in sweep.space.axes), origin, loss)
