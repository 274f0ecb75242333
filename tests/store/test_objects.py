"""Object access: conditional creation under contention, and errors that say the way out."""

import socket
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from adaptfleet.contracts.errors import StoreError
from adaptfleet.store.objects import Objects


@pytest.fixture
def objects(store_url: str) -> Objects:
    return Objects(store_url)


def test_exactly_one_writer_creates_a_key(objects: Objects) -> None:
    with ThreadPoolExecutor(8) as pool:
        for round_number in range(25):
            written = [f"{writer}".encode() for writer in range(8)]
            won = list(pool.map(lambda content, n=round_number: objects.put_new(f"race/{n}", content), written))
            assert sum(won) == 1
            assert objects.get(f"race/{round_number}") == written[won.index(True)]


def test_objects_are_written_listed_and_deleted(objects: Objects) -> None:
    assert (objects.get("a/b"), objects.info("a/b"), objects.list("a")) == (None, None, [])
    objects.put("a/b", b"1")
    objects.put("a/b", b"23")
    objects.put("ab/c", b"")
    assert objects.get("a/b") == b"23"
    assert [(info.key, info.num_bytes) for info in objects.list("a")] == [("a/b", 2)]
    assert list(objects.folder_ages("a")) == ["b"] if objects.url.startswith("s3") else ["a"]
    objects.delete(["a/b", "a/b", "never/there"])
    assert objects.list("a") == []
    objects.delete_folder("ab")
    assert objects.list("") == []


@pytest.mark.parametrize("url", ["", "store", "/store", "ftp://x/y", "http://x", "s3://", "file://host/x", "file:relative"])
def test_urls_that_are_no_store(url: str) -> None:
    with pytest.raises(StoreError, match="the store's URL"):
        Objects(url)


def test_a_bucket_that_does_not_exist(s3_url: str) -> None:
    objects = Objects(f"s3://missing-{uuid.uuid4().hex}")
    for call in (lambda: objects.put("a", b""), lambda: objects.get("a"), lambda: objects.list("a")):
        with pytest.raises(StoreError, match="bucket does not exist: create it"):
            call()


def test_plain_http_only_on_loopback(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP=true"):
        Objects(s3_url).get("a")


def test_an_endpoint_that_is_down(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(StoreError, match="endpoint"):
            Objects(s3_url).get("a")


def test_no_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata service, which a machine with a role has, is a closed port here: the answer depends on no machine."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(StoreError, match="No credentials were found: set AWS_ACCESS_KEY_ID"):
            Objects(s3_url).get("a")
