"""A real vLLM engine with the plug-in: each request's greedy answer is that of transformers and PEFT, alone and in mixed batches."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve import engines
from tests.serve.greedy import disagreements
from tests.serve.tiny_llama import VOCABULARY, load_adapted, make_adapter, make_base

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention-r4": {"rank": 4, "targets": ("q_proj", "v_proj")},
    "all-r8": {"rank": 8},
    "all-r16-rslora": {"rank": 16, "use_rslora": True},
    "mlp-r8": {"rank": 8, "targets": ("gate_proj", "down_proj")},
    "value-r1": {"rank": 1, "targets": ("v_proj",)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parity")
    base = make_base(root / "base")
    made = {name: make_adapter(base, root / name, seed=i + 1, **kind) for i, (name, kind) in enumerate(ADAPTERS.items())}
    return {"base": base, **made}


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Three slots for five adapters, so that slots change hands within the tests."""
    with engines.engine(
        folders["base"],
        dtype="float32",
        enforce_eager=request.param == "eager",
        max_loras=3,
        max_cpu_loras=len(ADAPTERS),
        max_lora_rank=16,
        max_model_len=512,
        max_num_seqs=16,
    ) as llm:
        yield llm


def _prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, VOCABULARY) for _ in range(length)]


def _answers(engine: Any, folders: dict[str, Path], requests: list[tuple[str, list[int]]]) -> list[list[int]]:
    return engines.greedy_answers(engine, requests, {name: folders[name] for name in ADAPTERS})


def _check(folders: dict[str, Path], requests: list[tuple[str, list[int]]], answers: list[list[int]]) -> None:
    wrong: list[str] = []
    for name in dict.fromkeys(name for name, _ in requests):
        reference = load_adapted(folders["base"], None if name == "base" else folders[name])
        for (asked, prompt), answer in zip(requests, answers, strict=True):
            if asked == name:
                wrong += [f"{name}, prompt of {len(prompt)}: {line}" for line in disagreements(reference, prompt, answer)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
def test_alone(engine: Any, folders: dict[str, Path], name: str) -> None:
    requests = [(name, _prompt(1, 12)), (name, _prompt(2, 70))]
    _check(folders, requests, _answers(engine, folders, requests))


@pytest.mark.parametrize("seed", range(4))
def test_mixed(engine: Any, folders: dict[str, Path], seed: int) -> None:
    """Sixteen requests, all adapters and the base among them, prompts from 1 to 120 tokens: prompts and decoding share batches."""
    rng = random.Random(seed)
    names = ["base", *ADAPTERS] * 3
    rng.shuffle(names)
    requests = [(name, _prompt(100 * seed + i, rng.choice([1, 5, 12, 40, 120]))) for i, name in enumerate(names[:16])]
    _check(folders, requests, _answers(engine, folders, requests))


def test_the_adapters_answer_differently(engine: Any, folders: dict[str, Path]) -> None:
    """Or the tests above would prove nothing."""
    prompt = _prompt(7, 20)
    answers = _answers(engine, folders, [(name, prompt) for name in ["base", *ADAPTERS]])
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_log_probabilities_of_a_prompt(engine: Any, folders: dict[str, Path]) -> None:
    """Their rows of logits are more than the batch has requests (vllm#29955)."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    outputs = engine.generate(
        [TokensPrompt(prompt_token_ids=_prompt(3, 10))],
        SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, detokenize=False),
        lora_request=[LoRARequest("all-r8", 2, str(folders["all-r8"]))],
        use_tqdm=False,
    )
    assert len(outputs[0].prompt_logprobs) == 10
