"""A recipe from contract to published checkpoint."""

import logging
from importlib import metadata
from pathlib import Path
from typing import assert_never

from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.compression import CompressJob, Merge, Prune, Publish, Quantize, Recover, Step, Tune
from adaptfleet.contracts.errors import TrainingError
from adaptfleet.contracts.home import home
from adaptfleet.core.models.loading import base_revision
from adaptfleet.core.quantization.calibration import rows_sha256
from adaptfleet.core.quantization.environment import quantizer_python
from adaptfleet.on_ray.compress import steps
from adaptfleet.on_ray.compress.placement import placed
from adaptfleet.on_ray.compress.preflight import Prepared, prepare, recovery_data
from adaptfleet.on_ray.compress.proof import Proof, prove
from adaptfleet.on_ray.compress.recipe_folder import Made, made_once, next_key, write_json
from adaptfleet.on_ray.compress.report import write_report
from adaptfleet.store.registry import Registry

log = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def run_compression(job: CompressJob) -> str:
    """Runs the steps, measures the result against its parent, and publishes it: its reference, or its folder where nothing is published.

    A contract whose result is published is not run again. A killed run goes on after its last whole step.
    """
    registry = Registry.open()
    publish = job.step(Publish)
    if publish and (published := registry.find(job.fingerprint(), publish.name)) is not None:
        log.info("%s was made by this very contract; nothing to do", published.reference)
        if publish.alias is not None and publish.alias not in registry.aliases(published.name):
            registry.set_alias(published.name, publish.alias, published.version)
        return published.reference
    prepared = prepare(job, registry)
    if job.step(Quantize):
        quantizer_python()
    run = _open_run(job)
    write_json(run / "contract.json", job.model_dump(mode="json"))
    made, recovery = make(job, prepared)
    proof = placed(prove, job, prepared, made.folder, recovery.folder if recovery else None)
    write_json(run / "proof.json", proof.as_json())
    manifest = _publish(job, publish, prepared, made, proof, registry) if publish else None
    if manifest and recovery:
        _publish_recovery(job, manifest, made, recovery, proof, registry)
    log.info("report: %s", write_report(run, job, prepared, proof, manifest))
    for name, value in proof.metrics().items():
        log.info("  %s %.5g", name, value)
    return manifest.reference if manifest else str(made.folder)


def make(job: CompressJob, prepared: Prepared) -> tuple[Made, Made | None]:
    """The checkpoint that the steps make, and the adapter of a recovery after it; steps that were made before are taken as they are."""
    made = base = Made(prepared.folder, prepared.revision)
    is_adapter = False
    for number, step in enumerate(job.steps, 1):
        log.info("step %d of %d: %s", number, len(job.steps), step.kind)
        before, made = made, _make_step(job, prepared, step, base, made)
        if step.kind == "recover":
            base, is_adapter = before, True
        elif step.kind != "publish":
            is_adapter = False
    return (base, made) if is_adapter else (made, None)


def _make_step(job: CompressJob, prepared: Prepared, step: Step, base: Made, made: Made) -> Made:
    """`base`: where `made` is an adapter, the checkpoint that it was trained on."""
    rows = rows_sha256(prepared.calibration)
    match step:
        case Prune():
            key = next_key(made.key, step, rows=rows)
            return made_once("prune", key, lambda out: placed(steps.prune, made.folder, out, step, prepared.calibration))
        case Recover():
            key = next_key(made.key, step, data=recovery_data(job, step).fingerprint())
            finetune = steps.recovery_job(job, step, made.folder, key)
            return made_once("recover", key, lambda out: steps.recover(out, finetune))
        case Merge():
            return made_once("merge", next_key(made.key, step), lambda out: placed(steps.merge, base.folder, made.folder, out))
        case Quantize():
            key = next_key(made.key, step, rows=rows, budget_of=str(prepared.parent_bytes))
            return made_once("quantize", key, lambda out: placed(steps.round_weights, made.folder, out, step, prepared))
        case Tune():
            key = next_key(made.key, step, rows=rows_sha256(prepared.tuning), teacher=prepared.revision)
            return made_once("tune", key, lambda out: placed(steps.tune_scales, made.folder, out, step, prepared))
        case Publish():
            return made
        case _:
            assert_never(step)


def _open_run(job: CompressJob) -> Path:
    """The run's folder; TrainingError if another contract has it."""
    run = home() / "runs" / job.run_name()
    contract = run / "contract.json"
    if contract.exists():
        earlier = CompressJob.model_validate_json(contract.read_text(), strict=False)
        if earlier.fingerprint() != job.fingerprint():
            raise TrainingError(
                f"the run {job.run_name()!r} in {run} was begun with another contract ({earlier.fingerprint()}, now {job.fingerprint()}). "
                f"Leave `run` out, name another, or remove the folder."
            )
    run.mkdir(parents=True, exist_ok=True)
    return run


def _publish(job: CompressJob, publish: Publish, prepared: Prepared, made: Made, proof: Proof, registry: Registry) -> Manifest:
    draft = Draft(
        kind="model",
        name=publish.name,
        method={"kind": "compression", "steps": [step.model_dump(mode="json") for step in job.steps if not isinstance(step, Publish)]},
        serves_adapters_of=prepared.revision if job.takes_parents_adapters() else None,
        parents=(
            f"base:{prepared.base}:{prepared.revision[:16]}",
            f"data:{job.calibration.data.name()}:{rows_sha256(prepared.calibration)[:16]}",
        ),
        contract_fingerprint=job.fingerprint(),
        metrics=proof.metrics(),
        libraries={name: metadata.version(name) for name in LIBRARIES},
    )
    manifest = registry.publish(draft, made.folder, publish.alias)
    log.info("published %s", manifest.reference)
    return manifest


def _publish_recovery(job: CompressJob, model: Manifest, made: Made, recovery: Made, proof: Proof, registry: Registry) -> None:
    """The adapter that heals the rounded model, bound to its revision."""
    step = next(step for step in reversed(job.steps) if isinstance(step, Recover))
    draft = Draft(
        kind="adapter",
        name=next(name for name, kind in job.published_names().items() if kind == "adapter"),
        base=model.name,
        base_revision=base_revision(made.folder),
        method=step.method.model_dump(mode="json"),
        parents=(model.reference,),
        contract_fingerprint=job.fingerprint(),
        metrics={f"perplexity_ratio_{domain}": ratio.value for domain, ratio in proof.recovered.items()},
        libraries=model.libraries,
    )
    log.info("published %s", registry.publish(draft, recovery.folder).reference)
