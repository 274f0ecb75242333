"""Compressed checkpoints against their bf16 parent, each measured with it in one run.

    python bench/compress.py [--only w8a8 w4 ...] [--again]

Each artifact is one recipe of jobs/compress.py and takes a few minutes; what was measured is kept in build/bench-compress, so that the
whole can be run in pieces, with `--only`, and goes on where it stopped. bench/results/compress.json is written from whatever is there.

Text of the calibration and of the recovery: the language reference that comes with Python (pydoc_data.topics), of which every eighth piece
is held out (in-domain); out-of-domain are the descriptions of the installed packages. Perplexity ratios have 95% intervals over the pieces.
Speeds are tokens a CPU second of the real engine with one thread; shape_1b_* has random weights of a model of 1.07 billion parameters, and
stands for speed alone.

The embedded base was itself dequantized from 4-bit weights in blocks of 32: its 4-bit numbers are of such weights. second_base_w4 rounds a
checkpoint whose every weight was trained further.
"""

import argparse
import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "compress.json"
WORK = REPOSITORY / "build" / "bench-compress"
PIECE_CHARS = 1500
NUM_OTHER_PIECES = 64
PRUNE = {"kind": "prune", "mlp_width": 0.2}
RECOVER = {
    "kind": "recover",
    "method": {"kind": "lora", "rank": 32, "alpha": 64},
    "train": {"epochs": 1, "pack_tokens": 512, "packs_per_step": 1, "learning_rate": 5e-4},
}
W8A8 = {"kind": "w8a8", "smoothquant": 0.8}
RECIPES: dict[str, list[Any]] = {
    "w8a8_rtn": [{"kind": "quantize", "scheme": {"kind": "w8a8"}}],
    "w8a8": [{"kind": "quantize", "scheme": W8A8}],
    "w8a8_head": [{"kind": "quantize", "scheme": W8A8, "head": "w8a8"}],
    "w4_rtn": [{"kind": "quantize", "scheme": {"kind": "weight-only"}}],
    "w4_gptq": [{"kind": "quantize", "scheme": {"kind": "weight-only", "algorithm": "gptq"}}],
    "w4_gptq_zero_points": [{"kind": "quantize", "scheme": {"kind": "weight-only", "algorithm": "gptq", "symmetric": False}}],
    "w4_awq": [{"kind": "quantize", "scheme": {"kind": "weight-only", "algorithm": "awq"}}],
    "mixed": [{"kind": "quantize", "scheme": {"kind": "mixed", "max_bytes_ratio": 0.5, "algorithm": "gptq"}}],
    "width": [PRUNE, RECOVER, "merge"],
    "width_w8a8": [PRUNE, RECOVER, "merge", {"kind": "quantize", "scheme": W8A8}],
    "second_base_w4": [{"kind": "quantize", "scheme": {"kind": "weight-only", "algorithm": "gptq"}}],
}
SHAPES = {
    "shape_1b_w8a8": {"kind": "quantize", "scheme": {"kind": "w8a8"}},
    "shape_1b_w4": {"kind": "quantize", "scheme": {"kind": "weight-only"}},
}
TARGETS = {  # bytes, perplexity in and out of domain, decode speed at batch 1 and 16
    "w8a8": (0.61, 1.01, 1.01, 1.25, 1.05), "w4_gptq": (0.44, 1.10, 1.10, 1.2, 0.95), "mixed": (0.50, 1.05, 1.05, None, None),
    "width": (0.90, 1.10, 1.25, 1.1, 1.1), "width_w8a8": (0.55, 1.12, 1.27, 1.4, 1.2),
    "shape_1b_w8a8": (None, None, None, 1.5, 1.5), "shape_1b_w4": (None, None, None, 1.75, 1.1),
}  # fmt: skip


def pieces(text: str) -> list[str]:
    """Whole paragraphs, about PIECE_CHARS together."""
    found, piece = [], ""
    for paragraph in text.split("\n\n"):
        piece = f"{piece}\n\n{paragraph.strip()}" if piece else paragraph.strip()
        if len(piece) >= PIECE_CHARS:
            found.append(piece[: 2 * PIECE_CHARS])
            piece = ""
    return found


def texts() -> dict[str, Path]:
    """The files of both domains, made once: `train` and `test` of the one, `other` and `other_test` of the other."""
    from pydoc_data.topics import topics

    folder = WORK / "text"
    folder.mkdir(parents=True, exist_ok=True)
    # some topics hold the same paragraphs
    reference = list(dict.fromkeys(piece for name in sorted(topics) for piece in pieces(topics[name])))
    descriptions = {found.metadata["Name"]: str(found.metadata.get_payload() or "") for found in metadata.distributions()}
    other = [piece for name in sorted(descriptions, key=str.lower) for piece in pieces(descriptions[name])[1:3]]
    parts = {
        "train": [piece for i, piece in enumerate(reference) if i % 8],
        "test": reference[::8],
        "other": other[1::2][:NUM_OTHER_PIECES],
        "other_test": other[::2][:NUM_OTHER_PIECES],
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


def measure_recipe(name: str) -> dict[str, Any]:
    from adaptfleet.contracts.compression import CompressJob
    from adaptfleet.contracts.home import home
    from adaptfleet.contracts.loading import parse_contract
    from adaptfleet.on_ray.compress.compression import run_compression

    files = texts()
    values = {
        "model": {"source": second_base(files) if name.startswith("second_base") else "smollm2-135m"},
        "run": name.replace("_", "-"),
        "calibration": {"data": {"train": str(files["train"]), "test": str(files["test"])}, "num_rows": 64},
        "steps": RECIPES[name],
        "proof": {"out_of_domain": {"train": str(files["other"]), "test": str(files["other_test"])}, "max_rows": 32},
    }
    job = parse_contract(CompressJob, yaml.safe_dump(values))
    shutil.rmtree(home() / "runs" / job.run_name(), ignore_errors=True)
    run_compression(job)
    return {"recipe": RECIPES[name], **json.loads((home() / "runs" / job.run_name() / "proof.json").read_text())}


def second_base(files: dict[str, Path]) -> str:
    """The embedded base with every weight trained further, so that none lies on a 4-bit grid any more."""
    from adaptfleet.contracts.jobs import FinetuneJob
    from adaptfleet.contracts.loading import parse_contract
    from adaptfleet.on_ray.train.finetune import run_finetune

    values = {
        "data": {"train": str(files["train"]), "test": str(files["test"])},
        "method": {"kind": "full"},
        "train": {"epochs": 1, "pack_tokens": 512, "packs_per_step": 1, "learning_rate": 1e-4, "max_steps": 60, "truncate": True},
        "evaluation": {"max_generated_rows": 0, "max_sample_rows": 0},
        "publish": {"name": "second-base"},
    }
    return run_finetune(parse_contract(FinetuneJob, yaml.safe_dump(values)))


def measure_shape(name: str) -> dict[str, Any]:
    from adaptfleet.contracts.compression import Quantize
    from adaptfleet.core.quantization.rounding import quantize
    from adaptfleet.on_ray.compress.engine_proof import engine_proof
    from adaptfleet.on_ray.compress.recipe_folder import made_once

    parent = made_once("shape", "1b", random_model).folder
    child = made_once("shape", name, lambda out: (out.rmdir(), quantize(parent, out, Quantize.model_validate(SHAPES[name]), []))).folder
    found: dict[str, Any] = {"recipe": [SHAPES[name]]}
    for label, folder in (("parent", parent), ("result", child)):
        engine = vars(engine_proof(folder, "bfloat16", [([1, 2, 3], [False, True, True])], 1, rounds=1))
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        found[label] = {"num_bytes": num_bytes, "quality": {}, "engine": engine}
    return found


def random_model(out: Path) -> None:
    """Llama 3.2 1B's shape with the embedded tokenizer's vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from adaptfleet.core.models.embedded import embedded_model
    from adaptfleet.core.models.loading import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cpu"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(out)
    load_tokenizer(embedded_model("smollm2-135m")).save_pretrained(out)


def row(found: dict[str, Any]) -> dict[str, float]:
    """The table's columns: everything over the parent's."""
    parent, result = found["parent"], found["result"]
    values = {"bytes": result["num_bytes"] / parent["num_bytes"]}
    for domain, ratio in found.get("perplexity_ratio", {}).items():
        values[f"perplexity_{domain}"] = ratio["value"]
    for batch in ("1", "16"):
        speeds = [{str(key): value for key, value in one["engine"]["tokens_per_cpu_s"].items()}[batch] for one in (result, parent)]
        values[f"speed_b{batch}"] = speeds[0] / speeds[1]
    return {key: round(value, 4) for key, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RECIPES, *SHAPES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    arguments = parser.parse_args()
    from adaptfleet.contracts.home import home

    home_folder = WORK / "home"
    home_folder.mkdir(parents=True, exist_ok=True)
    for kept in ("models", "environments"):
        (home() / kept).mkdir(parents=True, exist_ok=True)
        if not (home_folder / kept).exists():
            (home_folder / kept).symlink_to(home() / kept)
    os.environ["ADAPTFLEET_HOME"] = str(home_folder)
    sys.path.insert(0, str(REPOSITORY / "platform"))
    for name in arguments.only:
        file = WORK / f"{name}.json"
        if file.exists() and not arguments.again:
            continue
        print(f"{name} ...", flush=True)
        found = measure_shape(name) if name in SHAPES else measure_recipe(name)
        file.write_text(json.dumps(found, indent=1))
    report([name for name in names if (WORK / f"{name}.json").exists()])


def report(names: list[str]) -> None:
    found = {name: json.loads((WORK / f"{name}.json").read_text()) for name in names}
    rows = {name: row(one) for name, one in found.items()}
    columns = ("bytes", "perplexity_in_domain", "perplexity_out_of_domain", "speed_b1", "speed_b16")
    print(f"{'over the bf16 parent':22}" + "".join(f"{column.replace('perplexity_', 'ppl '):>18}" for column in columns))
    for name, values in rows.items():
        wanted = TARGETS.get(name, (None,) * len(columns))
        cells = [
            f"{values[column]:.3f}" + (f" ({target})" if target else "") if column in values else ""
            for column, target in zip(columns, wanted, strict=True)
        ]
        print(f"{name:22}" + "".join(f"{cell:>18}" for cell in cells))
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs, one thread"
    note = "The embedded base was dequantized from 4-bit weights in blocks of 32; its 4-bit numbers are of such weights."
    RESULTS.write_text(json.dumps({"machine": machine, "note": note, "over_parent": rows, "artifacts": found}, indent=1) + "\n")
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
