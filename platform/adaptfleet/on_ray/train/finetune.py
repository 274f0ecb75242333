"""A fine-tune from contract to published adapter."""

import functools
import json
import logging
from contextlib import ExitStack
from importlib import metadata
from typing import Any

from adaptfleet.contracts import errors
from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.distillation import Distillation, Offline
from adaptfleet.contracts.jobs import FinetuneJob, PublishSpec
from adaptfleet.core.distill.teacher_logits import LogitFiles
from adaptfleet.on_ray.joining import joined_cluster
from adaptfleet.on_ray.train.preflight import Prepared, prepare
from adaptfleet.on_ray.train.report import write_report
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.tracking import check_trackers
from adaptfleet.store.registry import Registry

log = logging.getLogger(__name__)
LIBRARIES = ("ray", "torch", "transformers", "peft")


def run_finetune(job: FinetuneJob) -> str:
    """Trains and publishes: the reference of what was published, or the folder of the result where the job publishes nothing.

    A contract whose result is published is not trained again; an interrupted run goes on.
    """
    registry = Registry.open()
    if job.publish is not None and (published := registry.find(job.fingerprint(), job.publish.name)) is not None:
        log.info("%s was made by this very contract; nothing to train", published.reference)
        if job.publish.alias is not None and job.publish.alias not in registry.aliases(published.name):
            registry.set_alias(published.name, job.publish.alias, published.version)
        return published.reference
    check_trackers(job)
    with ExitStack() as stack:
        # Joined when it is first needed: faults are found before a cluster is started.
        join = functools.cache(lambda: stack.enter_context(joined_cluster()))
        prepared = prepare(job, registry, join)
        folder = RunFolder.open(job)
        _describe(job, prepared, folder)
        join()
        # Ray reads its environment when it is imported.
        from adaptfleet.on_ray.train.fit import fit

        fit(job, folder)
    failure = folder.read_json("failure.json")
    if failure:
        raise getattr(errors, failure["kind"])(failure["message"])
    metrics = _metrics(folder)
    manifest = _publish(job, job.publish, metrics, prepared, folder, registry) if job.publish else None
    log.info("report: %s", write_report(folder, job, metrics, manifest))
    return manifest.reference if manifest else str(folder.adapter)


def _describe(job: FinetuneJob, prepared: Prepared, folder: RunFolder) -> None:
    """Writes what the workers read and what explains the run."""
    plan = prepared.plan
    folder.write_rows(prepared.train_rows, prepared.test_rows, plan, prepared.test_examples, prepared.teachers_rows)
    facts = {
        "base": prepared.base,
        "base_revision": prepared.base_revision,
        "data_sha256": prepared.dataset.sha256,
        "fingerprint": job.fingerprint(),
        "num_train_rows": len(prepared.train_rows),
        "num_test_rows": len(prepared.test_rows),
        "num_duplicates": prepared.dataset.num_duplicates,
        "num_steps": len(plan.steps),
        "num_tokens": plan.num_tokens,
        "pack_fill": round(plan.fill, 4),
        "teacher": _teacher(job, prepared),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }
    folder.write_json("facts.json", facts)
    (folder.path / "failure.json").unlink(missing_ok=True)
    log.info(
        "run %s: %d rows to train on, %d held out, %d updates of %d packed rows (%.0f%% full), %s tokens",
        job.run_name(), facts["num_train_rows"], facts["num_test_rows"], len(plan.steps), job.train.num_packs,
        100 * plan.fill, f"{plan.num_tokens:,}",
    )  # fmt: skip


def _teacher(job: FinetuneJob, prepared: Prepared) -> dict[str, Any] | None:
    """Which teacher, and where what it says of the rows lies if it is asked only once."""
    spec, found = job.objective, prepared.teacher
    if not isinstance(spec, Distillation) or found is None:
        return None
    facts = {"name": found.name, "revision": found.revision, "folder": str(found.folder), "vocab_size": found.vocab_size}
    if isinstance(spec.source, Offline):
        facts["logits"] = str(LogitFiles.of(spec, spec.source, prepared.train_rows, found.revision).folder)
    return facts


def _metrics(folder: RunFolder) -> dict[str, float]:
    """The last evaluation's, and the last step's."""
    evaluation = folder.read_json("evaluation.json") or {}
    progress = folder.read_json("progress.json") or {}
    metrics = {key: float(value) for key, value in evaluation.items() if key != "step"}
    last = folder.metrics("train")[-1]
    return metrics | {"train_loss": last["loss"], "train_tokens_per_s": last["tokens_per_s"], "num_steps": float(progress["num_steps"])}


def _publish(
    job: FinetuneJob, publish: PublishSpec, metrics: dict[str, float], prepared: Prepared, folder: RunFolder, registry: Registry
) -> Manifest:
    kind, method = job.published_as(), job.method.model_dump(mode="json")
    if kind == "adapter":
        # what is served may have another rank than what was trained: PiSSA's difference, AdaLoRA's largest
        method["rank"] = json.loads((folder.adapter / "adapter_config.json").read_text())["r"]
    draft = Draft(
        kind=kind,
        name=publish.name,
        base=prepared.base if kind == "adapter" else None,
        base_revision=prepared.base_revision if kind == "adapter" else None,
        method=method,
        parents=(
            f"base:{prepared.base}:{prepared.base_revision[:16]}",
            *([prepared.teacher.parent()] if prepared.teacher else []),
            *(f"data:{entry.source}:{prepared.dataset.sha256[:16]}" for entry in job.data.sources()),
        ),
        contract_fingerprint=job.fingerprint(),
        metrics=metrics,
        libraries=(folder.read_json("facts.json") or {})["libraries"],
    )
    manifest = registry.publish(draft, folder.adapter if kind == "adapter" else folder.model, publish.alias)
    log.info("published %s: %s", manifest.reference, ", ".join(f"{key} {value:.4g}" for key, value in manifest.metrics.items()))
    return manifest
