"""Who trained what in a population, and from whose checkpoint: `population/memberN.json` in the sweep's folder, a list of legs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adaptfleet.contracts.search import Point
from adaptfleet.on_ray.tune.sweep_folder import SweepFolder

_KEPT_LEGS = 2
"""Checkpoints of each member that others may still begin with: those of its last two legs."""


@dataclass(frozen=True)
class Leg:
    """What a member trained between two comparisons."""

    name: str
    """Of the step's folder: equal legs are trained once."""
    point: Point
    """The settings it was trained with."""
    begins: int
    ends: int
    """Optimizer steps."""
    before: str | None = None
    """The name of the leg whose checkpoint it began with. None: it began at step 0."""
    taken_from: int | None = None
    """The member that made that leg, where it is another one."""
    eval_loss: float | None = None
    """Held out, at its end. None: it is not done; infinite: it diverged, and left no checkpoint."""
    is_last: bool = False
    """The training ends here."""
    reason: str = ""
    """Why it diverged."""

    @property
    def is_done(self) -> bool:
        return self.eval_loss is not None


class Lineage:
    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        (folder.path / "population").mkdir(exist_ok=True)

    def of(self, member: int) -> list[Leg]:
        """A member's own legs in their order; the last may not be done."""
        return [Leg(**leg) for leg in self._folder.read_json(f"population/member{member}.json") or []]

    def write(self, member: int, legs: Sequence[Leg]) -> None:
        self._folder.write_json(f"population/member{member}.json", [asdict(leg) for leg in legs])

    def members(self) -> list[int]:
        names = [file.stem for file in (self._folder.path / "population").glob("member*.json")]
        return sorted(int(name.removeprefix("member")) for name in names)

    def named(self, name: str) -> Leg:
        """A done leg, whoever's it is. KeyError: there is none."""
        found = {leg.name: leg for member in self.members() for leg in self.of(member) if leg.is_done}
        return found[name]

    def descent(self, last: Leg) -> list[Leg]:
        """The legs that a leg's weights went through, the first from step 0 on."""
        found = [last]
        while found[0].before is not None:
            found.insert(0, self.named(found[0].before))
        return found

    def checkpoint(self, leg: Leg) -> Path:
        return self._folder.steps / leg.name / "checkpoint"

    def trim(self, is_over: bool = False) -> None:
        """Removes checkpoints that no member will begin with. `is_over`: those alone are kept that an unfinished leg began with."""
        kept: set[str] = set()
        for member in self.members():
            legs = self.of(member)
            kept |= {leg.before for leg in legs[-1:] if not leg.is_done and leg.before}
            kept |= {leg.name for leg in legs[-_KEPT_LEGS:] if not is_over or not legs[-1].is_last}
        for folder in self._folder.steps.glob("segment-*"):
            if folder.name not in kept:
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def schedule(descent: Sequence[Leg]) -> list[tuple[int, Point]]:
    """From which step on which settings were used."""
    found: list[tuple[int, Point]] = []
    for leg in descent:
        if not found or found[-1][1] != leg.point:
            found.append((leg.begins, leg.point))
    return found


def read_told(folder: Path) -> tuple[int, str]:
    """What a Tune checkpoint of a member holds: whose it is, and the name of its last leg."""
    told = json.loads((folder / "leg.json").read_text())
    return told["member"], told["leg"]


def write_told(folder: Path, member: int, leg: Leg) -> None:
    (folder / "leg.json").write_text(json.dumps({"member": member, "leg": leg.name}))
