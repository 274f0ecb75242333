"""The gate before a promotion: what a version's metrics must be."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adaptfleet.contracts.artifacts import Manifest
from adaptfleet.contracts.errors import ContractError, PublishError
from adaptfleet.contracts.names import near
from adaptfleet.store.registry import Registry

OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_REQUIREMENT = re.compile(r"\s*([A-Za-z][A-Za-z0-9_./@-]*)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Requirement:
    metric: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Requirement":
        """Of the form `exact_match>=0.8`. ContractError otherwise."""
        match = _REQUIREMENT.fullmatch(text)
        if not match:
            raise ContractError(
                f"--require {text!r} is not of the form METRIC SIGN NUMBER. The signs are {', '.join(OPERATORS)}; "
                f"write it in quotes, such as --require 'exact_match>=0.8'."
            )
        return cls(match[1], match[2], float(match[3]))

    def holds(self, value: float) -> bool:
        return OPERATORS[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Fact:
    """A metric's value and where it is known from."""

    value: float
    source: str


def known_facts(registry: Registry, manifest: Manifest) -> dict[str, Fact]:
    """Metrics of the newest recorded evaluation, and of the manifest where the evaluation lacks one."""
    facts = {name: Fact(value, "measured when it was made") for name, value in manifest.metrics.items()}
    records = registry.evaluations(manifest.reference)
    if records:
        newest = records[-1]
        told = f"evaluated {newest.evaluated_at:%Y-%m-%d %H:%M} on {newest.num_rows} rows of {newest.data}"
        for name, estimate in newest.metrics.items():
            facts[name] = Fact(estimate.value, f"{told}, 95% interval {estimate.low:.4g} to {estimate.high:.4g}")
    return facts


def check_requirements(registry: Registry, manifest: Manifest, requirements: Sequence[Requirement]) -> None:
    """PublishError lists every requirement that the version does not meet, and every metric that is not known of it."""
    facts = known_facts(registry, manifest)
    offenders = []
    for required in requirements:
        fact = facts.get(required.metric)
        if fact is None:
            known = ", ".join(sorted(facts)) or "none"
            offenders.append(
                f"{required.metric} is not known of it, but {required} is required.{near(required.metric, facts)} Known: {known}"
            )
        elif not required.holds(fact.value):
            offenders.append(f"{required.metric} is {fact.value:.6g} ({fact.source}), but {required} is required")
    if offenders:
        listed = "\n".join(f"  - {line}." for line in offenders)
        again = f"python jobs/evaluate.py --config jobs/configs/evaluate_address.yaml --set 'subjects=[{manifest.reference}]'"
        raise PublishError(
            f"{manifest.reference} is not promoted, and no alias was moved.\n{listed}\nEvaluate it anew ({again}), or promote another."
        )
