"""Which cluster a program uses."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from adaptfleet.on_ray.local_cluster import LocalCluster


@contextmanager
def joined_cluster() -> Iterator[None]:
    """Inside the block `ray.init()` finds the cluster that RAY_ADDRESS names (a submitted job's is set), else a private one that ends with
    the block. Ray must be imported inside a block: it reads its environment then."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with LocalCluster.start() as cluster:
        earlier = dict(os.environ)
        os.environ.update(cluster.env)
        _forget_token()
        try:
            yield
        finally:
            _forget_token()
            for name in cluster.env:
                if name in earlier:
                    os.environ[name] = earlier[name]
                else:
                    del os.environ[name]


def _forget_token() -> None:
    """Ray keeps the token of the first cluster that a process talks to, and there is no public way to give it another's."""
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

        AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def connected() -> Iterator[None]:
    """Inside the block this process talks to the cluster that `ray.init()` finds; a connection that is there already, such as a task's own,
    stays when the block ends."""
    import ray

    if ray.is_initialized():
        yield
        return
    with ray.init():
        yield
