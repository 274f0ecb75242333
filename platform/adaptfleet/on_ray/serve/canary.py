"""Which version of a split alias answers one user: always the same, as long as the shares stand.

Weighted rendezvous hashing: each version draws a number for each user, stretched by its weight, and the highest answers. A canary whose
share grows keeps the users it has; one that is taken back returns its users and moves no one else.
"""

import hashlib
import math

from adaptfleet.store.records import AliasSplit


def version_for(split: AliasSplit, name: str, alias: str, user: str) -> int:
    return max(split.shares, key=lambda share: -share.weight / math.log(_place(f"{name}\0{alias}\0{share.version}\0{user}"))).version


def is_shadowed(split: AliasSplit, request_id: str) -> bool:
    """Whether this request is one of the shadow's percentage."""
    return split.shadow is not None and _place(request_id) * 100 < split.shadow.weight


def _place(text: str) -> float:
    """Between 0 and 1, both excluded, evenly."""
    return (int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") + 0.5) / 2**48
