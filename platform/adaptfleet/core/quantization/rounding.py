"""From a checkpoint and a scheme to a rounded checkpoint: a request for the quantizer's process, and what it leaves."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.errors import ModelError
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.quantization import quantizer
from adaptfleet.core.quantization.dequantization import is_compressed
from adaptfleet.core.quantization.environment import quantizer_python
from adaptfleet.core.quantization.schemes import modifiers, needs_data

_SHOWN_LINES = 12
_BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "*.jinja", "*.model", "vocab*", "merges.txt", "generation_config.json")


def quantize(
    source: Path, out: Path, spec: Quantize, rows: Sequence[Encoded], bits_of: Mapping[str, int] | None = None, untie: bool = False
) -> None:
    """Writes the rounded checkpoint into `out`, a new folder. ModelError: the quantizer failed, with the end of what it said.

    `rows` are the calibration rows, for the schemes that use them. `untie` gives the output head weights of its own first.
    """
    python = quantizer_python()
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch:
        calibration = None
        if needs_data(spec):
            calibration = Path(scratch) / "calibration.safetensors"
            ids = torch.tensor([token for row in rows for token in row.input_ids], dtype=torch.int64)
            save_file({"input_ids": ids, "lengths": torch.tensor([len(row) for row in rows])}, calibration)
        request = Path(scratch) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "model": str(source),
                    "out": str(out),
                    "modifiers": modifiers(spec, bits_of),
                    "calibration": str(calibration) if calibration else None,
                    "untie": untie,
                    "dtype": "bfloat16",
                    "num_threads": torch.get_num_threads(),
                }
            )
        )
        _run([str(python), quantizer.__file__, str(request)], Path(scratch))
    for pattern in _BESIDE_WEIGHTS:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)
    if not is_compressed(out):
        raise ModelError(f"llm-compressor wrote no compressed-tensors checkpoint for {spec.scheme.kind}; no layer was rounded.")


def _run(command: list[str], folder: Path) -> None:
    log = folder / "log"
    # The platform's own modules are none of the environment's business.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as said:
        done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, cwd=folder, env=environment, check=False)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = "\n".join(lines[-_SHOWN_LINES:])
        raise ModelError(f"llm-compressor ended with status {done.returncode}; nothing was kept. The end of what it said:\n{reason}")
