"""The endpoint as others' clients see it. The load of this benchmark's small client and of vLLM's own, in turn: what they say should agree.
And EleutherAI's evaluation harness through `local-chat-completions`, where build/lm-eval has it
(`pip install --no-deps --target build/lm-eval` of lm-eval[api] and what the platform's environment lacks of its requirements): its answers
are those of plain requests.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
HARNESS = REPOSITORY / "build" / "lm-eval"
CONCURRENCY, NUM_REQUESTS = 8, 32
TASK, NUM_QUESTIONS, ANSWER_TOKENS = "capitals", 16, 24


def measure_clients(model: Path, rounds: int) -> dict[str, Any]:
    from chat_load import CHAT_TOKENS, load
    from serve import endpoint, in_turn, say

    from adaptfleet.contracts.serving import ServingSpec

    spec = ServingSpec(cpus_per_replica=1)
    rows: dict[str, list[dict[str, float]]] = {"ours": [], "vllm": []}
    with tempfile.TemporaryDirectory() as scratch, endpoint(spec, Path(scratch)) as (url, key):
        for round_number in range(-1, rounds):  # the first warms up
            for client in in_turn(list(rows), round_number):
                # each has prompts of its own, so that neither finds the other's in the prefix cache
                seed = 1000 + 10 * round_number + list(rows).index(client)
                if client == "ours":
                    row = load(url, key, [spec.base_id()] * NUM_REQUESTS, CONCURRENCY, seed)
                else:
                    row = by_vllm(url, key, spec.base_id(), model, seed, CHAT_TOKENS, Path(scratch))
                if round_number >= 0:
                    rows[client].append(row)
                    say(f"round {round_number + 1}: {client} {row['tokens_per_s']:.1f} tokens/s, TTFT {row['ttft_p50_ms']:.0f} ms")
        found: dict[str, Any] = {"clients": rows}
        if HARNESS.exists():
            found["lm_eval_answers"] = harness_answers(url, key, spec.base_id(), Path(scratch))
            say(f"lm-eval: {found['lm_eval_answers']}")
    for name, key in (("throughput", "tokens_per_s"), ("ttft_p50", "ttft_p50_ms"), ("itl_p95", "itl_p95_ms")):
        ratios = [theirs[key] / ours[key] for theirs, ours in zip(rows["vllm"], rows["ours"], strict=True)]
        found[f"clients_{name}_ratio"] = round(statistics.median(ratios), 3)
    return found


def by_vllm(url: str, key: str, name: str, model: Path, seed: int, num_tokens: int, scratch: Path) -> dict[str, float]:
    """`vllm bench serve`, by its module: the console script looks for a distribution named vllm, which the CPU build is not."""
    from chat_load import answer_tokens, question

    questions = scratch / "questions.jsonl"
    lines = [{"prompt": question(i, seed), "output_tokens": answer_tokens(i, seed, num_tokens)} for i in range(NUM_REQUESTS)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    flags = {
        "backend": "openai-chat",
        "base-url": url,
        "endpoint": "/v1/chat/completions",
        "model": name,
        "tokenizer": str(model),
        "dataset-name": "custom",
        "dataset-path": str(questions),
        "custom-output-len": "-1",
        "num-prompts": str(NUM_REQUESTS),
        "max-concurrency": str(CONCURRENCY),
        "temperature": "0",
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": "50,95",
        "result-dir": str(scratch),
        "result-filename": "result.json",
    }
    command = [sys.executable, "-c", code, "--skip-chat-template", "--ignore-eos", "--save-result", "--disable-tqdm"]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    done = subprocess.run(command, env={**os.environ, "OPENAI_API_KEY": key}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM's client failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result = json.loads((scratch / "result.json").read_text())
    if result["completed"] != NUM_REQUESTS:
        raise SystemExit(f"vLLM's client had {result['completed']} of {NUM_REQUESTS} answers")
    return {
        "tokens_per_s": result["output_throughput"],
        "ttft_p50_ms": result["median_ttft_ms"],
        "itl_p95_ms": result["p95_itl_ms"],
    }


def harness_answers(url: str, key: str, name: str, scratch: Path) -> str:
    """How many answers of a small task are those that plain requests get."""
    import httpx

    rows = [{"question": f"What comes after {i}? Answer in a sentence.", "answer": str(i + 1)} for i in range(NUM_QUESTIONS)]
    (scratch / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(scratch / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": ANSWER_TOKENS, "do_sample": False, "temperature": 0, "until": ["<|im_end|>"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (scratch / "task.yaml").write_text(json.dumps(task))  # JSON is YAML
    flags = {
        "model": "local-chat-completions",
        "model_args": f"model={name},base_url={url}/v1/chat/completions,num_concurrent=1,max_retries=1",
        "tasks": TASK,
        "include_path": str(scratch),
        "output_path": str(scratch / "found"),
    }
    command = [sys.executable, "-m", "lm_eval", "--apply_chat_template", "--log_samples"]
    for flag, value in flags.items():
        command += [f"--{flag}", value]
    environment = {**os.environ, "OPENAI_API_KEY": key, "PYTHONPATH": str(HARNESS), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"lm-eval failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    (file,) = (scratch / "found").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    same = 0
    for sample in samples:
        body = {
            "model": name,
            "messages": [{"role": "user", "content": sample["doc"]["question"]}],
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
        }
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120)
        same += reply.json()["choices"][0]["message"]["content"] == sample["resps"][0][0]
    return f"{same} of {len(samples)} as plain requests have them"
