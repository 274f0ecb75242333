"""Offenders for one error message: all are counted, the first are shown."""

from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_SHOWN = 50


@dataclass
class Listing:
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(line)

    def extend(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.add(line)

    def merge(self, later: "Listing") -> None:
        self.shown += later.shown[: MAX_SHOWN - len(self.shown)]
        self.count += later.count

    def text(self, fact: str) -> str:
        rest = [f"  ... and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        return "\n".join([fact, *(f"  {line}" for line in self.shown), *rest])


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
