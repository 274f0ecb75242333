"""The stacked products against plain PyTorch, row by row."""

import random

import pytest
import torch
from vllm.lora.layers import LoRAMapping

from adaptfleet.on_ray.serve.batch_plan import BASE, LONG_RUN, segments
from adaptfleet.on_ray.serve.stacked_punica import StackedPunicaWrapper

MAX_RANK = 16
MAX_SLOTS = 4
HIDDEN = 64


def _wrapper(token_ids: list[int], sample_ids: list[int], slot_ids: list[int | None]) -> StackedPunicaWrapper:
    """`token_ids` are adapters' ids, 0 for the base, as vLLM's scheduler gives them."""
    wrapper = StackedPunicaWrapper(4096, 64, torch.device("cpu"))
    _map(wrapper, token_ids, sample_ids, slot_ids)
    return wrapper


def _map(wrapper: StackedPunicaWrapper, token_ids: list[int], sample_ids: list[int], slot_ids: list[int | None]) -> None:
    mapping = LoRAMapping(index_mapping=tuple(token_ids), prompt_mapping=tuple(sample_ids), is_prefill=True)
    wrapper.update_metadata(mapping, slot_ids, MAX_SLOTS + 1, 100)


def _weights(rng: random.Random, outputs: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Slots of random ranks, padded with zeros to MAX_RANK as vLLM pads; now and then a slot leaves a slice alone."""
    a = tuple(torch.zeros(MAX_SLOTS, 1, MAX_RANK, HIDDEN, dtype=dtype) for _ in outputs)
    b = tuple(torch.zeros(MAX_SLOTS, 1, width, MAX_RANK, dtype=dtype) for width in outputs)
    for slot in range(MAX_SLOTS):
        for i, width in enumerate(outputs):
            rank = rng.choice([0, 1, 3, 8, MAX_RANK])
            a[i][slot, 0, :rank] = torch.randn(rank, HIDDEN)
            b[i][slot, 0, :, :rank] = torch.randn(width, rank)
    return a, b


def _expected(y: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], slots: list[int]) -> torch.Tensor:
    """In float64, one row at a time."""
    result = y.double().clone()
    for row, slot in enumerate(slots):
        if slot == BASE:
            continue
        start = 0
        for a_SRK, b_SNR in zip(a, b, strict=True):
            width = b_SNR.shape[2]
            result[row, start : start + width] += b_SNR[slot, 0].double() @ (a_SRK[slot, 0].double() @ x[row].double())
            start += width
    return result


def _random_rows(rng: random.Random, slot_ids: list[int | None]) -> list[int]:
    """Adapters' ids in runs, short and long."""
    ids = [0] + [i for i in slot_ids if i is not None]
    rows: list[int] = []
    for _ in range(rng.randint(1, 8)):
        rows += [rng.choice(ids)] * rng.choice([1, 1, 1, 2, 5, LONG_RUN - 1, LONG_RUN, LONG_RUN + 9])
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(25))
def test_linear_equals_plain_torch(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    outputs = rng.choice([(40,), (24, 8, 8), (64, 64), (96, 32, 32), (600, 640)])  # of tiles and not; the last too wide to merge
    slot_ids: list[int | None] = rng.sample([7, 3, None, 11, 5], MAX_SLOTS)
    wrapper = _wrapper([0], [0], slot_ids)
    a, b = _weights(rng, outputs, dtype)
    for _ in range(4):
        ids = _random_rows(rng, slot_ids)
        _map(wrapper, ids, ids[:1], slot_ids)
        slots = [slot_ids.index(i) if i else BASE for i in ids]
        x, y = torch.randn(len(ids), HIDDEN, dtype=dtype), torch.randn(len(ids), sum(outputs), dtype=dtype)
        expected, base = _expected(y, x, a, b, slots), y.clone()
        wrapper.add_lora_linear(y, x, a, b, 1.0, outputs)
        # bfloat16 keeps 8 bits: h and y are rounded once each, at a size of about |h| * sqrt(rank).
        tolerance = 1e-4 if dtype == torch.float32 else 0.02 * max(1.0, expected.abs().max().item())
        assert (y.double() - expected).abs().max().item() < tolerance
        rows_of_base = [row for row, slot in enumerate(slots) if slot == BASE]
        assert torch.equal(y[rows_of_base], base[rows_of_base]), "a row of the base changed"


def test_new_weights_in_a_slot_are_used() -> None:
    rng = random.Random(0)
    wrapper = _wrapper([7, 0, 3], [7, 0, 3], [7, 3, None, None])
    a, b = _weights(rng, (40,), torch.float32)
    x = torch.randn(3, HIDDEN)
    wrapper.add_lora_linear(torch.zeros(3, 40), x, a, b, 1.0, (40,))
    a[0][1] = torch.randn(1, MAX_RANK, HIDDEN)
    b[0][1] = torch.randn(1, 40, MAX_RANK)
    wrapper.slot_changed(1)
    y = torch.zeros(3, 40)
    wrapper.add_lora_linear(y, x, a, b, 1.0, (40,))
    assert torch.allclose(y, _expected(torch.zeros(3, 40), x, a, b, [0, BASE, 1]).float(), atol=1e-4)


def test_padded_rows_are_the_bases() -> None:
    wrapper = _wrapper([7, 3], [7, 3], [7, 3, None, None])
    a, b = _weights(random.Random(1), (40,), torch.float32)
    x, y = torch.randn(5, HIDDEN), torch.zeros(5, 40)
    wrapper.add_lora_linear(y, x, a, b, 1.0, (40,))
    assert torch.allclose(y, _expected(torch.zeros(5, 40), x, a, b, [0, 1, BASE, BASE, BASE]).float(), atol=1e-4)


@pytest.mark.parametrize("ids", [[7, 0, 3, 7, 0], [0, 0], [3] * (LONG_RUN + 2) + [0, 7]])
def test_embedding_equals_plain_torch(ids: list[int]) -> None:
    slot_ids: list[int | None] = [7, 3, None, None]
    wrapper = _wrapper(ids, ids[:1], slot_ids)
    _, (b,) = _weights(random.Random(2), (40,), torch.float32)
    looked_up, y = torch.randn(len(ids), MAX_RANK), torch.randn(len(ids), 40)
    expected = y.clone()
    for row, adapter in enumerate(ids):
        if adapter:
            expected[row] += b[slot_ids.index(adapter), 0] @ looked_up[row]
    wrapper.add_lora_embedding(y, looked_up, b)
    assert torch.allclose(y, expected, atol=1e-4)


def test_logits_equal_plain_torch() -> None:
    """The rows are the batch's requests, not its tokens, and the adapter's vocabulary may be padded further than the head's."""
    slot_ids: list[int | None] = [7, 3, None, None]
    wrapper = _wrapper([7] * 5 + [0] * 3 + [3], [7, 0, 3], slot_ids)
    (a,), (b,) = _weights(random.Random(3), (48,), torch.float32)
    x, y = torch.randn(3, HIDDEN), torch.randn(3, 40)
    expected = _expected(y, x, (a,), (b[:, :, :40],), [0, BASE, 1]).float()
    wrapper.add_lora_logits(y, x, a, b, 1.0)
    assert torch.allclose(y, expected, atol=1e-4)


def test_prompt_logits_of_unknown_rows() -> None:
    """Harmless while no adapter changes the output head, refused when one does."""
    wrapper = _wrapper([7, 0], [7, 0], [7, None, None, None])
    zero_a, zero_b = torch.zeros(MAX_SLOTS, 1, MAX_RANK, HIDDEN), torch.zeros(MAX_SLOTS, 1, 40, MAX_RANK)
    y = torch.randn(9, 40)
    before = y.clone()
    wrapper.add_lora_logits(y, torch.randn(9, HIDDEN), zero_a, zero_b, 1.0)
    assert torch.equal(y, before)
    with pytest.raises(NotImplementedError, match="prompt_logprobs"):
        wrapper.add_lora_logits(y, torch.randn(9, HIDDEN), zero_a + 1, zero_b.clone() + 1, 1.0)


def test_sharded_halves_equal_the_whole() -> None:
    """Fully sharded adapters call shrink and expand apart."""
    ids, slot_ids = [7, 0, 3, 3, 0], [7, 3, None, None]
    wrapper = _wrapper(ids, ids, slot_ids)
    a, b = _weights(random.Random(4), (24, 8), torch.float32)
    x, y = torch.randn(5, HIDDEN), torch.randn(5, 32)
    expected = _expected(y, x, a, b, [0, BASE, 1, 1, BASE]).float()
    hidden = torch.full((2, 5, MAX_RANK), 9.0)
    wrapper.add_shrink(hidden, x, a, 1.0)
    wrapper.add_expand(y, hidden, b, (24, 8))
    assert torch.allclose(y, expected, atol=1e-4)


def test_the_compiled_form_equals_the_eager_one() -> None:
    """A compiled graph calls one operator with the wrapper's number, so that no batch is answered with an earlier one's rows."""
    slot_ids: list[int | None] = [7, 3, None, None]
    wrapper = _wrapper([7, 0, 3], [7], slot_ids)
    a, b = _weights(random.Random(5), (40,), torch.float32)

    @torch.compile(backend="eager", fullgraph=True)
    def layer(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        wrapper.add_lora_linear(y, x, a, b, 1.0, (40,))
        return y

    for ids in ([7, 0, 3], [0, 0, 0], [3, 3, 7]):
        _map(wrapper, ids, ids[:1], slot_ids)
        x, y = torch.randn(3, HIDDEN), torch.randn(3, 40)
        expected = _expected(y, x, a, b, [slot_ids.index(i) if i else BASE for i in ids]).float()
        assert torch.allclose(layer(y, x), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_segments_cover_each_adapter_row_once(seed: int) -> None:
    rng = random.Random(seed)
    slots = [i - 1 for i in _random_rows(rng, [1, 2, 3, 4])]
    covered: set[int] = set()
    for segment in segments(slots, frozenset({0, 3})):
        rows = set(range(segment.start, segment.stop))
        assert not rows & covered
        covered |= rows
        assert {slots[row] for row in rows} - {BASE} <= set(segment.slots)
    assert {row for row, slot in enumerate(slots) if slot != BASE} <= covered


def test_a_batch_of_the_base_alone_has_no_segments() -> None:
    assert segments([BASE] * 100, frozenset({0, 1})) == []
