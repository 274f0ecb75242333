"""llm-compressor, for real, in its own environment: what it leaves reads back as the parent's weights, rounded as asked."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.errors import ContractError, ModelError
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.schemes import W8A8, Fp8, Mixed, WeightOnly
from adaptfleet.core.models.loading import load_base
from adaptfleet.core.quantization.dequantization import dequantized, is_compressed, load_compressed, rounded_input, unpacked
from adaptfleet.core.quantization.environment import quantizer_python
from adaptfleet.core.quantization.fit import check_fit, dense_bytes, fused_units, planned_bytes, shapes_of
from adaptfleet.core.quantization.knapsack import Option, fill
from adaptfleet.core.quantization.rounding import quantize
from adaptfleet.core.quantization.sensitivity import harm, rounded_weight
from tests.compression.conftest import CONFIGS, make_model, make_rows


def rounded(source: Path, out: Path, spec: Quantize, **options: Any) -> torch.nn.Module:
    quantize(source, out, spec, make_rows(16, 60), **options)
    return load_compressed(out, torch.float32)


def errors(base: Path, model: torch.nn.Module) -> dict[str, float]:
    """By parameter: the distance to the parent's, over its norm."""
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parents = dict(whole.named_parameters(remove_duplicate=False))
    return {
        n: float((p - parents[n]).detach().norm() / parents[n].detach().norm()) for n, p in model.named_parameters(remove_duplicate=False)
    }


def weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_sizes(base: Path, out: Path, spec: Quantize) -> None:
    """What was planned is what lies on disk, but for the header."""
    planned = planned_bytes(shapes_of(CONFIGS["llama"]), spec)
    assert planned == pytest.approx(weights_bytes(out), abs=12_000) and weights_bytes(out) < weights_bytes(base)


def test_eight_bits_the_head_and_the_embedding_too(compression_home: Path, small_base: Path, tmp_path: Path) -> None:
    spec = Quantize(head="w8a8", embedding="w4")
    model = rounded(small_base, tmp_path / "out", spec, untie=True)
    found = errors(small_base, model)
    assert all(0 < error < 0.01 for name, error in found.items() if "proj" in name or name == "lm_head.weight")
    assert 0.02 < found["model.embed_tokens.weight"] < 0.15
    assert all(error == 0 for name, error in found.items() if "norm" in name)
    assert not model.config.tie_word_embeddings
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == (small_base / "chat_template.jinja").read_text()
    loaded, _, _ = load_base(ModelSpec(source=str(tmp_path / "out"), dtype="float32"))
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_four_and_eight_bits_side_by_side(compression_home: Path, small_base: Path, tmp_path: Path) -> None:
    names = [name for unit in fused_units(shapes_of(CONFIGS["llama"]).linear) for name in unit]
    bits_of = {name: 4 if ".1." in name else 8 for name in names}
    spec = Quantize(scheme=Mixed(max_bytes=1, algorithm="gptq"))
    found = errors(small_base, rounded(small_base, tmp_path / "out", spec, bits_of=bits_of))
    for name, bits in bits_of.items():
        low, high = (0.04, 0.25) if bits == 4 else (0.001, 0.03)
        assert low < found[f"{name}.weight"] < high, (name, bits)


SCHEMES: dict[str, tuple[Quantize, float, float]] = {
    "static, smoothed": (Quantize(scheme=W8A8(activations="static", smoothquant=0.5)), 0, 9),
    "zero points, some kept": (
        Quantize(scheme=WeightOnly(symmetric=False, group_size=64), keep=("layers.1.mlp.down_proj", "o_proj")),
        0,
        0.12,
    ),
    "awq": (Quantize(scheme=WeightOnly(algorithm="awq")), 0, 9),
    "fp8 and its cache": (Quantize(scheme=Fp8(), kv_cache="fp8"), 0.01, 0.05),
    "3 bits": (Quantize(scheme=WeightOnly(bits=3, algorithm="gptq")), 0.1, 0.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(compression_home: Path, small_base: Path, tmp_path: Path, name: str) -> None:
    spec, low, high = SCHEMES[name]
    model = rounded(small_base, tmp_path / "out", spec)
    found = errors(small_base, model)
    # smoothing and AWQ move scales between layers: the weights are others, what the model computes is not
    assert all(low <= error < high for key, error in found.items() if "proj" in key)
    check_sizes(small_base, tmp_path / "out", spec)
    if spec.keep:
        unchanged = [key for key, error in found.items() if not error and "proj" in key]
        assert unchanged == [key for key in found if "o_proj" in key or "layers.1.mlp.down_proj" in key]
    ids = torch.tensor([make_rows()[0].input_ids])
    whole = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    with torch.no_grad():
        distance = (model(ids).logits - whole(ids).logits).norm() / whole(ids).logits.norm()
    assert distance < (0.6 if spec.scheme.kind == "weight-only" else 0.2)


@pytest.mark.slow
def test_the_shim_for_awq_is_still_needed(compression_home: Path) -> None:
    """Fails when llm-compressor asks for an accelerator before it pins memory: then `_leave_memory_unpinned` can go."""
    code = (
        "import torch; from llmcompressor.pipelines.cache import IntermediatesCache as C, IntermediateValue as V\n"
        "C._pin_intermediate(V(value=torch.ones(2), device=torch.device('cpu')))"
    )
    done = subprocess.run([quantizer_python(), "-c", code], capture_output=True, text=True, check=False)
    assert torch.accelerator.is_available() or "accelerator" in done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_rounded_leaves_nothing(compression_home: Path, small_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((small_base / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((small_base / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"llm-compressor ended with status 1; nothing was kept"):
        quantize(broken, tmp_path / "out", Quantize(), [])
    assert not (tmp_path / "out").exists()


# what needs no llm-compressor


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_codes_are_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 64))
    words = []
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        words.append([(stream >> (32 * w)) & 0xFFFFFFFF for w in range(math.ceil(64 * bits / 32))])
    packed = torch.tensor(words).to(torch.int32)
    assert torch.equal(unpacked(packed, bits, 64).long() + 2 ** (bits - 1), codes)


def test_dequantized_by_hand() -> None:
    parts = {
        "weight": torch.tensor([[10, -20, 30, 127]], dtype=torch.int8),
        "weight_scale": torch.tensor([[0.5, 2.0]]),
        "weight_zero_point": torch.tensor([[0, 7]], dtype=torch.int8),
    }
    assert dequantized(parts, 8).tolist() == [[5.0, -10.0, 46.0, 240.0]]


def test_inputs_are_rounded_token_by_token() -> None:
    values = torch.tensor([[1.0, -127.0, 3.4], [0.01, 0.02, -0.05]])
    assert rounded_input(values, is_float=False, scale=None)[0].tolist() == pytest.approx([1.0, -127.0, 3.0])
    assert rounded_input(values, is_float=False, scale=torch.tensor(1.0))[1].tolist() == [0.0, 0.0, 0.0]
    assert rounded_input(values, is_float=True, scale=None)[1, 2] == pytest.approx(-0.05)


@pytest.mark.parametrize(
    ("spec", "width", "message"),
    [
        (
            Quantize(scheme=WeightOnly(group_size=128)),
            576,
            r"128 does not divide the inputs of q_proj \(576\).*Use group_size 32 or 64",
        ),
        (Quantize(keep=("downproj",)), 64, r"keep: 'downproj' match no linear module. Did you mean 'down_proj'"),
        (Quantize(keep=("k_proj",)), 64, r"keep leaves a part of q_proj, k_proj, v_proj in 16 bits"),
        (Quantize(scheme=WeightOnly(group_size=64)), 32 * 9, r"does not divide .*q_proj \(288\).*Use group_size 32"),
        (Quantize(scheme=WeightOnly()), 40, r"No group size divides them all; use kind w8a8.*multiples of 32, but q_proj \(40\)"),
    ],
)
def test_shapes_that_do_not_fit(spec: Quantize, width: int, message: str) -> None:
    config = type(CONFIGS["llama"])(**{**CONFIGS["llama"].to_dict(), "hidden_size": width, "intermediate_size": 256, "head_dim": 16})
    with pytest.raises(ContractError, match=message):
        check_fit(shapes_of(config), spec, "cpu")


def test_planned_bytes_of_the_parent() -> None:
    model = make_model("llama").bfloat16()
    assert dense_bytes(shapes_of(CONFIGS["llama"])) == sum(p.nbytes for p in model.parameters())


def test_the_knapsack_is_exact() -> None:
    """Against every choice, over random units of three options."""
    generator = torch.Generator().manual_seed(0)

    def total(units: list[list[Option]], choice: list[int], key: str) -> float:
        return sum(getattr(options[number], key) for options, number in zip(units, choice, strict=True))

    for _ in range(20):
        sizes, harms = torch.randint(1, 40, (5, 3), generator=generator).tolist(), torch.rand(5, 3, generator=generator).tolist()
        units = [[Option(b, h) for b, h in zip(*unit, strict=True)] for unit in zip(sizes, harms, strict=True)]
        smallest = sum(map(min, sizes))
        budget = smallest + int(torch.randint(0, 60, (), generator=generator))
        chosen = fill(units, budget)
        assert total(units, chosen, "num_bytes") <= budget
        every = torch.cartesian_prod(*[torch.arange(3)] * 5).tolist()
        best = min(total(units, choice, "harm") for choice in every if total(units, choice, "num_bytes") <= budget)
        assert total(units, chosen, "harm") == pytest.approx(best)
    with pytest.raises(ContractError, match="smallest options take"):
        fill(units, smallest - 1)


def test_harm_tells_the_layers_apart() -> None:
    """Against the loss that each layer's rounding really costs: the same order, roughly, and of the same size."""
    model = make_model("llama")
    rows = make_rows(8, 60)
    found = harm(model, rows, pad_id=0, group_size=32)
    assert all(by_bits["8"] < by_bits["4"] / 50 for by_bits in found.values())
    ids = torch.tensor([row.input_ids for row in rows])

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits.log_softmax(-1)

    whole = loss()
    costs = {}
    for name in found:
        module = model.get_submodule(name)
        before = module.weight.data.clone()
        module.weight.data.copy_(rounded_weight(before, 4, 32))
        costs[name] = float((whole.exp() * (whole - loss())).sum(-1).mean())
        module.weight.data.copy_(before)
    names = list(costs)
    expected, real = torch.tensor([found[name]["4"] for name in names]), torch.tensor([costs[name] for name in names])
    ranks = torch.stack([values.argsort().argsort().float() for values in (expected, real)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.7


def test_a_rounded_checkpoint_is_known_by_its_config(small_base: Path, tmp_path: Path) -> None:
    assert not is_compressed(small_base)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    assert is_compressed(tmp_path)


def test_what_is_no_whole_checkpoint_is_refused(compression_home: Path, small_base: Path, tmp_path: Path) -> None:
    config = json.loads((small_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with safe_open(small_base / "model.safetensors", "pt") as file:
        from safetensors.torch import save_file

        save_file({"model.norm.weight": file.get_tensor("model.norm.weight")}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no whole checkpoint of LlamaForCausalLM"):
        load_compressed(tmp_path, torch.float32)
