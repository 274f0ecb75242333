"""A part of the vLLM plug-in: embeddings rounded to 8 or 4 bits on a CPU.

vLLM reads the rows of a rounded embedding with a Triton kernel, for GPUs alone. On a CPU the few rows of a step are gathered, unpacked and
scaled by ordinary operations, a few microseconds a token.

Expires when vLLM looks rounded embeddings up on a CPU itself; `tests/serve/test_rounded_embedding.py` fails when it does.
Shapes: N tokens, P 32-bit words of a row, V values of a row, G groups of them.
"""

from typing import Any

import torch


def register() -> None:
    """Called by the plug-in where the platform is a CPU. Does nothing the second time."""
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_embedding

    upstream: Any = compressed_tensors_embedding
    if upstream._dequant_gather_triton is looked_up:
        return
    upstream._dequant_gather_triton = looked_up
    upstream.CompressedTensorsEmbeddingWNA16Int.process_weights_after_loading = name_weight


def looked_up(ids_N: torch.Tensor, packed_VP: torch.Tensor, scale_VG: torch.Tensor, hidden: int, num_bits: int) -> torch.Tensor:
    """[N, hidden] in the scales' type: code x scale. Codes lie in 32-bit words, lowest bits first, each raised by 2^(bits-1)."""
    words_NP1 = packed_VP[ids_N].unsqueeze(-1)
    codes_NV = (words_NP1 >> torch.arange(0, 32, num_bits, dtype=torch.int32)) & (2**num_bits - 1)
    num_groups = scale_VG.shape[1]
    scale_NG1 = scale_VG[ids_N].float().unsqueeze(-1)
    values_NGV = (codes_NV.view(len(ids_N), num_groups, hidden // num_groups) - 2 ** (num_bits - 1)) * scale_NG1
    return values_NGV.view(len(ids_N), hidden).to(scale_VG.dtype)


def name_weight(_: Any, layer: torch.nn.Module) -> None:
    """vLLM's LoRA wrapper of an embedding asks for its `weight`, to learn on which device it lies."""
    layer.weight = layer.weight_packed
