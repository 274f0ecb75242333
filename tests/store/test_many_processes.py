"""Several processes at once, some killed: no number twice, no half version, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.registry import Registry
from tests.store.drafts import child_env, dataset

_PUBLISHER = """
import sys
from pathlib import Path
from adaptfleet.contracts.artifacts import Draft
from adaptfleet.store.registry import Registry
registry = Registry.open(sys.argv[1])
for _ in range(int(sys.argv[3])):
    print(registry.publish(Draft(kind="dataset", name="rows"), Path(sys.argv[2])).version, flush=True)
"""
_MOVER = """
import sys
from adaptfleet.store.registry import Registry
registry = Registry.open(sys.argv[1])
for _ in range(int(sys.argv[2])):
    registry.set_alias("rows", "canary", 1)
    registry.set_alias("rows", "canary", 2)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_publishers_get_distinct_numbers_and_readers_whole_versions(store_url: str, rows: Path, tmp_path: Path) -> None:
    num_processes, num_versions = 3, 6
    publishers = [start(_PUBLISHER, store_url, rows, num_versions) for _ in range(num_processes)]
    reader = Registry.open(store_url)
    seen: set[int] = set()
    newest = 0
    while any(publisher.poll() is None for publisher in publishers):
        for name, listing in reader.snapshot().items():
            for version in set(listing.versions) - seen:
                folder = reader.fetch(reader.manifest(name, version), tmp_path / "cache")
                assert (folder / "train.jsonl").read_bytes() == (rows / "train.jsonl").read_bytes()
                seen.add(version)
            if "prod" in listing.aliases:
                pointed = reader.resolve(name).version
                assert pointed >= newest, "publishing moved prod back"
                newest = pointed
        time.sleep(0.01)
    numbers = [int(number) for publisher in publishers for number in finish(publisher).split()]
    assert sorted(numbers) == list(range(1, num_processes * num_versions + 1))
    assert reader.resolve("rows").version == len(numbers)
    assert reader.versions("rows") == sorted(numbers)


def test_movers_lose_no_move(store_url: str, rows: Path) -> None:
    """Every move of two processes stands in the alias's log: none has overwritten another."""
    registry = Registry.open(store_url)
    for _ in range(2):
        registry.publish(dataset(), rows)
    movers = [start(_MOVER, store_url, 8) for _ in range(2)]
    for mover in movers:
        finish(mover)
    keys = sorted(info.key for info in registry._objects.list("index/rows/aliases/canary"))
    moves = [json.loads(registry._objects.get(key) or b"") for key in keys]
    for number, (before, move) in enumerate(zip([None, *moves], moves, strict=False), start=1):
        assert keys[number - 1].endswith(f"{number:06d}.json")
        assert move["earlier"] == ([] if before is None else [*before["earlier"], before["version"]])
    assert len({move["move"] for move in moves}) == len(moves)
    assert registry.aliases("rows")["canary"] == moves[-1]["version"]


def test_a_version_is_either_removed_or_pointed_to(store_url: str, rows: Path) -> None:
    """One process removes versions while another points an alias at them: no alias ends on a removed version."""
    registry = Registry.open(store_url)
    for _ in range(8):
        registry.publish(dataset(), rows, alias="newest")
    remover = start(
        "import sys\nfrom adaptfleet.store.registry import Registry\nfrom adaptfleet.contracts.errors import StoreError\n"
        "registry = Registry.open(sys.argv[1])\n"
        "for version in range(1, 8):\n"
        "    try: registry.remove('rows', version)\n"
        "    except StoreError as error: print(error)\n",
        store_url,
    )
    while remover.poll() is None:
        for version in range(1, 8):
            try:
                registry.set_alias("rows", "canary", version)
            except StoreError as error:
                assert "removed" in str(error)
    finish(remover)
    pointed = registry.aliases("rows").get("canary")
    assert pointed is None or pointed in registry.versions("rows")
    for version in registry.versions("rows"):
        upload = registry._index.publication("rows", version).upload
        assert len(registry._objects.list(f"content/rows/{upload}")) == 2, "a version that is not removed has lost its files"


@pytest.mark.parametrize("num_uploaded", [1, 10, 25])
def test_a_killed_publisher_leaves_nothing_visible(store_url: str, tmp_path: Path, num_uploaded: int) -> None:
    """kill -9 while a large folder is on its way: no version, no alias; the next publication is whole and has number 1."""
    folder = tmp_path / "large"
    folder.mkdir()
    for number in range(40):
        (folder / f"rows-{number}.jsonl").write_bytes(os.urandom(3_000_000))
    publisher = start(_PUBLISHER, store_url, folder, 1)
    registry = Registry.open(store_url)
    deadline = time.monotonic() + 60
    while len(registry._objects.list("content/rows")) < num_uploaded:
        assert publisher.poll() is None and time.monotonic() < deadline
    publisher.send_signal(signal.SIGKILL)
    output, _ = publisher.communicate(timeout=60)
    assert output == "", "the publisher was faster than the kill; make the folder larger"
    assert (registry.names(), registry.versions("rows"), registry.aliases("rows")) == ([], [], {})
    small = tmp_path / "small"
    small.mkdir()
    (small / "rows.jsonl").write_text("{}\n")
    manifest = registry.publish(dataset(), small)
    assert manifest.version == 1
    assert (registry.fetch(manifest, tmp_path / "cache") / "rows.jsonl").read_text() == "{}\n"
