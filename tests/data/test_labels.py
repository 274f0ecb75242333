import json

import pytest

from adaptfleet.contracts.data import EMBEDDED_DATASETS
from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.embedded import SOURCES
from adaptfleet.core.data.labels import ADDRESSES, NAMES, answer, read_labelled


def test_every_embedded_name_has_a_source() -> None:
    assert tuple(SOURCES) == EMBEDDED_DATASETS


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_labels_and_keys_stand_for_each_other_one_to_one(source) -> None:  # type: ignore[no-untyped-def]
    assert len(set(source.keys.values())) == len(source.keys)
    assert all((key == key.lower() and key.isidentifier()) or key == "and" for key in source.keys.values())


def test_tokens_of_a_key_are_joined_and_separators_fall_away() -> None:
    tokens = [("number", "12"), ("street", "Martin"), ("street", "King,"), ("city", "St."), ("city", "Paul,;"), ("zip", "55101")]
    assert answer(tokens) == '{"number":"12","street":"Martin King","city":"St. Paul","zip":"55101"}'


def test_a_key_that_comes_again_keeps_its_first_place() -> None:
    assert answer([("street", "12th"), ("and", "&"), ("street", "Millard")]) == '{"street":"12th Millard","and":"&"}'


def test_a_comma_inside_a_run_stays_and_nothing_but_a_comma_is_no_value() -> None:
    assert json.loads(answer([("recipient", "Smith,"), ("recipient", "Jones,"), ("city", ","), ("zip", "1")])) == {
        "recipient": "Smith, Jones",
        "zip": "1",
    }


def test_duplicates_contradictions_and_single_words_are_counted_and_left_out() -> None:
    xml = b"""<NameCollection>
      <Name><GivenName>Ann</GivenName> <Surname>Lee</Surname></Name>
      <Name><GivenName>ANN</GivenName>  <Surname>LEE</Surname></Name>
      <Name><GivenName>Bo</GivenName> <Surname>Ek</Surname></Name>
      <Name><Surname>Bo</Surname> <GivenName>Ek</GivenName></Name>
      <Name><Surname>Solo</Surname></Name>
    </NameCollection>"""
    read = read_labelled(xml, NAMES)
    assert [(e.prompt[-1].content, e.answer) for e in read.examples] == [("Ann Lee", '{"given":"Ann","surname":"Lee"}')]
    assert (read.num_strings, read.num_duplicates, read.num_contradictory, read.num_single_words) == (5, 1, 2, 1)


def test_labels_without_a_key_are_all_named() -> None:
    with pytest.raises(DataError, match="labels without a JSON key: New, Other"):
        read_labelled(b"<A><S><Other>x</Other> <New>y</New></S></A>", ADDRESSES)
