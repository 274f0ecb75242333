"""How much each axis counts for an objective: PED-ANOVA, arXiv 2304.10255, as Optuna computes it."""

from collections.abc import Mapping, Sequence
from typing import Any


def axis_importances(points: Sequence[Mapping[str, Any]], values_N: Sequence[float], minimised: bool = True) -> dict[str, float]:
    """Shares that add up to 1, the largest first; empty where there are too few points, or nothing differs. A point that an axis does not
    apply to has None there."""
    import optuna

    axes = [name for name in (points[0] if points else {}) if len({str(point[name]) for point in points}) > 1]
    if len(points) < 4 or not axes or len(set(values_N)) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if minimised else "maximize")
    labels = {name: list(dict.fromkeys(str(point[name]) for point in points)) for name in axes}
    for point, value in zip(points, values_N, strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                value=value,
                params={name: str(point[name]) for name in axes},
                distributions={name: optuna.distributions.CategoricalDistribution(labels[name]) for name in axes},
            )
        )
    try:
        return dict(optuna.importance.get_param_importances(study))
    except (RuntimeError, ValueError):  # none of the values is better than the others
        return {}
