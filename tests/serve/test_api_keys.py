"""Keys: made once, private, and wrong ones named without showing them."""

from pathlib import Path

import pytest

from adaptfleet.contracts.errors import ServingError
from adaptfleet.on_ray.serve.api_keys import ApiKeys, ensure_keys, first_key, keys_file

pytestmark = pytest.mark.usefixtures("fresh_home")


def test_one_is_made_at_the_first_start_and_kept() -> None:
    assert ensure_keys() == str(keys_file())
    key = first_key()
    ensure_keys()
    assert first_key() == key
    assert keys_file().stat().st_mode & 0o777 == 0o600
    assert ApiKeys().tenant(key) == "default"
    assert not [file for file in keys_file().parent.iterdir() if file != keys_file()]


def test_the_environment_comes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTFLEET_API_KEYS", "red:red-key-of-enough-length, blue:blue-key-of-enough-length")
    keys = ApiKeys()
    assert keys.tenant("red-key-of-enough-length") == "red"
    assert keys.tenant("blue-key-of-enough-length") == "blue"
    assert keys.tenant("blue-key-of-enough-lengtH") is None
    assert keys.tenant("") is None
    assert keys.tenant("\udcff") is None
    assert first_key() == "red-key-of-enough-length"
    assert not keys_file().exists()


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
    assert keys.tenant(key) is None
