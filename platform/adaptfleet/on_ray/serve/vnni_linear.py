"""A part of the vLLM plug-in: layers of 4 and of 8 bits at speed on a CPU with AVX512-VNNI and without AMX.

vLLM has operations for both that round the activations themselves, and asks for AMX before it takes them. Elsewhere it widens weights of
4 bits to float32, which decodes at half the speed of bfloat16 ones, and gives those of 8 bits to oneDNN in three calls a layer, which cost
more than the product of one row. The same operations run on AVX512-VNNI. VLLM_CPU_INT4_W4A8=0 keeps the activations of 4-bit layers whole
on both kinds of CPU.

Expires when vLLM asks for AVX512-VNNI itself; `tests/serve/test_vnni_linear.py` fails when it does.
"""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.scaled_mm import Int8ScaledMMLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
from vllm.platforms.interface import PlatformEnum
from vllm.utils.torch_utils import direct_register_custom_op

from adaptfleet.core.models.device import cpu_flags

OUTPUTS = 32
"""Outputs that the operation of 8 bits takes at a time."""

BLOCK = 128
"""Inputs that the operation of 4 bits takes at a time; fewer where a group has fewer."""

ROWS, MOST_ROWS = 4, 32
"""Up to so many rows it multiplies while it unpacks; for more it unpacks first, which does not pay below the other number."""
_LIBRARY = torch.library.Library("adaptfleet", "FRAGMENT")


def register() -> None:
    """Called by the plug-in where the platform is a CPU. Does nothing the second time."""
    four_bits: list[Any] = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    eight_bits: list[Any] = linear._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    if VnniFourBitKernel not in four_bits:
        four_bits.insert(four_bits.index(CPUWNA16LinearKernel), VnniFourBitKernel)
        eight_bits.insert(eight_bits.index(CPUInt8ScaledMMLinearKernel), VnniEightBitKernel)


def _reason_against() -> str | None:
    if torch.cpu._is_amx_tile_supported() or "avx512_vnni" not in cpu_flags():
        return "it is for CPUs with AVX512-VNNI and without AMX"
    return None


def _told_of_amx() -> Any:
    return mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=True)


class VnniEightBitKernel(CPUInt8ScaledMMLinearKernel):
    """vLLM's own kernel, told that there is AMX while it chooses how to lay out the weights: for activations rounded row by row, layers
    whose sizes its operation takes; all others go to oneDNN as before."""

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := _reason_against():
            return False, reason
        if c.is_static_input_scheme:
            return False, "it rounds each row of activations by its own scale"
        if torch.get_default_dtype() not in (torch.bfloat16, torch.float16):
            return False, "it takes bfloat16 and float16 activations"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight_NK = getattr(layer, self.layer_param_names[0])
        # vLLM looks at the inputs, and of the outputs asks for a multiple of half a block
        with nullcontext() if len(weight_NK) % OUTPUTS else _told_of_amx():
            super().process_weights_after_loading(layer)


class VnniFourBitKernel(CPUWNA16LinearKernel):
    """The same of 4 bits."""

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if reason := _reason_against():
            return False, reason
        if c.act_type != torch.bfloat16 or not envs.VLLM_CPU_INT4_W4A8:
            return False, "it takes bfloat16 activations, which it may round to 8 bits"
        inputs = c.partition_weight_shape[0]
        block = min(BLOCK, inputs if c.group_size == -1 else c.group_size)
        if inputs % block:
            return False, f"it takes {block} inputs at a time, which do not divide {inputs}"
        return super().can_implement(c)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        with _told_of_amx():
            super().process_weights_after_loading(layer)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight, scale, zero = self._get_weight_params(layer)
        return torch.ops.adaptfleet.four_bit_linear(x, weight, zero, scale, bias)


def _four_bit_linear(
    x: torch.Tensor, weight: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One operation, as a compiled graph must not depend on the number of rows."""
    rows = x.reshape(-1, x.shape[-1])
    parts = rows.split(ROWS if len(rows) <= MOST_ROWS else len(rows))
    found = [vllm_ops.int4_scaled_mm_cpu(part, weight, zero, scale, bias) for part in parts]
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole.view(*x.shape[:-1], whole.shape[-1])


def _four_bit_linear_shape(
    x: torch.Tensor, weight: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scale.shape[0] * scale.shape[-1])


direct_register_custom_op("four_bit_linear", _four_bit_linear, fake_impl=_four_bit_linear_shape, target_lib=_LIBRARY, dispatch_key="CPU")
