"""Where things lie: the environment variables that place the store and the runs."""

import os
from pathlib import Path


def home() -> Path:
    """The embedded root: ADAPTFLEET_HOME, `~/.adaptfleet` by default. Holds `store/`, `runs/`, `models/`, `cache/` `api-keys`,
    `client-key`, `tenants.yaml` and `logs/`."""
    return Path(os.environ.get("ADAPTFLEET_HOME") or "~/.adaptfleet").expanduser().absolute()


def store_url() -> str:
    """ADAPTFLEET_STORE, a `file://`, `s3://`, `gs://` or `az://` URL; by default `store/` in the home."""
    return os.environ.get("ADAPTFLEET_STORE") or (home() / "store").as_uri()
