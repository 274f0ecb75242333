"""The program that rounds a checkpoint with llm-compressor: `python quantizer.py REQUEST.json`, in the environment of `environment`.

It knows nothing of the platform, whose packages it may see in other versions. The request:

model           a checkpoint's folder
out             a folder that does not exist yet
modifiers       a list of {"name": "GPTQModifier", "arguments": {...}}, in order; a smoothing with its `place`, "norms" or "gated"
calibration     a safetensors file with `input_ids` and `lengths` of the rows, or null
untie           give the output head its own weights first
dtype           the type to load the weights in
"""

import ctypes
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(request: dict[str, Any]) -> None:
    torch.set_num_threads(request["num_threads"])
    _leave_memory_unpinned()
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]))
    if request["untie"]:
        _untie(model)
    llmcompressor: Any = importlib.import_module("llmcompressor")
    places = ("quantization", "transform.awq", "transform.smoothquant")
    sources = [importlib.import_module(f"llmcompressor.modifiers.{place}") for place in places]
    recipe = []
    for step in request["modifiers"]:
        mappings = _mappings(step, model)
        if mappings is not None:
            kind = next(getattr(source, step["name"]) for source in sources if hasattr(source, step["name"]))
            recipe.append(kind(**step["arguments"], **mappings))
    arguments: dict[str, Any] = {}
    if request["calibration"]:
        rows = _rows(Path(request["calibration"]))
        arguments = {"dataset": rows, "num_calibration_samples": len(rows), "shuffle_calibration_samples": False}
        arguments["max_seq_length"] = max(len(row) for row in rows["input_ids"])
    llmcompressor.oneshot(model=model, recipe=recipe, **arguments)
    model.save_pretrained(request["out"], save_compressed=True)


def _rows(file: Path) -> Any:
    datasets: Any = importlib.import_module("datasets")
    tensors = load_file(file)
    ids = tensors["input_ids"].split(tensors["lengths"].tolist())
    return datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in ids], "attention_mask": [[1] * len(row) for row in ids]})


def _mappings(step: dict[str, Any], model: Any) -> dict[str, Any] | None:
    """Which layers a smoothing reaches, by the request's `place`; None: the model has none such."""
    if step.get("place") != "gated":
        return {}
    # the inputs of down_proj are a product, one factor of which is up_proj's outputs: these take the scales
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {"mappings": [[["re:.*down_proj$"], "re:.*up_proj$"]]} if {"up_proj", "down_proj"} <= names else None


def _leave_memory_unpinned() -> None:
    """llm-compressor 0.14 pins AWQ's activations for copies to an accelerator, which fails where there is none. Remove this when it asks
    first; tests/compression/test_rounding.py tells when."""
    if not torch.accelerator.is_available():
        cache: Any = importlib.import_module("llmcompressor.pipelines.cache")
        cache.IntermediatesCache.pin_memory = lambda *_, **__: None


def _end_with_the_parent() -> None:
    """A job that is killed leaves no process behind: Linux's PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _untie(model: Any) -> None:
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = None
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


if __name__ == "__main__":
    _end_with_the_parent()
    main(json.loads(Path(sys.argv[1]).read_text()))
