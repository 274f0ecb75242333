"""Which runs need bitsandbytes: it is slow to import, and workers that do without start sooner (`start`)."""

import json
from pathlib import Path

from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.methods import QLora
from adaptfleet.core.models.loading import resolve_model_folder
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.on_ray.train.run_folder import RunFolder


def needs_bitsandbytes(job: FinetuneJob, folder: RunFolder) -> bool:
    """QLoRA, and a base or teacher that lies on disk in its formats."""
    teacher = ((folder.read_json("facts.json") or {}).get("teacher") or {}).get("folder")
    folders = [resolve_model_folder(at_hand(job.model)), *([Path(teacher)] if teacher else [])]
    configs = [json.loads((place / "config.json").read_text()) for place in folders]
    return isinstance(job.method, QLora) or any("bitsandbytes" in str(config.get("quantization_config")) for config in configs)
