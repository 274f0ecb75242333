"""Which waiting request the engine takes next: by class, and among the tenants of a class by fair shares.

vLLM's scheduler takes the request with the smallest number first. The number is the class, and below it a start tag of start-time fair
queueing (Goyal, Vin, Cheng 1996): a tenant's next request begins where its last one ended in virtual time, its tokens over its weight
later, but not before the virtual time of what the engine is at. So a tenant with a hundred waiting requests is served as often as one with
two, and one that was idle has nothing saved up. There is no queue here and nothing waits: the engine's own queue is what is ordered.
"""

from dataclasses import dataclass

CLASSES = ("high", "normal", "low", "batch", "shadow")
_CLASS_STEP = 2**40
"""More tokens than an engine serves before it is started anew."""


@dataclass(slots=True)
class Ticket:
    tenant: str
    klass: str
    weight: float
    cost: float
    start: float
    has_begun: bool = False

    @property
    def priority(self) -> int:
        return CLASSES.index(self.klass) * _CLASS_STEP + min(int(self.start), _CLASS_STEP - 1)


class FairOrder:
    def __init__(self) -> None:
        self._now = dict.fromkeys(CLASSES, 0.0)
        self._finish: dict[tuple[str, str], float] = {}

    def ticket(self, tenant: str, klass: str, weight: float, num_tokens: int) -> Ticket:
        """`num_tokens` is an estimate, corrected by `end`."""
        start = max(self._now[klass], self._finish.get((klass, tenant), 0.0))
        cost = max(1, num_tokens) / weight
        self._finish[klass, tenant] = start + cost
        return Ticket(tenant, klass, weight, cost, start)

    def begin(self, ticket: Ticket) -> None:
        """The engine has begun with it: its virtual time is at this request's tag."""
        if not ticket.has_begun:
            ticket.has_begun = True
            self._now[ticket.klass] = max(self._now[ticket.klass], ticket.start)

    def end(self, ticket: Ticket, num_tokens: int) -> None:
        """It took so many tokens: the tenant's next requests move by what was estimated wrongly."""
        key = (ticket.klass, ticket.tenant)
        if key not in self._finish:
            return
        self._finish[key] = max(ticket.start, self._finish[key] + max(1, num_tokens) / ticket.weight - ticket.cost)
        if self._finish[key] <= self._now[ticket.klass]:
            del self._finish[key]  # an idle tenant leaves nothing behind
