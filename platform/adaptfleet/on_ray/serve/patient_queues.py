"""A vLLM plug-in: on a CPU, an engine's processes sleep while they wait for each other.

vLLM 0.32 looks into the shared queue between engine and worker again and again for a second after each message, with `sched_yield` in
between. On a GPU's host there is a core for that. Here two engines on two cores so kept everything else of the machine, clients and Serve's
proxy among them, from running for up to 14 seconds (Linux 6.18); steps of an engine are no slower with sleeps of 0.1 ms.

Expires when `shm_broadcast` waits without `sched_yield`.
"""

import time

NAP_S = 1e-4


def register() -> None:
    from vllm.distributed.device_communicators import shm_broadcast

    if not hasattr(shm_broadcast, "sched_yield"):
        raise RuntimeError("this vLLM waits for its queues in another way; remove patient_queues (requirements/*.lock names the version)")
    shm_broadcast.sched_yield = _nap


def _nap() -> None:
    time.sleep(NAP_S)
