"""Keys: made once, private, and wrong ones named without showing them."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from adaptfleet.contracts.errors import ContractError, ServingError
from adaptfleet.on_ray.serve.api_keys import ApiKeys, Caller
from adaptfleet.on_ray.serve.key_file import (
    add_key,
    client_key_file,
    ensure_keys,
    first_key,
    hash_plain_keys,
    keys_file,
    revoke_key,
    rotate_key,
    save_client_key,
)

pytestmark = pytest.mark.usefixtures("fresh_home")


def test_one_is_made_at_the_first_start_and_kept() -> None:
    assert ensure_keys() == str(keys_file())
    key = first_key()
    ensure_keys()
    assert first_key() == key
    assert keys_file().stat().st_mode & 0o777 == 0o600
    assert client_key_file().stat().st_mode & 0o777 == 0o600
    assert _tenant(ApiKeys(), key) == "default"
    assert key not in keys_file().read_text(), "only its hash is kept there"
    assert {file.name for file in keys_file().parent.iterdir()} == {"api-keys", "client-key", ".api-keys.lock"}


def test_the_environment_comes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFLEET_API_KEYS", "red:red-key-of-enough-length, blue:blue-key-of-enough-length")
    keys = ApiKeys()
    assert _tenant(keys, "red-key-of-enough-length") == "red"
    assert _tenant(keys, "blue-key-of-enough-length") == "blue"
    assert [keys.caller(wrong) for wrong in ("blue-key-of-enough-lengtH", "", "\udcff")] == [None] * 3
    assert first_key() == "red-key-of-enough-length"
    assert not keys_file().exists()
    with pytest.raises(ContractError, match="ADAPTFLEET_API_KEYS"):
        add_key("green")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("a-key-of-enough-length-alone", "entry 1 is not of the form"),
        ("red:short", "entry 1 (tenant red)"),
        ("../x:a-key-of-enough-length", "entry 1 is not of the form"),
        ("red:a-key-of-enough-length,blue:with a blank in its middle", "entry 2 (tenant blue)"),
        (",", "no key in it"),
    ],
)
def test_bad_entries_are_named_without_the_key(monkeypatch: pytest.MonkeyPatch, given: str, said: str) -> None:
    monkeypatch.setenv("ADAPTFLEET_API_KEYS", given)
    with pytest.raises(ServingError) as raised:
        ApiKeys()
    assert said in str(raised.value)
    assert not [key for key in ("a-key-of-enough-length", "short", "with a blank") if key in str(raised.value)]


def test_a_file_that_others_may_read_is_refused() -> None:
    ensure_keys()
    keys_file().chmod(0o644)
    with pytest.raises(ServingError, match="chmod 600"):
        ApiKeys()


def test_no_keys_no_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_keys()
    key = first_key()
    keys = ApiKeys()
    keys_file().unlink()
    monkeypatch.setattr("adaptfleet.on_ray.serve.api_keys._RECHECK_S", 0.0)
    assert keys.caller(key) is None


def test_lines_of_earlier_versions_are_read_and_can_be_hashed() -> None:
    _write("# ours\nred:red-key-of-enough-length\n\nblue:blue-key-of-enough-length\n")
    assert first_key() == "red-key-of-enough-length"
    key, record = add_key("green", models=("green-*",))
    assert hash_plain_keys() == 2
    assert hash_plain_keys() == 0
    text = keys_file().read_text()
    assert text.startswith("# ours\n{") and "key-of-enough" not in text and key not in text
    keys = ApiKeys()
    assert [_tenant(keys, f"{name}-key-of-enough-length") for name in ("red", "blue")] == ["red", "blue"]
    assert keys.caller(key) == Caller("green", record.id, ("green-*",))
    with pytest.raises(ServingError, match="keys add NAME --save"):
        first_key()
    save_client_key(key)
    assert first_key() == key


def test_a_key_ends_is_rotated_and_revoked_while_the_endpoint_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.api_keys._RECHECK_S", 0.0)
    old, record = add_key("acme", models=("a*",))
    past, _ = add_key("acme", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    keys = ApiKeys()
    assert _tenant(keys, old) == "acme"
    found = keys.caller(past)
    assert found is not None and found.expired
    new, replaced, ended = rotate_key(record.id, timedelta(hours=1))
    assert (replaced.tenant, replaced.models, ended.id) == ("acme", ("a*",), record.id)
    assert [_tenant(keys, key) for key in (old, new)] == ["acme", "acme"]
    assert not keys.caller(old).expired  # type: ignore[union-attr]
    rotate_key(record.id, timedelta(0))
    assert keys.caller(old).expired  # type: ignore[union-attr]
    revoke_key(replaced.id)
    assert keys.caller(new) is None
    with pytest.raises(ContractError, match="no key has the id"):
        revoke_key(replaced.id)


def test_a_broken_edit_leaves_the_last_good_keys_in_force(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("adaptfleet.on_ray.serve.api_keys._RECHECK_S", 0.0)
    key, _ = add_key("acme")
    keys = ApiKeys()
    _write("this is no entry\n")
    assert _tenant(keys, key) == "acme"
    assert "entry 1 is not of the form" in caplog.text


def test_many_writers_lose_no_key() -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda i=i: made.append(add_key(f"tenant-{i}")[0])) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = ApiKeys()
    assert sorted(str(_tenant(keys, key)) for key in made) == sorted(f"tenant-{i}" for i in range(12))


@pytest.mark.parametrize(("tenant", "said"), [("../x", "safe name"), ("", "safe name")])
def test_a_key_that_cannot_be(tenant: str, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        add_key(tenant)
    assert not keys_file().exists()


def _tenant(keys: ApiKeys, key: str) -> str | None:
    caller = keys.caller(key)
    return None if caller is None else caller.tenant


def _write(text: str) -> None:
    keys_file().write_text(text)
    keys_file().chmod(0o600)
