"""Layers of 4 and of 8 bits on a CPU with AVX512-VNNI and without AMX, against the weights that their codes stand for."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm import Int8ScaledMMLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from adaptfleet.on_ray.serve import vnni_linear
from adaptfleet.on_ray.serve.vnni_linear import VnniEightBitKernel, VnniFourBitKernel, register


@pytest.fixture(autouse=True)
def without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is AMX: the operation is the same one."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(vnni_linear, "cpu_flags", lambda: frozenset({"avx512_vnni"}))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What the operations make of activations: each row rounded to whole steps, 127 on either side of zero."""
    step = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / step).round() * step


def parameter(data: torch.Tensor, **places: int) -> Any:
    made: Any = torch.nn.Parameter(data, requires_grad=False)
    for name, value in places.items():
        setattr(made, name, value)
    return made


def layer(inputs: int, outputs: int, group: int, is_symmetric: bool, inputs_first: bool = False) -> tuple[Any, torch.Tensor]:
    """A layer as vLLM loads it from a compressed-tensors checkpoint (or, inputs first, from a GPTQ one), and its weight [M, K]."""
    kind = scalar_types.uint4b8 if is_symmetric else scalar_types.uint4
    generator = torch.Generator().manual_seed(inputs + outputs + group)
    codes_MK = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.int32)
    num_groups = 1 if group == -1 else inputs // group
    scale_MG = (torch.rand(outputs, num_groups, generator=generator) / 8 + 0.01).bfloat16()
    zero_MG = torch.randint(0, 16, (outputs, num_groups), generator=generator, dtype=torch.int32)
    made = torch.nn.Module()
    packed_MK = pack_quantized_values_into_int32(codes_MK, kind, 1)
    places = {"input_dim": 0, "output_dim": 1, "packed_dim": 0} if inputs_first else {"input_dim": 1, "output_dim": 0, "packed_dim": 1}
    made.weight_packed = parameter(packed_MK.t().contiguous() if inputs_first else packed_MK, **places)
    made.weight_scale = parameter(scale_MG, input_dim=1, output_dim=0)
    if not is_symmetric:
        made.weight_zero_point = parameter(pack_quantized_values_into_int32(zero_MG, kind, 0), input_dim=1, output_dim=0, packed_dim=0)
    zero = 8 if is_symmetric else zero_MG[:, :, None]
    weight_MGK = (codes_MK.view(outputs, num_groups, -1) - zero) * scale_MG.float()[:, :, None]
    return made, weight_MGK.view(outputs, inputs)


def config(inputs: int, outputs: int, group: int, is_symmetric: bool) -> MPLinearLayerConfig:
    kind = scalar_types.uint4b8 if is_symmetric else scalar_types.uint4
    return MPLinearLayerConfig((inputs, outputs), (inputs, outputs), kind, torch.bfloat16, group, not is_symmetric)


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(576, 192, 32), (576, 1536, 64), (1536, 576, 128), (768, 96, 384), (640, 96, -1)])
@pytest.mark.parametrize("inputs_first", [False, True])
def test_it_multiplies_by_the_weights(inputs: int, outputs: int, group: int, is_symmetric: bool, inputs_first: bool) -> None:
    made, weight_MK = layer(inputs, outputs, group, is_symmetric, inputs_first)
    made.bias = None
    kernel = VnniFourBitKernel(config(inputs, outputs, group, is_symmetric), "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(made)
    assert made.use_w4a8
    bias_M = torch.randn(outputs)
    for shape in [(1, inputs), (4, inputs), (18, inputs), (2, 35, inputs)]:
        x = torch.randn(shape).bfloat16()
        expected = rounded(x) @ weight_MK.T + bias_M
        found = kernel.apply_weights(made, x, bias_M)
        assert found.shape == expected.shape == torch.compile(kernel.apply_weights, backend="aot_eager")(made, x, bias_M).shape
        assert found.dtype == torch.bfloat16
        assert ((found.float() - expected).norm() / expected.norm()) < 0.005


@pytest.fixture
def bfloat16_model() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def eight_bit_layer(inputs: int, outputs: int) -> tuple[Any, torch.Tensor]:
    """A layer as vLLM loads it from a compressed-tensors checkpoint, and its weight [M, K]."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    codes_MK = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int32).to(torch.int8)
    scale_M1 = torch.rand(outputs, 1, generator=generator, dtype=torch.float32) / 100 + 0.001
    made: Any = torch.nn.Module()
    made.weight, made.weight_scale, made.logical_widths, made.bias = parameter(codes_MK), parameter(scale_M1), [outputs], None
    for name in EIGHT_BIT_NAMES[2:]:
        made.register_parameter(name, None)
    return made, codes_MK.float() * scale_M1


EIGHT_BIT_NAMES = ("weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj")
EIGHT_BIT = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)


@pytest.mark.usefixtures("bfloat16_model")
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (608, 48), (40, 72)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_multiplies_by_weights_of_8_bits(inputs: int, outputs: int, has_bias: bool) -> None:
    made, weight_MK = eight_bit_layer(inputs, outputs)
    bias_M = torch.randn(outputs)
    if has_bias:
        made.bias = parameter(bias_M.bfloat16())
    kernel = VnniEightBitKernel(EIGHT_BIT, EIGHT_BIT_NAMES)
    kernel.process_weights_after_loading(made)
    is_for_it = inputs % 32 == 0 and outputs % 32 == 0
    assert (made.weight is not None) == is_for_it
    for rows in (1, 4, 18, 70):
        x = torch.randn(rows, inputs).bfloat16()
        expected = rounded(x) @ weight_MK.T + (bias_M.bfloat16().float() if has_bias else 0)
        found = kernel.apply_weights(made, x, made.bias)
        assert found.dtype == torch.bfloat16
        assert ((found.float() - expected).norm() / expected.norm()) < 0.005


def test_it_stands_before_the_kernel_that_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    register()
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    assert kernels.count(VnniFourBitKernel) == 1
    assert kernels.index(VnniFourBitKernel) == kernels.index(CPUWNA16LinearKernel) - 1
    assert linear.choose_mp_linear_kernel(config(576, 192, 64, True)) is VnniFourBitKernel
    assert linear.choose_mp_linear_kernel(config(576, 192, 192, True)) is CPUWNA16LinearKernel
    assert linear.choose_mp_linear_kernel(config(576, 192, -1, False)) is CPUWNA16LinearKernel
    with monkeypatch.context() as patched:
        patched.setenv("VLLM_CPU_INT4_W4A8", "0")
        assert linear.choose_mp_linear_kernel(config(576, 192, 64, True)) is CPUWNA16LinearKernel
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert linear.choose_mp_linear_kernel(config(576, 192, 64, True)) is CPUWNA16LinearKernel
    with monkeypatch.context() as patched:
        patched.setattr(vnni_linear, "cpu_flags", lambda: frozenset({"avx2"}))
        assert linear.choose_mp_linear_kernel(config(576, 192, 64, True)) is CPUWNA16LinearKernel


def test_vllms_own_of_4_bits_still_asks_for_amx() -> None:
    """It fails when vLLM no longer does: the kernel of four bits in vnni_linear.py can go then."""
    made, _ = layer(576, 192, 64, True)
    kernel = CPUWNA16LinearKernel(config(576, 192, 64, True), "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(made)
    assert not made.use_w4a8


@pytest.mark.usefixtures("bfloat16_model")
def test_vllms_own_of_8_bits_still_asks_for_amx() -> None:
    """It fails when vLLM no longer does: the kernel of eight bits in vnni_linear.py can go then."""
    made, _ = eight_bit_layer(576, 960)
    CPUInt8ScaledMMLinearKernel(EIGHT_BIT, EIGHT_BIT_NAMES).process_weights_after_loading(made)
    assert made.weight is None


@pytest.mark.usefixtures("bfloat16_model")
def test_the_kernel_of_8_bits_stands_before_the_one_that_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    register()
    kernels = linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    assert kernels.count(VnniEightBitKernel) == 1

    def chosen(config: Int8ScaledMMLinearLayerConfig = EIGHT_BIT) -> type:
        return linear.choose_scaled_mm_linear_kernel(config, linear._POSSIBLE_INT8_KERNELS, quantization="int8_w8a8")

    assert chosen() is VnniEightBitKernel
    assert chosen(replace(EIGHT_BIT, is_static_input_scheme=True)) is CPUInt8ScaledMMLinearKernel
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_default_dtype", lambda: torch.float32)
        assert chosen() is CPUInt8ScaledMMLinearKernel
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert chosen() is CPUInt8ScaledMMLinearKernel
    with monkeypatch.context() as patched:
        patched.setattr(vnni_linear, "cpu_flags", lambda: frozenset({"avx2"}))
        assert chosen() is CPUInt8ScaledMMLinearKernel
