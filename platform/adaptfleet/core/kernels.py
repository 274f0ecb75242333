"""Fused kernels for GPUs: Liger's norms, activations and rotary positions, where the package `liger-kernel` is installed."""

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils.import_utils import is_liger_kernel_available

_OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""The loss stays with `losses`, which never forms all logits."""


def fuse_kernels(model: PreTrainedModel) -> bool:
    """Lets the layers of a model that Liger knows use its kernels; True: they may. Others stay as they are."""
    if not torch.cuda.is_available() or not is_liger_kernel_available():
        return False
    apply_liger_kernel(model, _OURS)
    return True
