"""Objects by URL: local disk, S3, Google Cloud Storage, Azure. Every write is whole or absent.

Built on obstore (the Rust crate object_store). A local put writes a staging file beside its target, then links (`put_new`) or renames it
into place; on the object stores `put_new` is a conditional PUT, so exactly one of several writers of a key succeeds.
"""

import ipaddress
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from adaptfleet.contracts.errors import StoreError

CHUNK_BYTES = 8 * 1024 * 1024
READ_BYTES = 32 * 1024 * 1024
SCHEMES = ("file", "s3", "gs", "az")
_MAX_PARTS = 9_000
"""S3 takes at most 10,000 parts of one upload."""
_FULL = ("StorageFull", "No space left on device", "Disk quota exceeded", "File too large", "QuotaExceeded")
_NO_CREDENTIALS = (
    "169.254.169.254",
    "169.254.170.2",
    "metadata.google.internal",
    "/latest/api/token",
    "/latest/meta-data",
    "Credential",
    "credential",
)


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    num_bytes: int
    modified_at: datetime


class Objects:
    """The objects under one URL. Keys are relative, with `/` between their parts. StoreError says what failed and what to do."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._root = _local_root(url)
        options: dict[str, Any] = {"mkdir": True}
        if self._root is None:
            options = {
                "client_options": {"connect_timeout": "10s", "timeout": "120s", "allow_http": _http_allowed(url)},
                "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=60)},
            }
        try:
            self._store = from_url(self._root.as_uri() if self._root else self.url, **options)
        except (BaseError, ValueError, OSError) as error:
            raise self._error("open", "", error) from None

    def __reduce__(self) -> tuple[type["Objects"], tuple[str]]:
        return Objects, (self.url,)

    def get(self, key: str) -> bytes | None:
        """A small object's bytes; None where there is none."""
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError as error:
            self._refuse_missing_bucket(key, error)
            return None
        except (BaseError, ValueError, OSError) as error:
            raise self._error("read", key, error) from None

    def info(self, key: str) -> ObjectInfo | None:
        try:
            return _info(obstore.head(self._store, key))
        except FileNotFoundError as error:
            self._refuse_missing_bucket(key, error)
            return None
        except (BaseError, ValueError, OSError) as error:
            raise self._error("read", key, error) from None

    def read(self, key: str, num_bytes: int) -> Iterator[bytes]:
        """The object's first `num_bytes` in pieces. Each piece is a request of its own, retried alone, however large the object."""
        for start in range(0, num_bytes, READ_BYTES):
            try:
                piece = obstore.get_range(self._store, key, start=start, end=min(start + READ_BYTES, num_bytes))
            except (BaseError, ValueError, OSError) as error:
                raise self._error("read", key, error) from None
            yield bytes(piece)

    def put(self, key: str, content: bytes) -> None:
        """Replaces the whole object; a reader sees the old or the new one."""
        self._put(key, content, mode="overwrite", use_multipart=False)

    def put_new(self, key: str, content: bytes) -> bool:
        """Creates the object, or returns False where the key is taken. Of several writers exactly one gets True."""
        try:
            self._put(key, content, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def put_stream(self, key: str, pieces: Iterable[bytes], num_bytes: int) -> None:
        """Writes a large object from pieces, in parts, without holding it in memory. `num_bytes` sizes the parts."""
        self._put(key, pieces, use_multipart=True, chunk_size=max(CHUNK_BYTES, -(-num_bytes // _MAX_PARTS)), max_concurrency=4)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """All objects under a prefix of whole key parts, in no order."""
        try:
            return [_info(meta) for page in obstore.list(self._store, prefix=prefix) for meta in page]
        except FileNotFoundError as error:
            self._refuse_missing_bucket(prefix, error)
            return []
        except (BaseError, ValueError, OSError) as error:
            raise self._error("list", prefix, error) from None

    def delete(self, keys: Iterable[str]) -> None:
        """Deletes objects; one that is gone already is no error. Local folders left empty go too."""
        for key in keys:
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError:
                continue
            except (BaseError, ValueError, OSError) as error:
                raise self._error("delete", key, error) from None
            finally:
                self._remove_empty_folders(key)

    def delete_folder(self, prefix: str) -> None:
        """Deletes all under a prefix; on a local disk also the staging files that a killed writer left, which no listing shows."""
        self.delete([info.key for info in self.list(prefix)])
        if self._root is not None and (self._root / prefix).is_dir():
            try:
                shutil.rmtree(self._root / prefix)
            except OSError as error:
                raise self._error("delete", prefix, error) from None
            self._remove_empty_folders(prefix)

    def folder_ages(self, prefix: str) -> dict[str, datetime]:
        """The folders right under a prefix, and when something was last written in each; staging files count."""
        latest: dict[str, datetime] = {}
        if self._root is None:
            for info in self.list(prefix):
                folder = info.key.removeprefix(f"{prefix}/").partition("/")[0]
                latest[folder] = max(latest.get(folder, info.modified_at), info.modified_at)
            return latest
        top = self._root / prefix
        for child in sorted(top.iterdir()) if top.is_dir() else ():
            latest[child.name] = _last_change(child)
        return latest

    def _put(self, key: str, content: bytes | Iterable[bytes], **options: Any) -> None:
        try:
            obstore.put(self._store, key, content, **options)
            if self._root is not None:
                _sync(self._root, self._root / key)
        except AlreadyExistsError:
            raise
        except (BaseError, ValueError, OSError) as error:
            raise self._error("write", key, error) from None

    def _remove_empty_folders(self, key: str) -> None:
        if self._root is None:
            return
        folder = (self._root / key).parent
        while folder != self._root:
            try:
                folder.rmdir()
            except OSError:
                return  # another file is in it, or another process was faster
            folder = folder.parent

    def _refuse_missing_bucket(self, key: str, error: Exception) -> None:
        if "NoSuchBucket" in str(error) or "bucket does not exist" in str(error):
            raise self._error("reach", key, error) from None

    def _error(self, action: str, key: str, error: Exception) -> StoreError:
        text = str(error)
        fact = text.partition("\n")[0].partition("<?xml")[0].strip().rstrip(":")
        return StoreError(f"cannot {action} {self.url}{'/' + key if key else ''}: {fact}. {self._way_out(error, text)}")

    def _way_out(self, error: Exception, text: str) -> str:
        if any(sign in text for sign in _FULL):
            return "The store is full: free space there (`adaptfleet models rm`), or point ADAPTFLEET_STORE at a larger one."
        if "NoSuchBucket" in text or "bucket does not exist" in text:
            return "The bucket does not exist: create it, or correct ADAPTFLEET_STORE."
        if "builder error" in text:
            return "Plain http is used only on loopback: give an https endpoint, or set AWS_ALLOW_HTTP=true for a network that you trust."
        if isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError)) or "PermissionDenied" in text:
            return "These credentials (or this user) may not do that: grant read, write, list and delete under the store's URL."
        if self._root is None and any(sign in text for sign in _NO_CREDENTIALS):
            return (
                "No credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL and AWS_REGION "
                "where it is not AWS itself), GOOGLE_SERVICE_ACCOUNT, or "
                "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or use a role."
            )
        if "onnect" in text:
            return "Check that the endpoint (AWS_ENDPOINT_URL) is up and reachable from here."
        return "Check the store's URL (ADAPTFLEET_STORE) and that it can be read and written from here."


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(key=meta["path"], num_bytes=meta["size"], modified_at=meta["last_modified"])


def _local_root(url: str) -> Path | None:
    """The folder of a `file://` URL; None for an object store. StoreError for any other URL."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise StoreError(f"the store's URL {url!r} begins with none of {', '.join(s + '://' for s in SCHEMES)}. Set ADAPTFLEET_STORE.")
    if parts.scheme != "file":
        if not parts.netloc:
            raise StoreError(f"the store's URL {url!r} names no bucket. Write {parts.scheme}://bucket/prefix.")
        return None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise StoreError(f"the store's URL {url!r} is no absolute local path. Write file:///folder.")
    return Path(unquote(parts.path))


def _http_allowed(url: str) -> bool:
    """Plain http only to loopback, unless AWS_ALLOW_HTTP says that the network is trusted."""
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        return True
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    host = urlsplit(endpoint).hostname if url.startswith("s3:") else None
    if not host:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _last_change(folder: Path) -> datetime:
    """When anything in a local folder was last written. Now, where files vanish while it is read: a writer is at work."""
    try:
        return datetime.fromtimestamp(max(path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), UTC)
    except FileNotFoundError:
        return datetime.now(UTC)


def _sync(root: Path, file: Path) -> None:
    """Flushes a file and the folders that name it, so that what a manifest promises outlives a power cut."""
    folder = file.parent
    folders = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
    for path in (file, *folders):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
