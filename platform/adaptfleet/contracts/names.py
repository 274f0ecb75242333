"""Names of artifacts, and how one is referred to: `name`, `name@3`, `name@canary`."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from adaptfleet.contracts.errors import ContractError

DEFAULT_ALIAS = "prod"
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")
_RULE = "1 to 64 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit, without '..'"


def check_name(name: str) -> str:
    """The name itself, or ContractError. A safe name can be part of a path, a URL and a metric label."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ContractError(f"{name!r} is no safe name. A name is {_RULE}.")
    return name


def check_alias(alias: str) -> str:
    """An alias is a name that is not a number: numbers are versions."""
    if alias.isdigit():
        raise ContractError(f"{alias!r} is no alias: numbers are versions. An alias is a word, such as 'prod' or 'canary'.")
    return check_name(alias)


def _for_pydantic(value: str) -> str:
    try:
        return check_name(value)
    except ContractError as error:
        raise ValueError(str(error)) from None


def _alias_for_pydantic(value: str) -> str:
    try:
        return check_alias(value)
    except ContractError as error:
        raise ValueError(str(error)) from None


SafeName = Annotated[str, AfterValidator(_for_pydantic)]
SafeAlias = Annotated[str, AfterValidator(_alias_for_pydantic)]


def near(wanted: str, known: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'rank'?`, or the empty string."""
    matches = difflib.get_close_matches(wanted, list(known), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(repr(m) for m in matches)}?" if matches else ""


@dataclass(frozen=True)
class Reference:
    """One version of an artifact, by number or by alias."""

    name: str
    version: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """`name` is the alias `prod` of it, `name@3` its version 3, `name@canary` its alias `canary`."""
        name, at, selector = text.partition("@")
        check_name(name)
        if not at:
            return cls(name, alias=DEFAULT_ALIAS)
        if selector.isdecimal() and selector.isascii() and len(selector) < 10:
            if int(selector) < 1:
                raise ContractError(f"{text!r}: versions begin at 1.")
            return cls(name, version=int(selector))
        return cls(name, alias=check_alias(selector))

    def __str__(self) -> str:
        return f"{self.name}@{self.version if self.version is not None else self.alias}"
