"""A point before anything of it is made. Light: trials hold it without a framework."""

from dataclasses import dataclass

TO_NEAREST = "rounded to nearest"
"""A trial's stage before a slow rounding."""


@dataclass(frozen=True)
class PlannedStep:
    name: str
    """Kind and key: its folder, its cost and its lock are named so."""
    number: int
    """Of the step in the job."""
    before: str | None
    """The name of the step whose checkpoint it begins with. None: the parent."""
    run: str | None = None
    """Recoveries: the training's run."""

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def key(self) -> str:
        return self.name.partition("-")[2]


@dataclass(frozen=True)
class Plan:
    steps: list[PlannedStep]
    num_bytes: int
    """Of the result's weights, known to a percent from its shapes."""
    dense_bytes: int
    """Before rounding."""
    parent_bytes: int

    @property
    def checkpoint(self) -> str | None:
        """The step that leaves the result. None: the parent is the result."""
        made = [step.name for step in self.steps if step.kind != "recover"]
        return made[-1] if made else None
