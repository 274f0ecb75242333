"""Fails once vLLM no longer needs the plug-in's correction: then drop the plug-in, or keep it for its speed alone and say so."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.lora import utils as lora_utils
from vllm.lora.layers import utils
from vllm.lora.ops.torch_ops import lora_ops


def test_stock_vllm_still_gives_rows_of_the_base_the_last_slots_adapter() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 1, 8, 16), torch.randn(3, 1, 24, 8)
    x, slots = torch.randn(2, 16), torch.tensor([0, -1])
    hidden, y = torch.zeros(2, 8), torch.zeros(2, 24)
    lora_ops.bgmv_shrink(x, a, hidden, slots, 1.0)
    lora_ops.bgmv_expand(hidden, b, y, slots, True)
    last_slots_answer = b[2, 0] @ (a[2, 0] @ x[1])
    assert torch.allclose(y[1], last_slots_answer, atol=1e-4), "vLLM leaves rows of slot -1 alone now: the plug-in may have expired"


def test_stock_vllm_still_takes_no_adapter_over_a_layer_whose_weight_onednn_keeps() -> None:
    """An 8-bit layer on a CPU without AMX; the endpoint's own such layers are tested in tests/serve/several."""
    layer: Any = SimpleNamespace(weight=None)
    with pytest.raises(AttributeError):
        utils._get_lora_device(layer)
    head: Any = SimpleNamespace(weight=None, embedding_dim=8, get_sharded_to_full_mapping=None)
    with pytest.raises(AttributeError):
        lora_utils.from_layer_logits_processor(layer, head, 1, layer)
