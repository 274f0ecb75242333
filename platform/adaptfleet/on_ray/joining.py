"""Which cluster a program uses."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from adaptfleet.on_ray.local_cluster import LocalCluster


@contextmanager
def joined_cluster() -> Iterator[None]:
    """Inside the block `ray.init()` finds the cluster that RAY_ADDRESS names (a submitted job's is set), else a private one that ends with
    the block. Ray must be imported inside the block: it reads its environment then."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with LocalCluster.start() as cluster:
        earlier = dict(os.environ)
        os.environ.update(cluster.env)
        try:
            yield
        finally:
            for name in cluster.env:
                if name in earlier:
                    os.environ[name] = earlier[name]
                else:
                    del os.environ[name]
