"""Which trials are ended early, and why."""

from typing import Any, TypeVar

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from adaptfleet.contracts.search import Asha, Dominance, Grid, Median, SweepJob
from adaptfleet.contracts.search_points import baseline_name
from adaptfleet.on_ray.tune.plan import TO_NEAREST

R = TypeVar("R", bound=TrialScheduler)


def scheduler(sweep: SweepJob) -> TrialScheduler:
    match sweep.space.early_stopping:
        case Asha(evaluations=evaluations, reduction_factor=factor):
            # beyond the last evaluation, so that a trial that came so far tells its result itself
            most = evaluations + 1
            return _sparing(ASHAScheduler, sweep)(
                time_attr="evaluation", metric="eval_loss", mode="min", max_t=most, grace_period=1, reduction_factor=factor
            )
        case Median():
            rule = _sparing(MedianStoppingRule, sweep)
            return rule(time_attr="evaluation", metric="eval_loss", mode="min", grace_period=1, min_samples_required=3)
        case _:
            return FIFOScheduler()


def _sparing(rule: type[R], sweep: SweepJob) -> type[R]:
    """The same rule, which ends no baseline: that one is always in the comparison."""
    baseline = baseline_name(sweep)

    class Sparing(rule):  # type: ignore[misc, valid-type]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision: str = super().on_trial_result(tune_controller, trial, result)
            return TrialScheduler.CONTINUE if result.get("point_id") == baseline else decision

    return Sparing


class DominanceStopper(tune.Stopper):
    """Ends a trial that another one is ahead of: no larger before rounding, and of a smaller loss by the margin, at the same stage. What is
    behind before rounding stays behind after the same rounding; a grid will round the other one too, and in other searches only trials with
    the same rounding are held against each other. A rounded one's loss needs no margin: rounding makes no loss smaller. Before a slow
    rounding (GPTQ, AWQ) stands what rounding to nearest leaves, always held against the same rounding."""

    def __init__(self, sweep: SweepJob) -> None:
        rule = sweep.space.early_stopping
        self._margin = rule.margin if isinstance(rule, Dominance) else None
        self._rounds_all = isinstance(sweep.algorithm, Grid)
        self._baseline = baseline_name(sweep)
        self._seen: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
        self._finished: dict[str, tuple[float, float]] = {}
        self.reasons: dict[str, str] = {}
        """By point."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        name, stage = result.get("point_id"), str(result.get("stage", ""))
        if self._margin is None or name is None:
            return False
        if stage == "finished":
            self._finished[name] = (result["nll"], result["bytes"])
            return False
        loss, size = result.get("eval_loss" if stage.startswith("training") else "nll"), result.get("dense_bytes")
        if loss is None or size is None:
            return False
        rounds_all = self._rounds_all and stage != TO_NEAREST
        rivals = self._seen.setdefault((stage, "any" if rounds_all else str(result.get("rounding"))), {})
        rivals[name] = (loss, size)
        reason = self._reason(name, stage, loss, size, result["bytes"], rivals)
        if reason is None or name == self._baseline:
            return False
        self.reasons[name] = reason
        return True

    def _reason(
        self, name: str, stage: str, loss: float, size: float, final_size: float, rivals: dict[str, tuple[float, float]]
    ) -> str | None:
        for other, (its_loss, its_size) in rivals.items():
            if other != name and its_size <= size and its_loss <= loss * (1 - (self._margin or 0)):
                return f"{other} was ahead at {stage}: loss {its_loss:.4g}, here {loss:.4g}"
        if stage == "unrounded":
            for other, (its_loss, its_size) in self._finished.items():
                # planned sizes are known to a percent
                if its_size <= final_size * 0.99 and its_loss <= loss:
                    return f"{other} is smaller, and its loss {its_loss:.4g} is no larger than {loss:.4g} here before rounding"
        return None

    def stop_all(self) -> bool:
        return False
