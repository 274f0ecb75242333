"""Compressed checkpoints against their bf16 parent.

    python bench/compress.py [quality] [speed] [--only w8a8 w4 ...] [--again]

Each artifact is one recipe of jobs/compress.py. `quality` makes it and measures bytes and perplexity; `speed` measures it in the engine,
its parent before and after it in the same call, and wants a machine without other work. What was measured is kept in
build/bench-compress, so the whole can be run in pieces, with `--only`, and goes on where it stopped. bench/results/compress.json keeps the
rows that it has of what is not measured again.

Text: `train`, of calibration and recovery, is the language reference that comes with Python (pydoc_data.topics), of which every eighth
piece is held out (in-domain). `general`, which recipes mix in, are docstrings of the standard library and of DOCUMENTED packages.
Out-of-domain are the descriptions of the installed packages, of which no recipe sees one. Perplexity ratios have 95% intervals over the
pieces. Speeds are tokens a CPU second of the real engine with one thread; shape_1b_* has random weights of a model of 1.07 billion
parameters, and stands for speed alone.

The embedded base was itself dequantized from 4-bit weights in blocks of 32: its 4-bit numbers are of such weights. second_base_* are of a
checkpoint whose every weight was trained further.
"""

import argparse
import ast
import json
import math
import os
import platform
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "compress.json"
WORK = REPOSITORY / "build" / "bench-compress"
PIECE_CHARS = 1500
NUM_OTHER_PIECES, NUM_GENERAL_PIECES = 64, 600
DOCUMENTED = ("numpy", "pandas", "torch/nn", "transformers", "ray/data")
NUM_CALIBRATION, NUM_SCORED, NUM_PARITY_ROWS, ROUNDS = 32, 16, 8, 3
PRUNE = {"kind": "prune", "mlp_width": 0.25, "refit": True}
RECOVER = {
    "kind": "recover",
    "method": {"kind": "lora", "rank": 64, "alpha": 128},
    "objective": {"kind": "distill", "teacher": {"source": "smollm2-135m"}, "alpha": 0.9},
    "train": {
        "epochs": 1,
        "max_steps": 400,
        "pack_tokens": 512,
        "packs_per_step": 1,
        "learning_rate": 1e-3,
        "truncate": True,
        "compile": "off",
    },
}
TUNE = {"kind": "tune", "num_rows": 40}
GPTQ = {"kind": "weight-only", "algorithm": "gptq"}
ENDS_8 = {"head": "w8a8", "embedding": "w8"}
W8A8 = {"kind": "quantize", "scheme": {"kind": "w8a8", "smoothquant": 0.5}, "rotate": True, **ENDS_8}
ENDS_4 = {"head": "w8a8", "embedding": "w4"}
RECIPES: dict[str, list[Any]] = {
    "w8a8_rtn": [{"kind": "quantize", "scheme": {"kind": "w8a8"}}],
    "w8a8_smooth": [{"kind": "quantize", "scheme": {"kind": "w8a8", "smoothquant": 0.8}}],
    "w8a8": [W8A8],
    "w8a8_tuned": [W8A8, TUNE],
    "w8a8_rtn_tuned": [{"kind": "quantize", "scheme": {"kind": "w8a8"}, **ENDS_8}, TUNE],
    "w4_rtn": [{"kind": "quantize", "scheme": {"kind": "weight-only"}}],
    "w4_gptq": [{"kind": "quantize", "scheme": GPTQ}],
    "w4": [{"kind": "quantize", "scheme": GPTQ, **ENDS_8}, TUNE],
    "w4_awq": [{"kind": "quantize", "scheme": {"kind": "weight-only", "algorithm": "awq"}}],
    "mixed": [{"kind": "quantize", "scheme": {"kind": "mixed", "max_bytes_ratio": 0.5, "algorithm": "gptq"}, **ENDS_4}, TUNE],
    "width_raw": [{**PRUNE, "refit": False}],
    "width_refit": [PRUNE],
    **{f"width_{percent}_refit": [{**PRUNE, "mlp_width": percent / 100}] for percent in (30, 40, 60)},
    "width": [PRUNE, RECOVER, "merge"],
    "width_w8a8": [PRUNE, RECOVER, "merge", W8A8],
    "second_base_w4": [{"kind": "quantize", "scheme": GPTQ, **ENDS_8}, TUNE],
}
SHAPES = {
    "shape_1b_w8a8": {"kind": "quantize", "scheme": {"kind": "w8a8"}, **ENDS_8},
    # groups of 128, as models of this size are usually rounded; 576 inputs of the embedded base have none
    "shape_1b_w4": {"kind": "quantize", "scheme": {"kind": "weight-only", "group_size": 128}, **ENDS_8},
}
TARGETS = {  # bytes, perplexity in and out of domain, decode speed at batch 1 and 16
    "w8a8": (0.61, 1.01, 1.01, 1.25, 1.05), "w4": (0.44, 1.10, 1.10, 1.2, 0.95), "mixed": (0.50, 1.05, 1.05, None, None),
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
    """The files: `train` and `test` of the one domain, `other` and `other_test` of the other, and `general`."""
    from pydoc_data.topics import topics

    folder = WORK / "text"
    folder.mkdir(parents=True, exist_ok=True)
    # some topics hold the same paragraphs
    reference = list(dict.fromkeys(piece for name in sorted(topics) for piece in pieces(topics[name])))
    descriptions = {found.metadata["Name"]: str(found.metadata.get_payload() or "") for found in metadata.distributions()}
    other = [piece for name in sorted(descriptions, key=str.lower) for piece in pieces(descriptions[name])[1:3]]
    parts = {
        "general": docstrings(),
        "train": [piece for i, piece in enumerate(reference) if i % 8],
        "test": reference[::8],
        "other": other[1::2][:NUM_OTHER_PIECES],
        "other_test": other[::2][:NUM_OTHER_PIECES],
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in parts}


def docstrings() -> list[str]:
    """Evenly from the standard library's modules and those of well documented packages."""
    found: list[str] = []
    roots = [Path(sysconfig.get_paths()["stdlib"]), *(Path(sysconfig.get_paths()["purelib"]) / name for name in DOCUMENTED)]
    files = [*sorted(roots[0].glob("*.py")), *(file for root in roots[1:] for file in sorted(root.rglob("*.py")))]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += pieces("\n\n".join(text for node in nodes if (text := ast.get_docstring(node))))
    return found[:: max(1, len(found) // NUM_GENERAL_PIECES)][:NUM_GENERAL_PIECES]


def recipe_job(name: str) -> Any:
    from adaptfleet.contracts.compression import CompressJob
    from adaptfleet.contracts.loading import parse_contract

    files = texts()
    # a parent's general knowledge is what pruning costs most
    recovery = mixed(files, general=3.0)
    values = {
        "model": {"source": second_base(files) if name.startswith("second_base") else "smollm2-135m"},
        "run": name.replace("_", "-"),
        "calibration": {"data": mixed(files), "num_rows": NUM_CALIBRATION},
        "steps": [{**step, "data": recovery} if step is RECOVER else step for step in RECIPES[name]],
        "proof": {
            "in_domain": {"train": str(files["train"]), "test": str(files["test"])},
            "out_of_domain": {"train": str(files["other"]), "test": str(files["other_test"])},
            "max_rows": NUM_SCORED,
            "engine": False,
        },
    }
    return parse_contract(CompressJob, yaml.safe_dump(values))


def mixed(files: dict[str, Path], general: float = 1.0) -> dict[str, Any]:
    """Text of the domain, and so many times as much general text."""
    sources = [{"source": str(files["train"])}, {"source": str(files["general"]), "weight": general}]
    return {"mixture": sources, "test": str(files["test"])}


def measure_quality(name: str) -> dict[str, Any]:
    """Makes the artifact and scores it. The parent of several recipes is scored once."""
    from adaptfleet.core.data.encoding import encode_all
    from adaptfleet.core.evaluation.intervals import Ratio, confidence_interval
    from adaptfleet.core.quantization.environment import quantizer_python
    from adaptfleet.on_ray.compress.compression import make
    from adaptfleet.on_ray.compress.preflight import prepare
    from adaptfleet.on_ray.compress.proof import weights_bytes
    from adaptfleet.store.registry import Registry

    job = recipe_job(name)
    prepared = prepare(job, Registry.open())
    quantizer_python()
    began = time.monotonic()
    made, adapter = make(job, prepared)
    made_s = time.monotonic() - began
    assert adapter is None
    kept = WORK / f"parent-{prepared.revision[:16]}-{job.proof.max_rows}.json"
    if not kept.exists():
        kept.write_text(json.dumps(losses(job, prepared.folder, prepared)))
    parents, results = json.loads(kept.read_text()), losses(job, made.folder, prepared)
    found: dict[str, Any] = {"recipe": RECIPES[name], "made_s": made_s, "folders": [str(prepared.folder), str(made.folder)]}
    sides = {"parent": (prepared.folder, parents), "result": (made.folder, results)}
    for side, (folder, rows) in sides.items():
        perplexity = {domain: interval(rows[domain], None, Ratio, confidence_interval) for domain in rows}
        found[side] = {"num_bytes": weights_bytes(folder), "perplexity": perplexity}
    found["perplexity_ratio"] = {domain: interval(results[domain], parents[domain], Ratio, confidence_interval) for domain in results}
    encoded = encode_all(prepared.held_out["in_domain"][:NUM_PARITY_ROWS], prepared.tokenizer, 1000, truncate=True)
    found["parity"] = {
        "rows": [[row.input_ids, row.label_mask] for row in encoded],
        "nats": {side: sum(rows["in_domain"][i][0] for i in range(len(encoded))) for side, (_, rows) in sides.items()},
    }
    return found


def losses(job: Any, folder: Path, prepared: Any) -> dict[str, list[list[float]]]:
    """By domain: nats and labels of each held-out row."""
    from adaptfleet.on_ray.compress.proof import measure_checkpoint

    _, rows = measure_checkpoint(job, folder.name, folder, prepared)
    return {domain: [[row.loss.nats, row.loss.num_labels] for row in found if row.loss] for domain, found in rows.items()}


def interval(rows: list[list[float]], parents: list[list[float]] | None, ratio: Any, confidence_interval: Any) -> dict[str, float]:
    """Perplexity, or the ratio of perplexities drawn in pairs."""
    nats = [mine[0] - (parents[i][0] if parents else 0.0) for i, mine in enumerate(rows)]
    drawn = ratio(np.array(nats), np.array([float(labels) for _, labels in rows]), exponential=True)
    return vars(confidence_interval(drawn, 2000))


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


def make_shape(name: str) -> dict[str, Any]:
    from adaptfleet.contracts.compression import Quantize
    from adaptfleet.core.quantization import schemes
    from adaptfleet.core.quantization.rounding import quantize
    from adaptfleet.on_ray.compress.proof import weights_bytes
    from adaptfleet.on_ray.compress.recipe_folder import made_once

    # the search for the best scales is for quality alone, of which random weights have none
    schemes._OBSERVER = "memoryless_minmax"
    parent = made_once("shape", "1b", random_model).folder
    step = Quantize.model_validate(SHAPES[name])

    def make(out: Path) -> None:
        out.rmdir()
        quantize(parent, out, step, [], untie=step.head != "keep")

    child = made_once("shape", name, make).folder
    found: dict[str, Any] = {"recipe": [SHAPES[name]], "folders": [str(parent), str(child)]}
    return found | {side: {"num_bytes": weights_bytes(folder)} for side, folder in (("parent", parent), ("result", child))}


def measure_speeds(names: list[str]) -> None:
    """One engine after another, with the parent before and after its children: what drifts meanwhile shows, and its mean counts."""
    from adaptfleet.on_ray.compress.engine_proof import engine_proof

    quality = {name: json.loads(kept("quality", name).read_text()) for name in names}
    parents = list(dict.fromkeys(found["folders"][0] for found in quality.values()))
    for parent in parents:
        mine = [name for name in names if quality[name]["folders"][0] == parent]
        rows = next((quality[name]["parity"]["rows"] for name in mine if "parity" in quality[name]), [[[1, 2, 3], [False, True, True]]])
        rounds = 1 if mine[0] in SHAPES else ROUNDS
        before = vars(engine_proof(Path(parent), "bfloat16", rows, 1, rounds))
        engines = {}
        for name in mine:
            print(f"{name} in the engine ...", flush=True)
            engines[name] = vars(engine_proof(Path(quality[name]["folders"][1]), "bfloat16", rows, 1, rounds))
        after = vars(engine_proof(Path(parent), "bfloat16", rows, 1, rounds)) if len(mine) > 1 else before
        for name, engine in engines.items():
            kept("speed", name).write_text(json.dumps({"machine": machine(), "parent": [before, after], "result": engine}, indent=1))


def machine() -> str:
    """With what decides which kernels run."""
    flags = Path("/proc/cpuinfo").read_text().split()
    kinds = [kind for kind in ("amx_int8", "avx512_bf16", "avx512_vnni") if kind in flags]
    return f"{platform.machine()} ({', '.join(kinds)}), {len(os.sched_getaffinity(0))} CPUs, one thread"


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
    values = {"bytes": found["result"]["num_bytes"] / found["parent"]["num_bytes"]}
    for domain, ratio in found.get("perplexity_ratio", {}).items():
        values[f"perplexity_{domain}"] = ratio["value"]
    engines = found.get("engines")
    for batch in ("1", "16") if engines else ():
        parents = [one["tokens_per_cpu_s"][batch] for one in engines["parent"]]
        values[f"speed_b{batch}"] = engines["result"]["tokens_per_cpu_s"][batch] * len(parents) / sum(parents)
    return {key: round(value, 4) for key, value in values.items()}


def kept(part: str, name: str) -> Path:
    return WORK / part / f"{name}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RECIPES, *SHAPES]
    parser.add_argument("parts", nargs="*", help="quality, speed; both where none is named")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")
    arguments = parser.parse_args()
    parts = arguments.parts or ["quality", "speed"]
    if set(parts) - {"quality", "speed"}:
        parser.error(f"parts are {', '.join(parts)}; allowed: quality, speed")
    from adaptfleet.contracts.home import home

    home_folder = WORK / "home"
    for folder in (home_folder, WORK / "quality", WORK / "speed"):
        folder.mkdir(parents=True, exist_ok=True)
    for shared in ("models", "environments"):
        (home() / shared).mkdir(parents=True, exist_ok=True)
        if not (home_folder / shared).exists():
            (home_folder / shared).symlink_to(home() / shared)
    os.environ["ADAPTFLEET_HOME"] = str(home_folder)
    sys.path.insert(0, str(REPOSITORY / "platform"))
    if "quality" in parts:
        for name in arguments.only:
            if kept("quality", name).exists() and not arguments.again:
                continue
            print(f"{name} ...", flush=True)
            from adaptfleet.on_ray.joining import joined_cluster

            with joined_cluster():  # before Ray is imported: recovery trains on it
                found = make_shape(name) if name in SHAPES else measure_quality(name)
            kept("quality", name).write_text(json.dumps(found, indent=1))
            kept("speed", name).unlink(missing_ok=True)
    if "speed" in parts:
        pending = [name for name in arguments.only if arguments.again or not kept("speed", name).exists()]
        measure_speeds([name for name in pending if kept("quality", name).exists()])
    report({name: artifact(name) for name in names if kept("quality", name).exists()})


def artifact(name: str) -> dict[str, Any]:
    """All that was measured of it, with the perplexity in the engine over the one computed here from the same rounded weights."""
    found: dict[str, Any] = json.loads(kept("quality", name).read_text())
    del found["folders"]
    parity = found.pop("parity", None)
    if kept("speed", name).exists():
        found["engines"] = json.loads(kept("speed", name).read_text())
        if parity:
            num_labels = sum(sum(mask) for _, mask in parity["rows"])
            nats = {"parent": found["engines"]["parent"][0]["nats"], "result": found["engines"]["result"]["nats"]}
            found["engine_parity"] = {side: math.exp((nats[side] - parity["nats"][side]) / num_labels) for side in nats}
    return found


def report(found: dict[str, Any]) -> None:
    """The table of these and of what an earlier call reported: each row has its own parent, measured beside it."""
    if RESULTS.exists():
        found = json.loads(RESULTS.read_text())["artifacts"] | found
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
    note = "The embedded base was dequantized from 4-bit weights in blocks of 32; its 4-bit numbers are of such weights."
    columns_note = "Over the bf16 parent; speeds in tokens a CPU second, over the mean of the parent's before and after."
    text = {"note": note, "columns": columns_note, "over_parent": rows, "targets": TARGETS, "artifacts": found}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n")
    print(f"written: {RESULTS.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
