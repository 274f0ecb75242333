"""A disk that is full: a real small file system where this user may mount one, and the kernel's file size limit everywhere."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.registry import Registry
from tests.store.drafts import child_env, dataset

_LIMITED = """
import resource, sys
from pathlib import Path
from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.registry import Registry
registry = Registry.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    registry.publish(Draft(kind="dataset", name="rows"), Path(sys.argv[2]))
except StoreError as error:
    print(error)
print(registry.names())
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"{}\n")
    (folder / "b.jsonl").write_bytes(os.urandom(1_000_000))
    (folder / "c.jsonl").write_bytes(os.urandom(9_000_000))
    return folder


def files(store: Path) -> list[str]:
    return sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())


def test_a_file_that_may_not_grow(tmp_path: Path, large: Path) -> None:
    store = tmp_path / "store"
    words = [sys.executable, "-c", _LIMITED, store.as_uri(), str(large)]
    done = subprocess.run(words, env=child_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and "The store is full" in done.stdout and done.stdout.endswith("[]\n")
    assert files(store) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.xfail("this user may not mount a file system; the file size limit's case above stands for it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_at_publish(small_disk: Path, large: Path) -> None:
    store = small_disk / "store"
    registry = Registry.open(store.as_uri())
    small = small_disk / "small"
    small.mkdir()
    (small / "rows.jsonl").write_text("{}\n")
    registry.publish(dataset(), small)
    before = files(store)
    with pytest.raises(StoreError, match=r"No space left on device.*The store is full"):
        registry.publish(dataset(), large)
    assert files(store) == before
    assert (registry.versions("rows"), registry.resolve("rows").version) == ([1], 1)
    (large / "c.jsonl").unlink()
    assert registry.publish(dataset(), large).version == 2


def test_a_full_disk_at_fetch(small_disk: Path, large: Path, tmp_path: Path) -> None:
    registry = Registry.open((tmp_path / "store").as_uri())
    manifest = registry.publish(dataset(), large)
    with pytest.raises(StoreError, match="cannot keep rows@1 in the cache"):
        registry.fetch(manifest, small_disk / "cache")
    assert files(small_disk) == []


def test_a_store_that_may_not_be_written(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot"):
        Registry.open((tmp_path / "file" / "store").as_uri()).publish(dataset(), rows)
