"""Tasks of EleutherAI's evaluation harness on a loaded model, row by row, so that they are compared in pairs like everything else.

`lm-eval` is imported by name and only where a contract asks for it: it is no dependency of the library.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.evaluating import LmEvalSpec
from adaptfleet.contracts.names import near
from adaptfleet.core.evaluation.intervals import Ratio

INSTALL = "pip install lm-eval"


def check_lm_eval(spec: LmEvalSpec) -> None:
    """ContractError unless the package is installed and knows every task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ContractError(f"lm_eval is given, but lm-eval is not installed. Install it: {INSTALL}; or leave lm_eval out.")
    known = _task_manager(spec).all_tasks
    unknown = [task for task in spec.tasks if task not in known]
    if unknown:
        hints = "".join(near(task, known) for task in unknown)
        raise ContractError(f"lm_eval.tasks: {', '.join(map(repr, unknown))} are no tasks of lm-eval or of include_path.{hints}")


def task_metrics(model: Any, tokenizer: Any, spec: LmEvalSpec) -> dict[str, Ratio]:
    """`lm_eval/TASK/METRIC` for each metric that is a mean over the task's rows; others, such as a corpus BLEU, are left out."""
    harness: Any = importlib.import_module("lm_eval")
    wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    found = harness.simple_evaluate(
        model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size),
        tasks=list(spec.tasks),
        num_fewshot=spec.num_fewshot,
        limit=spec.limit,
        task_manager=_task_manager(spec),
        apply_chat_template=spec.apply_chat_template,
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics: dict[str, Ratio] = {}
    for task, samples in found["samples"].items():
        for name, value in found["results"][task].items():
            metric, _, chosen = name.partition(",")
            rows = [s for s in samples if metric in s and s.get("filter", "none") == chosen]
            ratio = _mean(rows, metric, value)
            if ratio is not None:
                metrics[f"lm_eval/{task}/{metric}" + ("" if chosen == "none" else f"/{chosen}")] = ratio
    return metrics


def _mean(rows: Sequence[dict[str, Any]], metric: str, value: Any) -> Ratio | None:
    """The rows' values, if the task's own figure is their mean."""
    rows = sorted(rows, key=lambda row: int(row["doc_id"]))
    values = [row[metric] for row in rows]
    if not values or not all(isinstance(v, (int, float)) for v in values) or not isinstance(value, (int, float)):
        return None
    values_N = np.array(values, dtype=np.float64)
    return Ratio(values_N, np.ones(len(values_N))) if math.isclose(values_N.mean(), value, rel_tol=1e-6, abs_tol=1e-9) else None


def _task_manager(spec: LmEvalSpec) -> Any:
    return importlib.import_module("lm_eval.tasks").TaskManager(include_path=spec.include_path)
