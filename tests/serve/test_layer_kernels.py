"""The plug-in's norms and gated activations on a CPU, against vLLM's own in PyTorch."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import ir
from vllm.config.compilation import CompilationMode
from vllm.kernels import vllm_c
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import cpu
from vllm.platforms.cpu import CpuPlatform

from adaptfleet.on_ray.serve.layer_kernels import PROVIDER, fused_add_rms_norm, priority, register, rms_norm, silu_and_mul

EPSILON = 1e-5
SHAPES = [(1, 576), (7, 48), (3, 5, 64), (130, 2048)]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6}
"""Of the norm of the difference: vLLM's rounds before it multiplies by the weight, the kernel once."""


def is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    return bool((found.float() - expected.float()).norm() < TOLERANCE[found.dtype] * expected.float().norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_are_vllms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    register()
    x, residual, weight = (torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype))
    before = x.clone()
    assert is_near(rms_norm(x, weight, EPSILON), ir.ops.rms_norm.impls["native"].impl_fn(x, weight, EPSILON))
    assert torch.equal(x, before)
    expected, expected_sum = ir.ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPSILON)
    found, found_sum = fused_add_rms_norm(x.clone(), residual.clone(), weight, EPSILON)
    assert is_near(found, expected)
    assert torch.equal(found_sum, expected_sum)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 40)])
def test_gated_activations_are_vllms(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer: Any = SiluAndMul
    x = torch.randn(shape).to(dtype)
    assert is_near(silu_and_mul(layer, x), SiluAndMul.forward_native(x))
    every_other = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    assert is_near(silu_and_mul(layer, every_other), SiluAndMul.forward_native(every_other))


def test_what_the_kernels_do_not_take_goes_to_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads cut out of a wider row, odd widths, weights of another type, a norm of a part of the row."""
    register()
    monkeypatch.setattr(ir.ops.rms_norm, "_priority_impls", [ir.ops.rms_norm.impls[name] for name in (PROVIDER, "native")])
    x, weight = torch.randn(4, 96).bfloat16(), torch.rand(96).bfloat16()

    def provider(*args: Any) -> str:
        return ir.ops.rms_norm.dispatch(*args).provider

    assert provider(x, weight, EPSILON) == PROVIDER
    assert provider(x[:, 32:], weight[32:], EPSILON) == "native"
    assert provider(x[:, :88].contiguous(), weight[:88], EPSILON) == "native"
    assert provider(x, weight.float(), EPSILON) == "native"
    assert provider(x, None, EPSILON) == "native"
    assert provider(x, weight, EPSILON, 48) == "native"


@pytest.mark.parametrize(
    ("mode", "backend", "first"),
    [
        (CompilationMode.NONE, "inductor", PROVIDER),
        (CompilationMode.VLLM_COMPILE, "inductor", "native"),
        (CompilationMode.STOCK_TORCH_COMPILE, "eager", PROVIDER),
    ],
)
def test_compiled_graphs_keep_vllms_own(mode: CompilationMode, backend: str, first: str) -> None:
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(mode=mode, backend=backend))
    found = priority(config)
    assert (found.rms_norm[0], found.fused_add_rms_norm[0]) == (first, first)
    assert found.rms_norm[-1] == "native"


def test_they_stand_in_for_vllms() -> None:
    register()
    register()
    assert CpuPlatform.get_default_ir_op_priority is priority
    assert SiluAndMul.forward_cpu is silu_and_mul


def test_vllms_cpu_still_takes_no_kernels() -> None:
    """It fails when vLLM does: layer_kernels.py can go then."""
    assert not vllm_c.GPGPU_DEVICE
    assert not ir.ops.rms_norm.impls["vllm_c"].supported
    assert "get_default_ir_op_priority" not in inspect.getsource(cpu)
