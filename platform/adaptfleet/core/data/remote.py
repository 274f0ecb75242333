"""Rows that lie at a URL, brought here once for each state of the objects."""

import contextlib
import hashlib
import ipaddress
import json
import os
import shutil
import uuid
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from adaptfleet.contracts.errors import DataError
from adaptfleet.contracts.home import home

SCHEMES = ("file", "s3", "gs", "az")
_WANTED = (".jsonl", ".parquet", ".arrow", ".json")
_READ_BYTES = 32 * 1024 * 1024


def is_url(text: str) -> bool:
    return "://" in text


def local_copy(url: str) -> Path:
    """The local file or folder of a URL: the place itself for `file://`, else a copy in the home's cache, fetched again when an object's
    size or tag has changed. DataError says what failed and what to do."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise DataError(f"the URL {url!r} begins with none of {', '.join(scheme + '://' for scheme in SCHEMES)}.")
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise DataError(f"the URL {url!r} is no absolute local path. Write file:///folder/rows.jsonl.")
        return Path(unquote(parts.path))
    key = unquote(parts.path).strip("/")
    if not parts.netloc or not key:
        raise DataError(f"the URL {url!r} names no file or folder in a bucket. Write {parts.scheme}://bucket/folder.")
    bucket = f"{parts.scheme}://{parts.netloc}"
    try:
        store = from_url(bucket, **_options(parts.scheme))
        objects = _objects(store, key)
        if not objects:
            raise DataError(f"there is no file or folder {url}, or it holds no {', '.join(_WANTED[:3])} file.")
        return _fetched(store, bucket, key, objects)
    except (BaseError, ValueError, FileNotFoundError) as error:
        raise DataError(f"cannot read {url}: {_fact(error)}. {_way_out(str(error))}") from None
    except OSError as error:
        reason = error.strerror or _fact(error)
        raise DataError(f"cannot bring {url} into the cache {home() / 'cache' / 'remote'}: {reason}.") from None


def _objects(store: Any, key: str) -> list[dict[str, Any]]:
    """The one object of that key, or those right under it (and the splits' folders of a saved data set)."""
    if key.endswith(_WANTED):
        with contextlib.suppress(FileNotFoundError):  # the listing below tells a missing bucket from a missing object
            return [dict(obstore.head(store, key))]
    found: list[dict[str, Any]] = [dict(meta) for page in obstore.list(store, prefix=key) for meta in page]
    return sorted((meta for meta in found if meta["path"].endswith(_WANTED)), key=lambda meta: meta["path"])


def _fetched(store: Any, bucket: str, key: str, objects: list[dict[str, Any]]) -> Path:
    state = [[meta["path"], meta["size"], meta["e_tag"] or str(meta["last_modified"])] for meta in objects]
    digest = hashlib.sha256(json.dumps([bucket, key, state]).encode()).hexdigest()[:32]
    folder = home() / "cache" / "remote" / digest
    single = len(objects) == 1 and objects[0]["path"] == key
    place = folder / PurePosixPath(key).name
    if folder.is_dir():
        return place
    part = folder.with_name(f".part-{uuid.uuid4().hex}")
    try:
        for meta in objects:
            inside = PurePosixPath(meta["path"]).relative_to(key)
            _download(store, meta, part / place.name if single else part / place.name / inside)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process fetched the same meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _download(store: Any, meta: dict[str, Any], target: Path) -> None:
    """In pieces, each a request of its own and retried alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        for start in range(0, meta["size"], _READ_BYTES):
            out.write(obstore.get_range(store, meta["path"], start=start, end=min(start + _READ_BYTES, meta["size"])))
        out.flush()
        os.fsync(out.fileno())


def _options(scheme: str) -> dict[str, Any]:
    return {
        "client_options": {"connect_timeout": "10s", "timeout": "120s", "allow_http": scheme == "s3" and _http_allowed()},
        "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=60)},
    }


def _http_allowed() -> bool:
    """Plain http only to loopback, unless AWS_ALLOW_HTTP says that the network is trusted."""
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        return True
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _fact(error: Exception) -> str:
    return str(error).partition("\n")[0].partition("<?xml")[0].strip().rstrip(":.")


def _way_out(text: str) -> str:
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return "The bucket does not exist; correct the URL."
    if "builder error" in text:
        return "Plain http is used only on loopback: give an https endpoint, or set AWS_ALLOW_HTTP=true for a network that you trust."
    if "PermissionDenied" in text or "Unauthenticated" in text or "AccessDenied" in text:
        return "These credentials may not read it: grant read and list under the URL."
    return "Check the URL, the credentials (AWS_ACCESS_KEY_ID and so on) and that the endpoint (AWS_ENDPOINT_URL) is reachable from here."
