"""The hand-labelled sources of the embedded data sets, and how a labelled string becomes a chat example."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import groupby

from adaptfleet.contracts.errors import DataError
from adaptfleet.core.data.examples import Example, Message


@dataclass(frozen=True)
class LabelledSource:
    """One XML file of labelled strings in a source package, and the table from its labels to JSON keys (one to one)."""

    package: str
    version: str
    sha256: str
    """Of the source package `PACKAGE-VERSION.tar.gz`."""
    member: str
    """The XML file's path below the package's top folder."""
    licence: str
    system: str
    """The system message of every example; short, for its tokens are trained on in each."""
    keys: dict[str, str]
    skip_single_words: bool = False

    @property
    def file_name(self) -> str:
        return f"{self.package}-{self.version}.tar.gz"


ADDRESSES = LabelledSource(
    package="usaddress",
    version="0.5.16",
    sha256="f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    member="training/labeled.xml",
    licence="MIT",
    system="Split the US address into its parts, as JSON.",
    keys={
        "AddressNumber": "number",
        "AddressNumberPrefix": "number_prefix",
        "AddressNumberSuffix": "number_suffix",
        "BuildingName": "building",
        "CornerOf": "corner",
        "CountryName": "country",
        "IntersectionSeparator": "and",
        "LandmarkName": "landmark",
        "NotAddress": "other",
        "OccupancyIdentifier": "unit",
        "OccupancyType": "unit_type",
        "PlaceName": "city",
        "Recipient": "recipient",
        "StateName": "state",
        "StreetName": "street",
        "StreetNamePostDirectional": "post_direction",
        "StreetNamePostModifier": "post_modifier",
        "StreetNamePostType": "street_type",
        "StreetNamePreDirectional": "pre_direction",
        "StreetNamePreModifier": "pre_modifier",
        "StreetNamePreType": "pre_type",
        "SubaddressIdentifier": "subaddress",
        "SubaddressType": "subaddress_type",
        "USPSBoxGroupID": "box_group",
        "USPSBoxGroupType": "box_group_type",
        "USPSBoxID": "box",
        "USPSBoxType": "box_type",
        "ZipCode": "zip",
        "ZipPlus4": "zip4",
    },
)

NAMES = LabelledSource(
    package="probablepeople",
    version="0.5.6",
    sha256="4ae95e77f9fa7dceb116538500ab48c81a91bf68eb652d45207b794b450f4392",
    member="name_data/labeled/person_labeled.xml",
    licence="MIT",
    system="Split the person's name into its parts, as JSON.",
    keys={
        "And": "and",
        "FirstInitial": "first_initial",
        "GivenName": "given",
        "LastInitial": "last_initial",
        "MiddleInitial": "middle_initial",
        "MiddleName": "middle",
        "Nickname": "nickname",
        "PrefixMarital": "prefix",
        "PrefixOther": "title",
        "SuffixGenerational": "generation",
        "SuffixOther": "suffix",
        "Surname": "surname",
    },
    # Half of the source is one word, labelled now given name, now surname: nothing in the string says which.
    skip_single_words=True,
)


@dataclass(frozen=True)
class LabelledExamples:
    """The usable examples in the source's order, and how many strings were left out and why."""

    examples: list[Example]
    num_strings: int
    num_duplicates: int
    num_contradictory: int
    """Strings labelled in two ways: all their copies are left out."""
    num_single_words: int


def read_labelled(xml: bytes, source: LabelledSource) -> LabelledExamples:
    """Examples of an XML file whose root's children are strings and whose grandchildren are labelled tokens.

    DataError names labels that the table of keys lacks.
    """
    root = ElementTree.fromstring(xml)
    unknown = sorted({token.tag for string in root for token in string} - set(source.keys))
    if unknown:
        raise DataError(f"{source.file_name}: {source.member} has labels without a JSON key: {', '.join(unknown)}.")
    by_key: dict[str, list[Example]] = {}
    num_single_words = 0
    for string in root:
        text = " ".join("".join(string.itertext()).split())
        if source.skip_single_words and " " not in text:
            num_single_words += 1
            continue
        tokens = [(source.keys[token.tag], " ".join((token.text or "").split())) for token in string]
        messages = (Message("system", source.system), Message("user", text), Message("assistant", answer(tokens)))
        by_key.setdefault(text.casefold(), []).append(Example(messages))
    contradictory = [copies for copies in by_key.values() if len({_folded_answer(copy) for copy in copies}) > 1]
    kept = [copies[0] for copies in by_key.values() if copies not in contradictory]
    num_contradictory = sum(len(copies) for copies in contradictory)
    num_duplicates = len(root) - num_single_words - num_contradictory - len(kept)
    return LabelledExamples(kept, len(root), num_duplicates, num_contradictory, num_single_words)


def answer(tokens: list[tuple[str, str]]) -> str:
    """Compact JSON of (key, token) pairs in the string's order.

    Keys stand in the order in which they first appear, so that the answer can be copied from left to right. Tokens of one key are joined by
    a space, also when other keys stand between them (`12th & Millard` has the street `12th Millard`). A comma or semicolon that ends a run
    of tokens separates it from the next and belongs to no value; one inside a run stays.
    """
    values: dict[str, list[str]] = {}
    for key, run in groupby(tokens, key=lambda token: token[0]):
        value = " ".join(token for _, token in run).rstrip(" ,;")
        if value:
            values.setdefault(key, []).append(value)
    return json.dumps({key: " ".join(runs) for key, runs in values.items()}, ensure_ascii=False, separators=(",", ":"))


def _folded_answer(example: Example) -> str:
    return (example.answer or "").casefold()
