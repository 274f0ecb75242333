"""An evaluation from contract to recorded result."""

import logging
import os
from datetime import UTC, datetime
from typing import Any

from adaptfleet.contracts.errors import AdaptfleetError, DataError
from adaptfleet.contracts.evaluating import EndpointSubject, EvaluateJob
from adaptfleet.contracts.home import home
from adaptfleet.core.data.examples import Example
from adaptfleet.core.evaluation.lm_eval_tasks import check_lm_eval
from adaptfleet.core.evaluation.row_scores import RowResult
from adaptfleet.on_ray.evaluate.endpoint import endpoint_answers
from adaptfleet.on_ray.evaluate.local_models import Scores, score_local_model
from adaptfleet.on_ray.evaluate.outcome import Outcome, Scored, make_outcome, record_outcome, write_outcome
from adaptfleet.on_ray.evaluate.progress import ProgressLine
from adaptfleet.on_ray.evaluate.rows import load_rows
from adaptfleet.on_ray.evaluate.subjects import LocalModel, Resolved, resolve_subjects
from adaptfleet.on_ray.joining import connected
from adaptfleet.store.registry import Registry

log = logging.getLogger(__name__)


def run_evaluation(job: EvaluateJob) -> Outcome:
    """Scores every subject on the same rows, compares them, writes the run's folder and records the result beside each version.

    All that can be wrong with rows and subjects is found before any model is loaded, and is told at once.
    """
    registry = Registry.open()
    offenders: list[AdaptfleetError] = []
    try:
        if job.lm_eval is not None:
            check_lm_eval(job.lm_eval)
    except AdaptfleetError as error:
        offenders.append(error)
    try:
        rows = load_rows(job, registry)
    except AdaptfleetError as error:
        offenders.append(error)
    try:
        subjects = resolve_subjects(job, registry)
    except AdaptfleetError as error:
        offenders.append(error)
    if offenders:
        raise type(offenders[0])("\n".join(map(str, offenders)))
    log.info("%d rows of %s, sha256 %s", len(rows.examples), rows.origin, rows.sha256[:16])
    scored = [Scored(subject, _score(subject, rows.examples, job)) for subject in subjects]
    folder = home() / "runs" / f"evaluation-{job.fingerprint()}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    outcome = make_outcome(job, rows, scored, folder)
    write_outcome(outcome, scored)
    if job.record:
        for reference in record_outcome(outcome, scored, registry):
            log.info("recorded beside %s", reference)
    return outcome


def _score(subject: Resolved, examples: list[Example], job: EvaluateJob) -> Scores:
    match subject.target:
        case EndpointSubject() as endpoint:
            return _score_endpoint(subject.label, endpoint, examples, job)
        case LocalModel() as target:
            if os.environ.get("RAY_ADDRESS"):
                return _score_on_cluster(subject.label, target, examples, job)
            return score_here(subject.label, target, examples, job)


def _score_endpoint(label: str, endpoint: EndpointSubject, examples: list[Example], job: EvaluateJob) -> Scores:
    asked = [i for i, example in enumerate(examples) if example.messages]
    if not asked:
        raise DataError(f"the rows are plain texts, which {label} cannot be asked. Give rows of messages, or leave the endpoint out.")
    progress = ProgressLine(label)
    try:
        given = endpoint_answers(
            endpoint, [examples[i] for i in asked], job.max_new_tokens, lambda done: progress.tell("answering", done, len(asked))
        )
    finally:
        progress.close()
    answers = dict(zip(asked, given, strict=True))
    return Scores([RowResult(example, answers.get(i), None) for i, example in enumerate(examples)])


def score_here(label: str, target: LocalModel, examples: list[Example], job: EvaluateJob) -> Scores:
    progress = ProgressLine(label)
    try:
        return score_local_model(target, examples, job, progress.tell)
    finally:
        progress.close()


def _score_on_cluster(label: str, target: LocalModel, examples: list[Example], job: EvaluateJob) -> Scores:
    """In a task of the cluster, on a GPU where it has one: a submitted job's own process has none. ADAPTFLEET_HOME must be shared."""
    import ray

    with connected():
        num_gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
        num_cpus = max(1, int(ray.available_resources().get("CPU", 1)) if not num_gpus else 1)
        task: Any = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=1)(_score_task)
        try:
            scores: Scores = ray.get(task.remote(label, target, examples, job.model_dump_json(), num_cpus))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, AdaptfleetError):
                raise error.cause from None
            raise
        return scores


def _score_task(label: str, target: LocalModel, examples: list[Example], job: str, num_cpus: int) -> Scores:
    import torch

    torch.set_num_threads(min(num_cpus, os.cpu_count() or 1))
    return score_here(label, target, examples, EvaluateJob.model_validate_json(job, strict=False))
