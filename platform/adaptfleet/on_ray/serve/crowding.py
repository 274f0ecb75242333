"""Whose requests are sent away when a replica has nearly all it takes: those of tenants with more than their share of it.

Below seven eighths of what a replica takes, everybody is admitted. Above, a tenant that has its share of the seven eighths, by weight among
those who have requests here, gets a 503; the last eighth is for the others. So one tenant's flood cannot fill the house.
"""

from collections import Counter

from adaptfleet.on_ray.serve.refusal import RefusalError

_OPEN_TO_ALL = 7 / 8
_RETRY_AFTER_S = 1


class Crowd:
    def __init__(self, max_requests: int) -> None:
        self._open_to_all = _OPEN_TO_ALL * max_requests
        self._inside: Counter[str] = Counter()
        self._weights: dict[str, float] = {}

    def enter(self, tenant: str, weight: float) -> None:
        """RefusalError: 503."""
        self._weights[tenant] = weight
        if self._inside.total() >= self._open_to_all:
            share = self._open_to_all * weight / sum(self._weights.values())
            if self._inside[tenant] >= share:
                self._forget(tenant)
                raise RefusalError(
                    503,
                    f"The endpoint is full, and {tenant} has its share of it: {self._inside[tenant]} requests. Try again in a second.",
                    "overloaded",
                    retry_after_s=_RETRY_AFTER_S,
                )
        self._inside[tenant] += 1

    def leave(self, tenant: str) -> None:
        self._inside[tenant] -= 1
        self._forget(tenant)

    def _forget(self, tenant: str) -> None:
        if self._inside[tenant] <= 0:
            del self._inside[tenant]
            self._weights.pop(tenant, None)
