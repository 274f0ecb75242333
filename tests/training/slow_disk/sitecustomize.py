"""On the PYTHONPATH of a test's cluster. While the file `slow-disk` is in the home, a checkpoint takes two seconds more to be stored; while
`slow-steps` is, each step a quarter of a second more."""

import importlib.abc
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def _is_slow(what: str) -> bool:
    return (Path(os.environ["ADAPTFLEET_HOME"]) / what).exists()


def _slow_storage(module: Any) -> None:
    stores = module.StorageContext.persist_current_checkpoint

    def stores_slowly(*args: Any) -> Any:
        if _is_slow("slow-disk"):
            time.sleep(2.0)
        return stores(*args)

    module.StorageContext.persist_current_checkpoint = stores_slowly


def _slow_steps(module: Any) -> None:
    run = module.Trainer.run

    def runs_slowly(*args: Any) -> Iterator[Any]:
        for result in run(*args):
            if _is_slow("slow-steps"):
                time.sleep(0.25)
            yield result

    module.Trainer.run = runs_slowly


_CHANGES = {"ray.train.v2._internal.execution.storage": _slow_storage, "adaptfleet.core.loop": _slow_steps}


class _OnceImported(importlib.abc.MetaPathFinder):
    """Changes a module where a process imports it, and imports nothing into others."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        change = _CHANGES.pop(fullname, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: Any) -> None:
            load(module)
            change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _OnceImported())
