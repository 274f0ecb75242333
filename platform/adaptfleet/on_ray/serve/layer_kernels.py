"""A part of the vLLM plug-in: norms and gated activations of a CPU in one call each.

vLLM's CPU build has kernels for both, as for GPUs, and does not take them: an RMS norm is ten operations of PyTorch there, a gated
activation four, which together are a tenth of the time of a small model's token. Where a graph is compiled the compiler fuses them, and
vLLM's own choice stands.

Expires when vLLM takes its kernels on a CPU itself; `tests/serve/test_layer_kernels.py` fails when it does.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm import ir
from vllm.config.compilation import CompilationMode
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROVIDER = "cpu_c"
"""By which vLLM's `ir_op_priority` knows these norms."""

LANES = 16
"""Of the kernels' vectors: they take multiples."""
_kernels: Any = torch.ops._C
current_platform.import_kernels()


def register() -> None:
    """Called by the plug-in where the platform is a CPU. Does nothing the second time."""
    if PROVIDER in ir.ops.rms_norm.impls:
        return
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes)(rms_norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_with_residual, inplace=True)(fused_add_rms_norm)
    upstream: Any = CpuPlatform
    upstream.get_default_ir_op_priority = staticmethod(priority)
    activation: Any = SiluAndMul
    activation.forward_cpu = silu_and_mul


def priority(vllm_config: "VllmConfig") -> IrOpPriorityConfig:
    """As the platform of NVIDIA's GPUs chooses: kernels where nothing is compiled."""
    compilation = vllm_config.compilation_config
    is_compiled = compilation.backend == "inductor" and compilation.mode != CompilationMode.NONE
    norms = ["native"] if is_compiled else [PROVIDER, "native"]
    return IrOpPriorityConfig.with_default(["native"], rms_norm=norms, fused_add_rms_norm=norms)


def _takes(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype and x.is_contiguous() and x.shape[-1] % LANES == 0


def _takes_with_residual(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> torch.Tensor:
    out = torch.empty_like(x)
    _kernels.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(
    x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Into `x` and `x_residual`."""
    _kernels.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def silu_and_mul(layer: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    """[..., 2 d] -> [..., d]."""
    width = x.shape[-1] // 2
    if not x.is_contiguous() or width % LANES:
        return layer.forward_native(x)
    out = x.new_empty(*x.shape[:-1], width)
    _kernels.silu_and_mul(out, x)
    return out
