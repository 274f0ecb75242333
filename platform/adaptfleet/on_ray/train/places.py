"""Whether a cluster can ever hold the workers that a run asks for, and how many CPUs each gets."""

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]


def num_places(each: Resources, nodes: Sequence[Resources]) -> int:
    """How many workers fit: all that one worker wants must be on one node."""
    wanted = {name: value for name, value in each.items() if value}
    return sum(min(int(node.get(name, 0) // value) for name, value in wanted.items()) for node in nodes)


def equal_share(workers: int, free_cpus: float, nodes: Sequence[Resources]) -> int:
    """CPUs of each worker: as many as can be, so that all have a place."""
    largest = max(1, int(free_cpus) // workers)
    return next((cpus for cpus in range(largest, 1, -1) if num_places({"CPU": cpus}, nodes) >= workers), 1)


def shortage(workers: int, each: Resources, nodes: Sequence[Resources], limits: Resources | None) -> str | None:
    """Why so many workers can never start. None: they can.

    `limits`: what the cluster's autoscaler may come to have, on nodes of sizes not known here; empty: no node is added; None: nodes are
    added, and how many is not known.
    """
    if limits is None:
        return None
    has = {name: max(sum(node.get(name, 0) for node in nodes), limits.get(name, 0)) for name in each}
    short = [
        f"{value * workers:g} {name}s where the cluster has {has[name]:g}" for name, value in each.items() if value * workers > has[name]
    ]
    if short:
        return f"{workers} workers want {' and '.join(short)}"
    places = workers if limits else num_places(each, nodes)
    if places < workers:
        size = " and ".join(f"{value:g} {name}s" for name, value in each.items() if value)
        return (
            f"{workers} workers want {size} each, and the cluster's nodes have room for {places}: what a worker wants must be on one node"
        )
    return None
