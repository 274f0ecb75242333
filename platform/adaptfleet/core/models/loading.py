"""From a model spec to a base: its folder, its revision, its weights and tokenizer."""

import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.model import EMBEDDED_MODELS, ModelSpec
from adaptfleet.core.models.device import device, model_dtype
from adaptfleet.core.models.embedded import embedded_model
from adaptfleet.core.quantization.dequantization import is_compressed, load_compressed
from adaptfleet.core.segment_attention import use_segment_attention

_REVISED = ("config.json", "*.safetensors", "model.safetensors.index.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model_folder(spec: ModelSpec) -> Path:
    """The base's local folder in Hugging Face's format; fetches embedded and hub models once. ModelError names what is missing."""
    source = spec.source
    if source in EMBEDDED_MODELS:
        return embedded_model(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _complete(folder.absolute())
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ModelError(
            f"model.source {source!r} is no folder, no hub id (org/model), no published model and no embedded one "
            f"(there are {', '.join(EMBEDDED_MODELS)})."
        )
    try:
        return _complete(Path(snapshot_download(source, allow_patterns=_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"the model {source!r} could not be fetched from the hub: {reason}. Check the id, or give a folder that holds it."
        ) from None


def _complete(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors (pickled weights are not loaded; convert them with transformers' save_pretrained)")
    if missing:
        raise ModelError(f"the model folder {folder} lacks {', '.join(missing)}.")
    return folder


def base_revision(folder: Path) -> str:
    """SHA-256 over the config and weights, as 64 hex digits: equal bytes, equal revision, wherever they lie.

    Hashed once for each state of the files (their sizes and times), then remembered.
    """
    files = sorted({file for pattern in _REVISED for file in folder.glob(pattern)})
    state = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    remembered = home() / "cache" / "revisions" / hashlib.sha256(state.encode()).hexdigest()
    if remembered.is_file():
        return remembered.read_text()
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    remembered.parent.mkdir(parents=True, exist_ok=True)
    unfinished = remembered.with_name(f"{remembered.name}.{os.getpid()}")
    unfinished.write_text(total.hexdigest())
    unfinished.replace(remembered)
    return total.hexdigest()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no tokenizer can be loaded from {folder}: {error}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    spec: ModelSpec,
    dtype: torch.dtype | None = None,
    quantization: QuantizationConfigMixin | None = None,
    on: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The base, frozen and in evaluation mode, its tokenizer and its revision. `on`: None means this process's device.

    Rounded weights are read back as plain ones."""
    folder = resolve_model_folder(spec)
    tokenizer = load_tokenizer(folder, spec.trust_remote_code)
    dtype = dtype or model_dtype(spec)
    try:
        model = (
            load_compressed(folder, dtype, spec.trust_remote_code)
            if is_compressed(folder)
            else AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                **({"quantization_config": quantization, "device_map": {"": device()}} if quantization else {}),
            )
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no causal language model can be loaded from {folder}: {error}") from None
    model.requires_grad_(False)
    # The cache hides packed rows from transformers' mask, and one row's tokens would attend to another's.
    model.config.use_cache = False
    if quantization is None:
        torch.nn.Module.to(model, on or device())
    use_segment_attention(model)
    return model.eval(), tokenizer, base_revision(folder)
