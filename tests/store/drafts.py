"""What the store's tests publish."""

import os
import sys

import numpy as np

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.store.registry import Registry

RANK = 4


def dataset(name: str = "rows", **fields: object) -> Draft:
    return Draft(kind="dataset", name=name, **fields)


def adapter(name: str = "mine", **fields: object) -> Draft:
    values: dict[str, object] = {"base": "smollm2-135m", "base_revision": "0" * 64, "method": {"kind": "lora", "rank": RANK}}
    return Draft(kind="adapter", name=name, **(values | fields))


def lora_tensors(rank: int = RANK, modules: tuple[str, ...] = ("q_proj", "v_proj")) -> dict[str, np.ndarray]:
    tensors = {}
    for module in modules:
        path = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors[f"{path}.lora_A.weight"] = np.ones((rank, 16), np.float32)
        tensors[f"{path}.lora_B.weight"] = np.ones((24, rank), np.float32)
    return tensors


def stored_file(registry: Registry, ending: str) -> str:
    """The key of a content file in the store."""
    (key,) = (info.key for info in registry._objects.list("content") if info.key.endswith(ending))
    return key


def child_env() -> dict[str, str]:
    """The environment for a child process that imports the library."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
