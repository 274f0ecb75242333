"""Who has the accelerators when not all can: pods of the highest priority, and pods of lower priority give back what those need.

As kube-scheduler does by PriorityClass, so that what serves and what trains share one fleet: a pod that waits takes the room of pods of
lower priority, which get their notice (SIGTERM and the grace period) first. Pure; a dev cluster asks it, and so does the simulated day.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

Amounts = Mapping[str, float]


@dataclass(frozen=True)
class Claim:
    """A pod's."""

    name: str
    priority: int
    amounts: Amounts
    since: float
    """Of those that wait with the same priority the first comes first; of those that run the last goes first."""
    is_running: bool = False
    is_ending: bool = False
    """It has had its notice; its room is not free yet."""


@dataclass(frozen=True)
class Plan:
    start: tuple[str, ...]
    preempt: tuple[str, ...]
    waiting: tuple[str, ...]


def schedule(capacity: Amounts, claims: Sequence[Claim]) -> Plan:
    """What may start now, what has to leave, and what waits. Resources that `capacity` does not name are without bounds.

    Room that becomes free for a waiting pod is kept for it: nothing of lower priority slips in.
    """
    held = [claim for claim in claims if claim.is_running or claim.is_ending]
    staying = [claim for claim in held if not claim.is_ending]
    free = _less(capacity, held)
    promised = _less(capacity, staying)
    """Free once what is ending has ended, less what is kept for those that wait."""
    leaving_first = sorted(staying, key=lambda claim: (claim.priority, -claim.since))
    start, waiting = [], []
    preempt: dict[str, None] = {}
    pending = (claim for claim in claims if not (claim.is_running or claim.is_ending))
    for claim in sorted(pending, key=lambda claim: (-claim.priority, claim.since)):
        if _fits(claim, free) and _fits(claim, promised):
            start.append(claim.name)
            free, promised = _less(free, [claim]), _less(promised, [claim])
            continue
        waiting.append(claim.name)
        victims = _victims(claim, promised, leaving_first, preempt)
        if victims is not None:
            preempt |= dict.fromkeys(victim.name for victim in victims)
            promised = _less(_more(promised, victims), [claim])
    return Plan(tuple(start), tuple(preempt), tuple(waiting))


def _victims(claim: Claim, promised: Amounts, leaving_first: Sequence[Claim], going: Container[str]) -> list[Claim] | None:
    """The fewest of lower priority that make room, the lowest and latest first; None: not even all of them would."""
    victims: list[Claim] = []
    for other in leaving_first:
        if _fits(claim, promised) or other.priority >= claim.priority:
            break
        if other.name not in going and any(
            claim.amounts.get(name, 0.0) > amount and other.amounts.get(name, 0.0) for name, amount in promised.items()
        ):
            victims.append(other)
            promised = _more(promised, [other])
    return victims if _fits(claim, promised) else None


def _fits(claim: Claim, room: Amounts) -> bool:
    return all(claim.amounts.get(name, 0.0) <= amount for name, amount in room.items())


def _less(room: Amounts, claims: Sequence[Claim]) -> dict[str, float]:
    return {name: amount - sum(claim.amounts.get(name, 0.0) for claim in claims) for name, amount in room.items()}


def _more(room: Amounts, claims: Sequence[Claim]) -> dict[str, float]:
    return {name: amount + sum(claim.amounts.get(name, 0.0) for claim in claims) for name, amount in room.items()}
