"""Scales that are learnt on rounded layers: what is computed while they are, and what is left in the checkpoint."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812  the name everyone knows

from adaptfleet.contracts.compression import Quantize
from adaptfleet.contracts.distillation import Distillation
from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.jobs import TrainSpec
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.schemes import WeightOnly
from adaptfleet.core.distill.objective import KnowledgeDistillation
from adaptfleet.core.distill.teachers import OnlineTeacher
from adaptfleet.core.models.loading import load_base
from adaptfleet.core.quantization.dequantization import load_compressed
from adaptfleet.core.quantization.rounding import quantize
from adaptfleet.core.quantization.tuning import RoundedLinear, ScaledProduct, ScaleTuning, read_stored, tune, write_tuned
from tests.compression.conftest import make_rows

IDS = torch.tensor([[5, 17, 200, 3, 99, 250, 7, 42, 42, 11]])


def test_its_gradients_are_those_of_the_plain_product() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (6, 8), dtype=torch.int8)
    x, scale = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True), torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    plain = F.linear(x, codes.double() * scale.repeat_interleave(4, dim=1))
    weights = torch.randn(3, 5, 6, dtype=torch.float64)
    expected = torch.autograd.grad((plain * weights).sum(), (x, scale))
    product = ScaledProduct.apply(x, codes, scale)
    assert torch.equal(product, plain)
    # the scale's gradient is summed in float32
    for ours, theirs in zip(torch.autograd.grad((product * weights).sum(), (x, scale)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SPECS = {
    "8 bits, inputs rounded": Quantize(),
    "4 bits": Quantize(scheme=WeightOnly()),
    "zero points": Quantize(scheme=WeightOnly(symmetric=False)),
}


@pytest.fixture(scope="module", params=SPECS)
def spec(request: pytest.FixtureRequest) -> Quantize:
    return SPECS[request.param]


@pytest.fixture(scope="module")
def rounded(spec: Quantize, compression_home: Path, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "out"
    quantize(small_base, out, spec, [])
    return out


def test_untrained_it_computes_what_the_checkpoint_does(rounded: Path) -> None:
    model = load_compressed(rounded, torch.float32)
    student = ScaleTuning(*read_stored(rounded)).attach(copy.deepcopy(model), 0)
    assert sum(isinstance(module, RoundedLinear) for module in student.modules()) == 3 * 7
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_tuned_scales_heal_and_change_nothing_else(spec: Quantize, rounded: Path, small_base: Path, tmp_path: Path) -> None:
    rows, distilled = make_rows(16, 60), Distillation(teacher=ModelSpec(), alpha=1.0)
    # at 8 bits there is next to nothing to heal: that nothing breaks is all there is to see
    is_coarse = spec.scheme.kind == "weight-only"
    parent, _, _ = load_base(ModelSpec(source=str(small_base), dtype="float32"))
    student, _, _ = load_base(ModelSpec(source=str(rounded), dtype="float32"))
    losses: list[float] = []
    scales = tune(
        student,
        rounded,
        TrainSpec(epochs=6, pack_tokens=128, packs_per_step=2, learning_rate=0.01 if is_coarse else 1e-3),
        rows,
        0,
        lambda model: KnowledgeDistillation(distilled, OnlineTeacher(parent, distilled, model.config.vocab_size), model),
        lambda result, total: losses.append(result.loss),
    )
    assert losses[-1] < (0.9 if is_coarse else 1.1) * losses[0]
    (tmp_path / "out").mkdir()
    write_tuned(rounded, tmp_path / "out", scales)
    before, after = (load_file(folder / "model.safetensors") for folder in (rounded, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(scales) and all(after[name].dtype == before[name].dtype for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((rounded / "config.json").read_text())
    with torch.no_grad():
        ids = torch.tensor([row.input_ids for row in rows])
        whole = parent(ids).logits.log_softmax(-1)
        kl = [
            float((whole.exp() * (whole - load_compressed(folder, torch.float32)(ids).logits.log_softmax(-1))).sum(-1).mean())
            for folder in (rounded, tmp_path / "out")
        ]
    assert kl[1] < (0.9 if is_coarse else 1.1) * kl[0], "what is read back from disk is what was learnt"


def test_scales_of_another_checkpoint_are_refused(rounded: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"has no model\.layers\.9"):
        write_tuned(rounded, tmp_path / "out", {"model.layers.9.mlp.up_proj.weight_scale": torch.ones(1)})
