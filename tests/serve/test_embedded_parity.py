"""The embedded model and four adapters of two ranks in mixed batches, against transformers and PEFT."""

import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serve.engines import engine, greedy_answers
from tests.serve.greedy import disagreements

RANKS = {"r8-a": 8, "r16-a": 16, "r8-b": 8, "r16-b": 16}
ASKED = ["base", *RANKS]


def _adapter(base: Path, folder: Path, rank: int, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.4)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_batches(embedded_home: Path, tmp_path: Path, dtype: str) -> None:
    base = embedded_home / "models" / "smollm2-135m"
    adapters = {name: _adapter(base, tmp_path / name, rank, seed) for seed, (name, rank) in enumerate(RANKS.items())}
    tokenizer = AutoTokenizer.from_pretrained(base)
    rng = random.Random(0)
    places = ["Lisbon", "a small town", "the moon", "Route 66", "my kitchen"]
    texts = [f"Tell me about {rng.choice(places)}. " + "Take your time, and be exact. " * rng.choice([0, 1, 6]) for _ in range(16)]
    requests = [
        (ASKED[i % len(ASKED)], tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        for i, text in enumerate(texts)
    ]
    with engine(base, dtype=dtype, max_loras=4, max_lora_rank=16, max_model_len=512, max_num_seqs=16) as llm:
        alone = [greedy_answers(llm, [request], adapters)[0] for request in requests[: len(ASKED)]]
        together = greedy_answers(llm, requests, adapters)
    wrong: list[str] = []
    for name in ASKED:
        reference = _reference(base, adapters.get(name), torch.float32)
        rounded = _reference(base, adapters.get(name), torch.bfloat16) if dtype == "bfloat16" else None
        told_apart = set()
        for (asked, prompt), answer in [*zip(requests, alone, strict=False), *zip(requests, together, strict=True)]:
            if asked in told_apart:
                continue
            found = disagreements(reference, prompt, answer, rounded)
            if asked == name:
                wrong += [f"{name}, prompt of {len(prompt)}: {line}" for line in found]
            elif found:
                told_apart.add(asked)
        wrong += [f"no answer of {other} is seen not to be one of {name}" for other in set(ASKED) - {name} - told_apart]
    assert not wrong, "\n".join(wrong)


def _reference(base: Path, adapter: Path | None, dtype: torch.dtype) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)).eval()
