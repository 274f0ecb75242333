"""A vLLM engine of a test's own, and greedy answers of it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def engine(model: Path, **arguments: Any) -> Iterator[Any]:
    """An engine in processes of its own, which find the plug-in by its entry point, as in production."""
    before = {key: os.environ.get(key) for key in SETTINGS}
    os.environ.update(SETTINGS)
    try:
        from vllm import LLM

        llm = LLM(str(model), **{"enable_lora": True, "enforce_eager": True, "skip_tokenizer_init": True, **arguments})
        yield llm
        llm.llm_engine.engine_core.shutdown()
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


def greedy_answers(llm: Any, requests: Sequence[tuple[str, list[int]]], adapters: dict[str, Path], num_tokens: int = 24) -> list[list[int]]:
    """Token ids for requests of (name, prompt), all in flight together. A name that is no adapter's is the base."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    numbers = {name: number for number, name in enumerate(adapters, 1)}
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for _, prompt in requests],
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False),
        lora_request=[LoRARequest(name, numbers[name], str(adapters[name])) if name in adapters else None for name, _ in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
