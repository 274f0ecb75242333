"""On the PYTHONPATH of a test's cluster: while the file `slow-disk` is in the home, a checkpoint takes two seconds more to be stored."""

import importlib.abc
import importlib.util
import os
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_STORAGE = "ray.train.v2._internal.execution.storage"


class _OnceImported(importlib.abc.MetaPathFinder):
    """Changes Ray Train's storage where a process imports it, and imports nothing into others."""

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != _STORAGE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_slow(module: Any) -> None:
            load(module)
            stores = module.StorageContext.persist_current_checkpoint

            def stores_slowly(*args: Any) -> Any:
                if (Path(os.environ["ADAPTFLEET_HOME"]) / "slow-disk").exists():
                    time.sleep(2.0)
                return stores(*args)

            module.StorageContext.persist_current_checkpoint = stores_slowly

        spec.loader.exec_module = load_and_slow  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _OnceImported())
