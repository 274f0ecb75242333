"""Fixtures that several areas share: a home with the embedded model, and one real local Ray cluster for the whole run."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
TEST_HOME = REPOSITORY / "build" / "test-home"
"""Kept between runs: holds the embedded model and fetched data, never a store or runs."""

# Ray reads the mode once, when it is imported; a process of the tests talks to no cluster but the fixture's.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "ADAPTFLEET_STORE", "ADAPTFLEET_API_KEYS", "ADAPTFLEET_TENANTS", "OMP_NUM_THREADS"):
    os.environ.pop(_name, None)
# No test may write to the home of whoever runs it; each fixture below sets a home of its own over this one.
os.environ["ADAPTFLEET_HOME"] = str(TEST_HOME)


_CLUSTER_FOLDERS = {"cluster", "kuberay", "endpoint", "fleet", "several"}
_CLUSTER_FIXTURES = {"local_cluster", "small_cluster"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs a cluster, for tests/lanes.py."""
    for item in items:
        if item.path.parent.name in _CLUSTER_FOLDERS or _CLUSTER_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.clusters)


@pytest.fixture(autouse=True)
def torch_seed() -> None:
    """A test draws the same numbers in every run. One that does not use PyTorch does not pay for its import."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def _link_models(home: Path) -> Path:
    """Gives `home` the embedded model, made on the first run and shared by hard links after it."""
    from adaptfleet.core.models.embedded import embedded_model

    cached = embedded_model("smollm2-135m")
    folder = home / "models" / cached.name
    folder.mkdir(parents=True)
    for file in cached.iterdir():
        (folder / file.name).hardlink_to(file)
    return home


@pytest.fixture(scope="session")
def embedded_home() -> Iterator[Path]:
    """ADAPTFLEET_HOME for the rest of the run, unless `fresh_home` sets another: an empty store beside the embedded model."""
    TEST_HOME.mkdir(parents=True, exist_ok=True)
    # Beside the cached model and not in the temporary folder, which may be another file system, without hard links to this one.
    with tempfile.TemporaryDirectory(prefix="test-run-", dir=TEST_HOME.parent) as folder, pytest.MonkeyPatch.context() as patch:
        home = _link_models(Path(folder))
        patch.setenv("ADAPTFLEET_HOME", str(home))
        yield home


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ADAPTFLEET_HOME for one test."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("ADAPTFLEET_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def local_cluster(embedded_home: Path):  # type: ignore[no-untyped-def]
    """One LocalCluster of 3 CPUs for the whole run; its jobs see `embedded_home`. This process talks to it too (`cluster.env` is set)."""
    from adaptfleet.on_ray.local_cluster import LocalCluster

    with (
        LocalCluster.start(num_cpus=3, logs_to=REPOSITORY / "build" / "test-logs", env={"ADAPTFLEET_HOME": str(embedded_home)}) as cluster,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
