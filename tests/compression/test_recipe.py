"""Recipes that cannot be are refused with what is allowed, all at once, before anything is imported or computed."""

import pytest
import yaml

from adaptfleet.contracts.compression import CompressJob
from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract

QUANTIZE, PRUNE, RECOVER = {"kind": "quantize"}, {"kind": "prune", "mlp_width": 0.2}, {"kind": "recover"}
TUNE = {"kind": "tune"}
PUBLISH = {"kind": "publish", "name": "small"}


def recipe(*steps: object, **keys: object) -> CompressJob:
    return parse_contract(CompressJob, yaml.safe_dump({"steps": list(steps), **keys}))


@pytest.mark.parametrize(
    "steps",
    [
        (QUANTIZE,),
        (PRUNE,),
        (PRUNE, QUANTIZE, PUBLISH),
        (PRUNE, RECOVER, "merge"),
        (PRUNE, RECOVER, "merge", QUANTIZE, PUBLISH),
        (QUANTIZE, RECOVER, PUBLISH),
        (PRUNE, RECOVER, "merge", QUANTIZE, RECOVER, PUBLISH),
        (QUANTIZE, TUNE, PUBLISH),
        (PRUNE, RECOVER, "merge", QUANTIZE, TUNE, RECOVER, PUBLISH),
        ({"kind": "prune"}, PUBLISH),  # ratio 0: a search must hold it
    ],
    ids=lambda steps: "-".join(s if isinstance(s, str) else s["kind"] for s in steps),
)
def test_legal_orders(steps: tuple[object, ...]) -> None:
    assert len(recipe(*steps).steps) == len(steps)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (QUANTIZE, PRUNE),
            r"the order is quantize, prune; allowed is prune, recover, merge, quantize, tune, recover, publish, each",
        ),
        ((PUBLISH, QUANTIZE), r"the order is publish, quantize"),
        ((QUANTIZE, QUANTIZE), r"the order is quantize, quantize"),
        ((PRUNE, RECOVER, RECOVER, "merge"), r"the order is prune, recover, recover, merge"),
        ((QUANTIZE, RECOVER, "merge"), r"the order is quantize, recover, merge"),
        ((RECOVER, "merge", QUANTIZE), r"recover has nothing to heal: write prune before it"),
        ((PRUNE, RECOVER, QUANTIZE), r"write merge after it"),
        ((PRUNE, TUNE), r"tune has no rounded layer to heal: write quantize before it"),
        ((QUANTIZE, RECOVER, TUNE), r"the order is quantize, recover, tune"),
        ((PRUNE, "merge"), r"merge has no adapter to fold in"),
        ((PUBLISH,), r"nothing is compressed: write prune or quantize"),
        (("merge", PUBLISH), r"merge has no adapter to fold in.*; nothing is compressed"),
        ((), r"at least 1 item"),
    ],
)
def test_illegal_orders(steps: tuple[object, ...], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        recipe(*steps)


def rounding(**scheme: object) -> dict[str, object]:
    return {"kind": "quantize", "scheme": scheme}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bits_that_a_cpu_cannot_serve(bits: int) -> None:
    scheme = rounding(kind="weight-only", bits=bits)
    with pytest.raises(ContractError, match=rf"bits is {bits}, but vLLM's CPU kernel takes 4-bit weights alone; allowed: bits 4, or"):
        recipe(scheme)
    measured = recipe(scheme, quality_only=True, proof={"engine": False})
    assert measured.quality_only
    with pytest.raises(ContractError, match="nothing is published"):
        recipe(scheme, PUBLISH, quality_only=True, proof={"engine": False})
    with pytest.raises(ContractError, match=r"proof\.engine is true"):
        recipe(scheme, quality_only=True)


@pytest.mark.parametrize(
    ("target", "scheme", "served"),
    [
        ("hopper", {"kind": "weight-only", "bits": 8}, True),
        ("hopper", {"kind": "weight-only", "bits": 3}, False),
        ("blackwell", {"kind": "w8a8"}, False),
        ("blackwell", {"kind": "fp8"}, True),
        ("ampere", {"kind": "w8a8", "activations": "static"}, True),
    ],
)
def test_targets(target: str, scheme: dict[str, object], served: bool) -> None:
    if served:
        recipe(rounding(**scheme), target=target)
    else:
        with pytest.raises(ContractError, match=rf"{target}.*quality_only"):
            recipe(rounding(**scheme), target=target)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (rounding(kind="mixed"), "give one of max_bytes_ratio and max_bytes"),
        (rounding(kind="mixed", max_bytes=1, max_bytes_ratio=0.5), "give one of"),
        (rounding(kind="weight-only", bits=5), "Input should be 2, 3, 4 or 8"),
        (rounding(kind="w4a16"), r"'w4a16' is not known.*w8a8"),
        ({"kind": "quantize", "embedding": "w4"}, "round the head too"),
        ({"kind": "prune", "mlp_width": 1.0}, "less than 1"),
        ({"kind": "prune", "importance": "random"}, "'activation', 'taylor' or 'magnitude'"),
    ],
)
def test_values(step: dict[str, object], message: str) -> None:
    with pytest.raises(ContractError, match=message):
        recipe(step)


@pytest.mark.parametrize(
    ("steps", "takes"),
    [
        ((QUANTIZE, TUNE), True),
        ((rounding(kind="weight-only", algorithm="gptq"),), True),
        ((rounding(kind="w8a8", smoothquant=0.5),), False),
        ((rounding(kind="weight-only", algorithm="awq"),), False),
        ((PRUNE, QUANTIZE), False),
    ],
)
def test_who_takes_adapters_of_the_parent(steps: tuple[object, ...], takes: bool) -> None:
    """Smoothing moves scales out of a layer's inputs: an adapter would read other inputs than it was trained on."""
    assert recipe(*steps).takes_parents_adapters() == takes
    if takes:
        recipe(*steps, proof={"adapters": ["task"]})
    else:
        with pytest.raises(ContractError, match=r"proof\.adapters names task, but the result takes no adapters"):
            recipe(*steps, proof={"adapters": ["task"]})


def test_equal_recipes_have_equal_fingerprints() -> None:
    assert recipe(PRUNE, RECOVER, "merge").fingerprint() == recipe(PRUNE, RECOVER, {"kind": "merge"}).fingerprint()
    assert recipe(PRUNE).fingerprint() != recipe({"kind": "prune", "mlp_width": 0.3}).fingerprint()
