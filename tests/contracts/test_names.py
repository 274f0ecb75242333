"""Names that are safe in a path, a URL and a metric label, and references to them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptfleet.contracts.errors import ContractError
from adaptfleet.contracts.names import Reference, check_alias, check_name, near

SAFE = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?", fullmatch=True).filter(lambda name: ".." not in name)
_SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ["a", "address-json", "v1.2_x", "0", "a" * 64])
def test_safe_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../../x", "/x", "a/b", "a\\b", "a..b", ".a", "a.", "-a", "A", "é", "a b", "a\n", "a\0", "a@b", "a%2f", "a" * 65, "٣"],
)
def test_unsafe_names(name: str) -> None:
    with pytest.raises(ContractError, match="no safe name"):
        check_name(name)


@_SETTINGS
@given(st.text(max_size=70))
def test_a_name_is_safe_or_refused(text: str) -> None:
    try:
        name = check_name(text)
    except ContractError:
        return
    assert ".." not in name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") and 1 <= len(name) <= 64


@_SETTINGS
@given(st.text(max_size=40) | st.tuples(SAFE, st.text(max_size=12)).map("@".join))
def test_a_reference_is_one_thing_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except ContractError:
        return
    assert (reference.version is None) != (reference.alias is None)
    assert Reference.parse(str(reference)) == reference


@_SETTINGS
@given(SAFE, st.integers(1, 10**8))
def test_references_return(name: str, version: int) -> None:
    assert Reference.parse(f"{name}@{version}") == Reference(name, version=version)
    assert Reference.parse(name) == Reference(name, alias="prod")


@pytest.mark.parametrize("text", ["a@", "a@0", "a@-1", "a@1@2", "a@../b", "@1", "a@1.5.", "a@" + "9" * 20, "a@٣", "a@²"])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(ContractError):
        Reference.parse(text)


def test_an_alias_is_no_number() -> None:
    assert check_alias("canary") == "canary"
    with pytest.raises(ContractError, match="numbers are versions"):
        check_alias("3")


def test_near_matches() -> None:
    assert near("adress-json", ["address-json", "names"]) == " Did you mean 'address-json'?"
    assert near("zzz", ["address-json"]) == ""
