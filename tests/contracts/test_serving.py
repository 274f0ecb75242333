"""What a serving spec says of its bases."""

import pytest

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.serving import ServingSpec

TWO = """
served_name: tiny
max_request_bytes: 5000
auth: none
embeddings: {}
pinned: [streets]
more_bases:
  - {model: {source: "small@2", dtype: bfloat16}, replicas: {min: 0, max: 3}, pinned: [numbers], engine_args: {seed: 1}}
"""


def test_one_base_is_a_spec_as_it_was() -> None:
    spec = parse_contract(ServingSpec, "served_name: tiny\npinned: [streets]\nreplicas: {min: 0, max: 2}")
    assert spec.bases() == (spec,)
    assert (spec.base_id(), spec.pinned, spec.min_replicas(), spec.max_replicas()) == ("tiny", ("streets",), 0, 2)


def test_each_base_is_a_spec_of_its_own() -> None:
    first, second = parse_contract(ServingSpec, TWO).bases()
    assert (first.base_id(), second.base_id()) == ("tiny", "small")
    assert first == parse_contract(ServingSpec, TWO).model_copy(update={"more_bases": ()})
    assert (second.pinned, second.engine_args, second.max_replicas()) == (("numbers",), {"seed": 1}, 3)
    assert (second.auth, second.max_request_bytes) == ("none", 5000), "the endpoint's own settings hold for all"
    assert (second.served_name, second.embeddings, second.more_bases) == (None, None, ())


def test_a_further_base_has_no_door_of_its_own() -> None:
    with pytest.raises(ContractError, match=r"more_bases\.0\.auth: unknown key"):
        parse_contract(ServingSpec, "more_bases: [{served_name: x, auth: none}]")


def test_one_id_is_one_bases_and_one_pin_one_adapters() -> None:
    with pytest.raises(ContractError) as raised:
        parse_contract(
            ServingSpec, "pinned: [a]\nmore_bases: [{served_name: x}, {served_name: x, pinned: [a]}, {model: {source: /b/SmolLM2-135M}}]"
        )
    message = str(raised.value)
    for said in ("2 bases have the id 'x'", "2 bases have the id 'smollm2-135m'", "served_name", "'a' is pinned for 2 bases"):
        assert said in message
    with pytest.raises(ContractError, match=r"more_bases\.1: pinned has 1 adapters and max_loras is 1"):
        parse_contract(ServingSpec, "more_bases: [{served_name: x}, {served_name: y, pinned: [a], max_loras: 1}]")
