"""Trained parts on disk, in the formats that others read: peft's for adapters, Hugging Face's for whole models."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_adapter(model: PeftModel, folder: Path, base_id: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, in the type the model computed in: what is served is what was trained.

    The config names the base by `base_id`, not by a path of the machine that trained it.
    """
    model.peft_config["default"].base_model_name_or_path = base_id
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def write_lora(
    folder: Path, base_id: str, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, use_rslora: bool = False
) -> None:
    """A LoRA adapter from its factors, by module: A [rank, inputs] and B [outputs, rank], all of one rank, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(factors.values()))[0].shape[0]
    config = LoraConfig(
        base_model_name_or_path=base_id,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float scales as well
        use_rslora=use_rslora,
        target_modules=sorted({name.rpartition(".")[2] for name in factors}),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous().cpu()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A checkpoint that transformers and vLLM load: weights, config and tokenizer."""
    model.config.use_cache = True
    # transformers refuses to save a temperature beside greedy decoding, which some published models come with
    if model.generation_config.temperature not in (None, 1.0):
        model.generation_config.do_sample = True
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
