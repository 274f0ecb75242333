"""Attention example by example gives what attention under a mask gives, alone and in each architecture."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812  the name everyone knows

from adaptfleet.core.packed_forward import hidden_states
from adaptfleet.core.segment_attention import LONGEST_SQUARE, segment_attention, segment_mask, takes_segments, use_segment_attention
from tests.training.conftest import CONFIGS, make_model
from tests.training.test_packed_forward import packed, rows


def test_output_and_gradients_equal_those_under_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (7, LONGEST_SQUARE + 30, 1, 90)
    ids_T = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    ids_BT = torch.stack([ids_T, ids_T.flip(0)])
    inputs = [torch.randn(2, 3, len(ids_T), 16, generator=generator, requires_grad=True) for _ in range(3)]
    weights = torch.randn(2, 3, len(ids_T), 16, generator=generator)
    ours = segment_attention(*inputs, ids_BT, 0.3)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=segment_mask(ids_BT, torch.float32), scale=0.3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    for mine, reference in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_takes_segments(architecture: str) -> None:
    model = make_model(architecture)
    batch = packed(rows(2), 64)
    with torch.no_grad():
        masked_BTD = hidden_states(model, batch)
        use_segment_attention(model)
        assert takes_segments(model)
        ours_BTD = hidden_states(model, batch)
    torch.testing.assert_close(ours_BTD, masked_BTD, rtol=0, atol=2e-5)
