"""Everything about a recipe that can be wrong is found here, before anything is computed."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from transformers import AutoConfig, PretrainedConfig

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.compression import CalibrationSpec, CompressJob, Prune, Publish, Quantize, Recover, Tune
from adaptfleet.contracts.data import DataSpec
from adaptfleet.contracts.errors import AdaptfleetError, ContractError, DataError, StoreError
from adaptfleet.contracts.home import home, store_url
from adaptfleet.contracts.schemes import W8A8, Mixed, WeightOnly
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.data.datasets import open_dataset
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.examples import Example
from adaptfleet.core.data.sample_order import epoch_order
from adaptfleet.core.models.device import cpu_flags
from adaptfleet.core.models.loading import base_revision, load_tokenizer, resolve_model_folder
from adaptfleet.core.pruning.layout import planned_sizes
from adaptfleet.core.pruning.slicing import planned_config
from adaptfleet.core.quantization.calibration import calibration_rows
from adaptfleet.core.quantization.dequantization import is_compressed
from adaptfleet.core.quantization.fit import (
    Shapes,
    check_fit,
    dense_bytes,
    end_bytes,
    mixed_budget,
    planned_bytes,
    rounded_bytes,
    rounded_linear,
    shapes_of,
)
from adaptfleet.core.quantization.rotation import ROTATABLE
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.store.registry import Registry

log = logging.getLogger(__name__)
ROUNDED_EMBEDDINGS = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose embedding vLLM hands to its quantization."""
_TOKENIZER_BYTES = 32 * 2**20
"""Room for what stands beside the weights of each checkpoint."""


@dataclass(frozen=True)
class Prepared:
    base: str
    """The parent's id: an embedded model's name, a folder's last part, or a published model's reference."""
    folder: Path
    revision: str
    tokenizer: Any
    shapes: Shapes
    """Of what is rounded: the parent, pruned as the recipe says."""
    parent_bytes: int
    """The budget of a mixed scheme is a share of these."""
    calibration: list[Encoded]
    held_out: dict[str, list[Example]]
    """`in_domain`, and perhaps `out_of_domain`."""
    tuning: list[Encoded] = field(default_factory=list)
    """Rows that the scales of a rounded model are tuned on."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Folders of the parent's adapters that are measured on both, by reference."""


def prepare(job: CompressJob, registry: Registry) -> Prepared:
    """Model, recipe, data and disk held against each other; the faults of all are reported together."""
    offenders: list[AdaptfleetError] = []
    base = ServingSpec(model=job.model).base_id()
    offenders += _name_offenders(job, base, registry)
    folder = resolve_model_folder(at_hand(job.model, registry))
    if is_compressed(folder):
        raise ContractError(f"model.source {job.model.source!r} is rounded already. Name the checkpoint that it was made from.")
    tokenizer = load_tokenizer(folder, job.model.trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=job.model.trust_remote_code)
    full = shapes_of(config, job.model.trust_remote_code)
    shapes = full
    try:
        shapes = planned_shapes(job, config, full)
    except AdaptfleetError as error:
        offenders.append(error)

    def fetch(reference: str) -> Path:
        return registry.fetch(registry.resolve(reference), home() / "cache" / "artifacts")

    calibration: list[Encoded] = []
    held_out: dict[str, list[Example]] = {}
    try:
        calibration = calibration_rows(job.calibration, tokenizer, fetch)
    except DataError as error:
        offenders.append(error)
    adapters: dict[str, Path] = {}
    for name in job.proof.adapters:
        try:
            manifest = _fitting_adapter(name, base_revision(folder), registry)
            adapters[manifest.reference] = registry.fetch(manifest, home() / "cache" / "artifacts")
        except AdaptfleetError as error:
            offenders.append(error)
    tuning: list[Encoded] = []
    try:
        if (tune := job.step(Tune)) is not None:
            wanted = CalibrationSpec(data=tune.data or job.calibration.data, num_rows=tune.num_rows, max_tokens=tune.train.pack_tokens)
            tuning = calibration_rows(wanted, tokenizer, fetch, "tune")
    except DataError as error:
        offenders.append(error)
    for domain, spec in (("in_domain", job.proof.in_domain or job.calibration.data), ("out_of_domain", job.proof.out_of_domain)):
        try:
            if spec is not None:
                held_out[domain] = _held_out(spec, fetch, job.proof.max_rows)
        except DataError as error:
            offenders.append(DataError(f"proof.{domain}: {error}"))
    try:
        check_disk(job, shapes)
    except StoreError as error:
        offenders.append(error)
    if offenders:
        raise type(offenders[0])("\n".join(dict.fromkeys(map(str, offenders))))
    if (quantize := job.step(Quantize)) and isinstance(quantize.scheme, WeightOnly | Mixed):
        _warn_of_slow_kernels(job)
    return Prepared(base, folder, base_revision(folder), tokenizer, shapes, dense_bytes(full), calibration, held_out, tuning, adapters)


def _warn_of_slow_kernels(job: CompressJob) -> None:
    if job.target == "cpu" and not {"amx_int8", "avx512_vnni"} & cpu_flags():
        log.warning(
            "this CPU has neither AMX nor AVX512-VNNI, without which vLLM decodes 4-bit layers slower than bfloat16 ones (half as fast at "
            "a billion parameters); scheme.kind: w8a8 may be the faster one"
        )


def _name_offenders(job: CompressJob, base: str, registry: Registry) -> Iterator[ContractError]:
    for name, kind in job.published_names().items():
        if name == base:
            yield ContractError(f"publish.name is {base!r}, the parent's own id; give the result another name.")
        listing = registry.snapshot().get(name)
        if listing is not None and listing.versions:
            known = registry.manifest(name, listing.versions[-1]).kind
            if known != kind:
                yield ContractError(
                    f"{name} is of the kind {known}, not {kind}: versions of one name share a kind. Choose another publish.name."
                )


def _fitting_adapter(name: str, revision: str, registry: Registry) -> Manifest:
    """ContractError: it is none, or another model's."""
    manifest = registry.resolve(name)
    if manifest.kind != "adapter":
        raise ContractError(f"proof.adapters: {manifest.reference} is of the kind {manifest.kind}, no adapter. Leave it out.")
    if manifest.base_revision != revision:
        raise ContractError(
            f"proof.adapters: {manifest.reference} fits {manifest.base} of revision {(manifest.base_revision or '')[:16]}, but "
            f"the parent's is {revision[:16]}. Leave it out."
        )
    return manifest


def planned_shapes(job: CompressJob, config: PretrainedConfig, full: Shapes) -> Shapes:
    """The shapes that the scheme will find. ContractError: what the architecture, the scheme or the budget forbids."""
    prune, quantize = job.step(Prune), job.step(Quantize)
    shapes = shapes_of(planned_config(config, planned_sizes(config, prune)), job.model.trust_remote_code) if prune else full
    if quantize is None:
        return shapes
    check_fit(shapes, quantize, job.target)
    if quantize.embedding != "keep" and config.model_type not in ROUNDED_EMBEDDINGS:
        raise ContractError(
            f"quantize: embedding is {quantize.embedding!r}, which the engine loads for {', '.join(ROUNDED_EMBEDDINGS)} alone, not for "
            f"{config.model_type}; write embedding: keep."
        )
    if quantize.rotate and config.model_type not in ROTATABLE:
        raise ContractError(f"quantize: rotate works for {', '.join(ROTATABLE)}, not for {config.model_type}; leave it out.")
    if quantize.rotate and shapes.is_tied and quantize.head == "keep":
        raise ContractError(
            "quantize: rotate gives the output head weights of its own, which would cost the embedding's bytes once more; write "
            "head: w8a8, and embedding: w8 for no more bytes than before."
        )
    scheme = quantize.scheme
    if job.proof.engine and job.model.dtype == "float32" and isinstance(scheme, W8A8 | Mixed) and "amx_int8" in cpu_flags():
        raise ContractError(
            "model.dtype is float32, but vLLM's 8-bit kernel on this CPU (AMX) takes bfloat16 alone; write model.dtype: auto, or "
            "proof.engine: false."
        )
    if isinstance(scheme, Mixed):
        ends = end_bytes(shapes, quantize)
        least, most = (
            ends
            + sum(
                rounded_bytes(shape, bits, scheme.group_size if bits == 4 else None) for shape in rounded_linear(shapes, quantize).values()
            )
            for bits in (4, 8)
        )
        budget = mixed_budget(shapes, scheme, dense_bytes(full))
        if budget < least:
            raise ContractError(
                f"quantize: the budget is {budget:,} bytes, but with 4 bits everywhere the checkpoint has {least:,} ({ends:,} of them in "
                f"what is not rounded). Allowed: {least:,} to {most:,}; or prune more, or round the embedding and the head."
            )
    return shapes


def _held_out(spec: DataSpec, fetch: Any, max_rows: int) -> list[Example]:
    index = open_dataset(spec, fetch)
    if len(index.test) < 2:
        raise DataError(f"{len(index.test)} rows of {spec.name()!r} are held out, too few to say how sure a perplexity is.")
    order = [int(i) for i in epoch_order(len(index.test), spec.seed, epoch=0)][:max_rows]
    return index.examples_at(index.test[order])


def check_disk(job: CompressJob, shapes: Shapes) -> None:
    """StoreError, with the exact numbers, where the steps' checkpoints and the published copy do not fit. `shapes`: after pruning."""
    quantize = job.step(Quantize)
    steps = {"prune": dense_bytes(shapes), "recover": dense_bytes(shapes) // 10, "merge": dense_bytes(shapes)}
    if quantize:
        steps["quantize"] = steps["tune"] = planned_bytes(shapes, quantize)
    if quantize and quantize.rotate:
        # a copy that the rounding reads, with a head of its own
        rows, width = shapes.embedding
        steps = {"rotate": dense_bytes(shapes) + (2 * rows * width if shapes.is_tied else 0)} | steps
    kinds = [kind for step in job.steps for kind in (("rotate", "quantize") if step.kind == "quantize" else (step.kind,))]
    made = {kind: steps[kind] + _TOKENIZER_BYTES for kind in kinds if kind in steps}
    last = list(made.values())[-1]
    wanted: dict[Path, int] = {home(): sum(made.values())}
    store = urlparse(store_url())
    if job.step(Publish) and store.scheme == "file":
        place = Path(store.path)
        same = _existing(place).stat().st_dev == _existing(home()).stat().st_dev
        wanted[home() if same else place] = wanted.get(home() if same else place, 0) + last
    short = []
    for place, num_bytes in wanted.items():
        free = shutil.disk_usage(_existing(place)).free
        if free < num_bytes:
            parts = ", ".join(f"{kind} {size:,}" for kind, size in made.items())
            short.append(f"{place} has {free:,} bytes free, but the recipe writes {num_bytes:,} there ({parts}; publishing {last:,})")
    if short:
        raise StoreError("; ".join(short) + ". Free space, or set ADAPTFLEET_HOME or ADAPTFLEET_STORE to a larger disk.")


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())


def recovery_data(job: CompressJob, step: Recover) -> DataSpec:
    return step.data or job.calibration.data
