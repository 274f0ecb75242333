"""The registry's contract, on a local disk and on S3."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import ContractError, CorruptError, NotFoundError, PublishError, StoreError
from adaptfleet.store import content
from adaptfleet.store.lineage import ancestry
from adaptfleet.store.objects import Objects
from adaptfleet.store.registry import Registry
from tests.store.drafts import adapter, dataset, stored_file


def test_publish_resolve_fetch(registry: Registry, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_adapter()
    manifest = registry.publish(adapter(metrics={"exact_match": 0.5}), folder)
    assert (manifest.reference, registry.aliases("mine"), registry.versions("mine")) == ("mine@1", {"prod": 1}, [1])
    for reference in ("mine", "mine@1", "mine@prod"):
        assert registry.resolve(reference) == manifest
    fetched = registry.fetch(manifest, tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in fetched.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert Registry.open(registry.url).resolve("mine") == manifest
    assert pickle.loads(pickle.dumps(registry)).resolve("mine") == manifest


def test_a_large_file_travels_in_parts(registry: Registry, tmp_path: Path) -> None:
    """Longer than a part of an upload and than a piece of a download."""
    folder = tmp_path / "large"
    folder.mkdir()
    pattern = bytes(range(256)) * 4096 + b"odd"
    (folder / "rows.jsonl").write_bytes(pattern * 36)
    fetched = registry.fetch(registry.publish(dataset(), folder), tmp_path / "cache")
    assert (fetched / "rows.jsonl").read_bytes() == pattern * 36


def test_folders_and_empty_files_return(registry: Registry, rows: Path, tmp_path: Path) -> None:
    fetched = registry.fetch(registry.publish(dataset(), rows), tmp_path / "cache")
    assert (fetched / "more" / "empty file.txt").read_bytes() == b""
    assert (fetched / "train.jsonl").read_bytes() == (rows / "train.jsonl").read_bytes()


def test_aliases_move_and_roll_back(registry: Registry, rows: Path) -> None:
    for _ in range(3):
        registry.publish(dataset(), rows)
    registry.set_alias("rows", "prod", 1)
    registry.set_alias("rows", "canary", 2)
    assert registry.aliases("rows") == {"prod": 1, "canary": 2}
    assert [registry.rollback("rows").version for _ in range(3)] == [3, 2, 1]
    with pytest.raises(NotFoundError, match="pointed nowhere else before"):
        registry.rollback("rows")
    assert registry.resolve("rows@canary").version == 2
    with pytest.raises(NotFoundError, match=r"has no alias 'canery'.*Did you mean 'canary'"):
        registry.rollback("rows", "canery")


def test_an_alias_returns_to_no_removed_version(registry: Registry, rows: Path) -> None:
    for _ in range(3):
        registry.publish(dataset(), rows)
    registry.remove("rows", 2)
    assert registry.rollback("rows").version == 1


def test_publishing_without_an_alias_moves_none(registry: Registry, rows: Path) -> None:
    registry.publish(dataset(), rows, alias=None)
    assert registry.aliases("rows") == {}
    with pytest.raises(NotFoundError, match="no alias 'prod'"):
        registry.resolve("rows")
    assert registry.resolve("rows@1").version == 1


def test_removed_numbers_are_never_given_again(registry: Registry, rows: Path, tmp_path: Path) -> None:
    first = registry.publish(dataset(), rows)
    with pytest.raises(StoreError, match="prod points to it"):
        registry.remove("rows", 1)
    registry.publish(dataset(), rows)
    registry.remove("rows", 1)
    with pytest.raises(NotFoundError, match="rows@1 was removed"):
        registry.resolve("rows@1")
    with pytest.raises(NotFoundError, match="removed"):
        registry.fetch(first, tmp_path / "cache")
    with pytest.raises(NotFoundError):
        registry.set_alias("rows", "prod", 1)
    registry.remove("rows")
    assert (registry.names(), registry.versions("rows"), registry.aliases("rows")) == ([], [], {})
    assert registry._objects.list("content") == []
    assert registry.publish(dataset(), rows).version == 3


def test_unknown_references_name_what_there_is(registry: Registry, rows: Path) -> None:
    with pytest.raises(NotFoundError, match="Nothing is published yet"):
        registry.resolve("rows")
    registry.publish(dataset("address-json"), rows)
    with pytest.raises(NotFoundError, match="Did you mean 'address-json'"):
        registry.resolve("adress-json")
    with pytest.raises(NotFoundError, match=r"does not exist\. Its versions: 1"):
        registry.resolve("address-json@7")
    with pytest.raises(NotFoundError, match="Its aliases: prod -> 1"):
        registry.resolve("address-json@canary")


@pytest.mark.parametrize("reference", ["../../x", "..", "/etc/passwd", "a/b", "a@../b", "a@b/c", "", "A", "a\0b", "a@0", "x" * 65, "a..b"])
def test_unsafe_references_reach_no_path(registry: Registry, reference: str) -> None:
    with pytest.raises(ContractError):
        registry.resolve(reference)


def test_unsafe_names_reach_no_path(registry: Registry, rows: Path) -> None:
    for name in ("../x", "a/b", ""):
        for call in (
            lambda name=name: registry.versions(name),
            lambda name=name: registry.aliases(name),
            lambda name=name: registry.remove(name),
            lambda name=name: registry.rollback(name),
            lambda name=name: registry.find("f" * 16, name),
            lambda name=name: registry.set_alias(name, "prod", 1),
        ):
            with pytest.raises(ContractError):
                call()
    for alias in ("../x", "3", "a/b"):
        with pytest.raises(ContractError):
            registry.publish(dataset(), rows, alias=alias)
    assert registry._objects.list("") == []


def test_a_name_keeps_its_kind(registry: Registry, rows: Path, make_adapter: Callable[..., Path]) -> None:
    registry.publish(dataset("mine"), rows)
    with pytest.raises(PublishError, match="mine is of the kind dataset, not adapter"):
        registry.publish(adapter("mine"), make_adapter())
    registry.publish(adapter("other"), make_adapter())
    assert (registry.names(), registry.names("adapter"), registry.names("model")) == (["mine", "other"], ["other"], [])


def test_find_gives_the_newest_of_a_contract(registry: Registry, rows: Path) -> None:
    for fingerprint in ("a" * 16, "b" * 16, "a" * 16):
        registry.publish(dataset(contract_fingerprint=fingerprint), rows)
    found = registry.find("a" * 16, "rows")
    assert found is not None and found.version == 3
    assert registry.find("c" * 16, "rows") is None
    assert registry.find("a" * 16, "unknown") is None


def test_lineage(registry: Registry, rows: Path, make_adapter: Callable[..., Path]) -> None:
    registry.publish(dataset("tickets"), rows)
    registry.publish(adapter("mine", parents=("tickets@1", "org/Base-Model")), make_adapter())
    family = ancestry(registry, "mine")
    assert [(p.reference, p.manifest is not None) for p in family.parents] == [("tickets@1", True), ("org/Base-Model", False)]


def test_a_snapshot_follows_other_writers(registry: Registry, rows: Path) -> None:
    other = Registry.open(registry.url)
    assert registry.snapshot() == {}
    other.publish(dataset(), rows)
    assert registry.snapshot()["rows"].versions == (1,)
    other.publish(dataset(), rows, alias="canary")
    assert registry.snapshot()["rows"].aliases == {"prod": 1, "canary": 2}
    other.set_alias("rows", "prod", 2)
    assert registry.snapshot()["rows"].aliases["prod"] == 2
    other.remove("rows", 1)
    assert registry.snapshot()["rows"].versions == (2,)
    other.remove("rows")
    assert registry.snapshot() == {}


def test_a_quiet_store_is_polled_with_one_small_read(registry: Registry, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the real store's requests; each still goes through."""
    for _ in range(3):
        registry.publish(dataset(), rows)
    registry.snapshot(), registry.resolve("rows")
    requests: list[str] = []
    for method in ("get", "list", "info"):
        real = getattr(Objects, method)
        monkeypatch.setattr(Objects, method, lambda self, key, method=method, real=real: (requests.append(method), real(self, key))[1])
    registry.snapshot()
    assert requests == ["get"]
    requests.clear()
    registry.resolve("rows")
    assert requests == ["list"]


@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_a_damaged_store_is_named(registry: Registry, rows: Path, tmp_path: Path, damage: str) -> None:
    manifest = registry.publish(dataset(), rows)
    key = stored_file(registry, "train.jsonl")
    bytes_now = registry._objects.get(key)
    assert bytes_now is not None
    if damage == "all":
        registry._objects.delete([key])
    else:
        registry._objects.put(key, bytes([bytes_now[0] ^ 1]) + bytes_now[1:] if damage == "a byte" else bytes_now[:-1])
    with pytest.raises(CorruptError, match=r"rows@1: the file train\.jsonl"):
        registry.fetch(manifest, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_record_is_named(registry: Registry, rows: Path) -> None:
    registry.publish(dataset(), rows)
    for key in ("index/rows/versions/000001.json", "index/rows/aliases/prod/000001.json"):
        whole = registry._objects.get(key)
        assert whole is not None
        registry._objects.put(key, whole[:-5])
        with pytest.raises(CorruptError, match=key):
            Registry.open(registry.url).resolve("rows")
        registry._objects.put(key, whole)


def test_a_damaged_cache_is_fetched_anew(registry: Registry, rows: Path, tmp_path: Path) -> None:
    manifest = registry.publish(dataset(), rows)
    folder = registry.fetch(manifest, tmp_path / "cache")
    for damage in (
        lambda: (folder / "train.jsonl").write_text('{"text": "b"}\n'),
        lambda: (folder / "train.jsonl").unlink(),
        lambda: (folder / "adapter_model.bin").write_bytes(b"planted"),
        lambda: (folder / "more" / "link").symlink_to("/etc/hosts"),
    ):
        damage()
        assert registry.fetch(manifest, tmp_path / "cache") == folder
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) == ["more", "more/empty file.txt", "train.jsonl"]
        assert (folder / "train.jsonl").read_bytes() == (rows / "train.jsonl").read_bytes()
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_equal_content_is_cached_once(registry: Registry, rows: Path, tmp_path: Path) -> None:
    first, second = registry.publish(dataset("a"), rows), registry.publish(dataset("b"), rows)
    assert registry.fetch(first, tmp_path / "cache") == registry.fetch(second, tmp_path / "cache")


def test_a_manifest_cannot_lead_out_of_the_cache(registry: Registry, rows: Path, tmp_path: Path) -> None:
    """A store that someone else can write must not write outside the cache."""
    registry.publish(dataset(), rows)
    key = "index/rows/versions/000001.json"
    record = registry._objects.get(key)
    assert record is not None
    registry._objects.put(key, record.replace(b'"train.jsonl"', b'"../../train.jsonl"'))
    fresh = Registry.open(registry.url)
    with pytest.raises(CorruptError, match="unsafe paths"):
        fresh.fetch(fresh.resolve("rows"), tmp_path / "deep" / "cache")
    assert not (tmp_path / "train.jsonl").exists()


def test_abandoned_uploads_go_in_time(registry: Registry, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry._objects.put(f"content/rows/{'a' * 32}/train.jsonl", b"left by a killed publisher")
    registry.publish(dataset(), rows)
    assert any("a" * 32 in info.key for info in registry._objects.list("content"))
    monkeypatch.setattr(content, "ABANDONED_AFTER", content.ABANDONED_AFTER * 0)
    registry.publish(dataset(), rows)
    assert not any("a" * 32 in info.key for info in registry._objects.list("content"))
    assert len({info.key.split("/")[2] for info in registry._objects.list("content")}) == 2
