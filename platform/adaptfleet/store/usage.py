"""What tenants have used, kept in the store: for each day and each counting replica one object, replaced as its counts grow.

usage/2026-01-31/REPLICA.json      {"tenant": [requests, prompt_tokens, output_tokens]}

Counts of one replica only grow, and each is written by one writer, so that sums need no lock and a lost or repeated write does no harm.
"""

import json
import re

from adaptfleet.contracts.errors import CorruptError
from adaptfleet.store.objects import Objects

USAGE = "usage"
_KEY = re.compile(r"usage/(\d{4}-\d{2}-\d{2})/([0-9a-f]{32})\.json")

Counts = dict[str, tuple[int, int, int]]
"""By tenant: requests, prompt tokens, output tokens."""


def write_usage(objects: Objects, day: str, replica: str, counts: Counts) -> None:
    objects.put(f"{USAGE}/{day}/{replica}.json", json.dumps(counts, sort_keys=True).encode())


def read_usage(objects: Objects, day: str | None = None) -> dict[tuple[str, str], Counts]:
    """By day and replica; of one day, or all. CorruptError names an object that is not what was written."""
    found: dict[tuple[str, str], Counts] = {}
    for info in objects.list(USAGE if day is None else f"{USAGE}/{day}"):
        match = _KEY.fullmatch(info.key)
        if match is None:
            continue
        content = objects.get(info.key)
        if content is not None:
            found[match[1], match[2]] = _parse(info.key, content)
    return found


def _parse(key: str, content: bytes) -> Counts:
    try:
        counts = json.loads(content)
        return {str(tenant): (int(a), int(b), int(c)) for tenant, (a, b, c) in counts.items()}
    except (ValueError, TypeError, AttributeError):
        raise CorruptError(f"the store's record {key} is not what was written. Delete it; the usage in it is lost.") from None
