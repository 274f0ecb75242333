"""`ray start` for a worker on the loopback address: python -m adaptfleet.on_ray.kuberay.ray_start start --address=127.0.0.1:PORT ...

Ray keeps to loopback only where it believes that other nodes cannot join (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, Ray 2.60), and its command
then refuses to join. The processes keep that belief; this command alone is told otherwise. To be removed once `ray start` takes loopback
addresses as they are; tests/kuberay sees that pools grow and what their ports are bound to.
"""

from ray._private import ray_constants, services
from ray.scripts.scripts import main

LOOPBACK = "127.0.0.1"


def _loopback(address: str | None = None) -> str:
    return LOOPBACK


if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = _loopback
    main()
