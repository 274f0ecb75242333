"""Split aliases: whole or not at all, ended by any move of the alias, unseen by readers that know none."""

import concurrent.futures
import json
from pathlib import Path

import pytest

from adaptfleet.cli import main
from adaptfleet.contracts.errors import ContractError, NotFoundError, StoreError
from adaptfleet.on_ray.serve.canary import is_shadowed, version_for
from adaptfleet.store.records import AliasSplit
from adaptfleet.store.registry import Registry
from tests.store.drafts import dataset


@pytest.fixture
def published(registry: Registry, rows: Path) -> Registry:
    """Five versions of `rows`; prod is the fifth."""
    for number in range(5):
        (rows / "train.jsonl").write_text(json.dumps({"text": str(number)}) + "\n")
        registry.publish(dataset(), rows)
    registry.set_alias("rows", "prod", 3)
    return registry


def _shares(registry: Registry, alias: str = "prod") -> dict[int, float]:
    split = Registry.open(registry.url).snapshot()["rows"].splits.get(alias)
    return {share.version: share.weight for share in split.shares} if split else {}


def test_a_split_is_seen_by_who_polls_and_taken_back_in_one_step(published: Registry) -> None:
    polling = Registry.open(published.url)
    assert not polling.snapshot()["rows"].splits
    published.split("rows", {3: 95, 4: 5}, shadow=5, shadow_percent=20)
    split = polling.snapshot()["rows"].splits["prod"]
    assert {share.version: share.weight for share in split.shares} == {3: 95, 4: 5}
    assert split.shadow is not None and (split.shadow.version, split.shadow.weight) == (5, 20)
    assert polling.snapshot()["rows"].aliases["prod"] == 3, "a reader that knows no splits sees the alias alone"
    assert published.rollback("rows").version == 3
    assert not polling.snapshot()["rows"].splits
    assert published.rollback("rows").version == 5, "the next one goes further back"


@pytest.mark.parametrize("end", ["promote", "promote what it is", "publish", "rollback of an older tool"])
def test_any_move_of_the_alias_ends_its_split(published: Registry, rows: Path, end: str) -> None:
    published.set_alias("rows", "canary", 3)
    published.split("rows", {3: 50, 4: 50})
    published.split("rows", {3: 50, 4: 50}, alias="canary")
    match end:
        case "promote":
            published.set_alias("rows", "prod", 4)
        case "promote what it is":
            published.set_alias("rows", "prod", 3)
        case "publish":
            published.publish(dataset(), rows)
        case _:
            published._move("rows", "prod", lambda now: (5, ()))
    assert _shares(published) == {}
    assert _shares(published, "canary") == {3: 50, 4: 50}, "each alias is split by itself"
    published.set_alias("rows", "prod", 3)
    assert _shares(published) == {}, "a split that has ended does not come back"


def test_a_version_with_a_share_is_not_removed(published: Registry) -> None:
    published.split("rows", {3: 95, 4: 5}, shadow=5)
    for version in (3, 4, 5):
        with pytest.raises(StoreError, match="prod"):
            published.remove("rows", version)
    published.rollback("rows")
    published.remove("rows", 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": {3: 95, 9: 5}, "shadow": 8}, r"rows@8 does not exist; rows@9 does not exist"),
        ({"weights": {1: 50, 4: 50}}, "points to version 3, which has no share"),
        ({"weights": {3: 95, 4: 0}}, "the weight of version 4 is 0"),
        ({"weights": {3: 95, 4: float("nan")}}, "the weight of version 4 is nan"),
        ({"weights": {3: 100}}, "one version alone is no split"),
        ({"weights": {}}, "neither shares nor a shadow"),
        ({"weights": {3: 1, 4: 1}, "shadow": 4}, "one of both"),
        ({"weights": {}, "shadow": 4, "shadow_percent": 0.0}, "percent is 0"),
    ],
)
def test_what_is_no_split_is_refused_before_anything_is_written(published: Registry, given: dict[str, object], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        published.split("rows", **given)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError):
        published.split("rows", {3: 1, 4: 1}, alias="nowhere")
    assert not [info for info in published._objects.list("index") if "splits" in info.key]


def test_many_who_split_at_once(published: Registry) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda weight: Registry.open(published.url).split("rows", {3: 100 - weight, 4: weight}), range(1, 9)))
    shares = _shares(published)
    assert shares[3] + shares[4] == 100
    assert len([info for info in published._objects.list("index/rows/splits") if info.key.endswith(".json")]) == 8


def _split(shares: dict[int, float], shadow: float | None = None) -> AliasSplit:
    values = {
        "shares": [{"version": v, "weight": w} for v, w in shares.items()],
        "on_move": "x",
        "split": "y",
        "made_at": "2026-01-01T00:00:00Z",
    }
    if shadow:
        values["shadow"] = {"version": 9, "weight": shadow}
    return AliasSplit.model_validate_json(json.dumps(values))


def test_users_stay_where_they_are_and_shares_are_kept() -> None:
    def dealt(shares: dict[int, float]) -> dict[str, int]:
        return {user: version_for(_split(shares), "name", "prod", user) for user in users}

    users = [f"acme\0user-{i}" for i in range(4000)]
    five, twenty, both = dealt({3: 95, 4: 5}), dealt({3: 80, 4: 20}), dealt({3: 90, 4: 5, 5: 5})
    assert five == dealt({4: 5, 3: 95}), "the same user has the same version, however the shares are written"
    assert list(five.values()).count(4) / 4000 == pytest.approx(0.05, abs=0.012)
    assert list(twenty.values()).count(4) / 4000 == pytest.approx(0.20, abs=0.02)
    assert all(twenty[user] == 4 for user in users if five[user] == 4), "a growing canary keeps its users"
    assert all(both[user] in (4, 5) for user in users if five[user] == 4), "a second canary takes users, and gives none back"
    assert {version_for(_split({3: 50, 4: 50}), f"name-{i}", "prod", "one user") for i in range(64)} == {3, 4}, "not always the same users"


def test_a_shadow_gets_its_percentage() -> None:
    split = _split({}, shadow=25)
    assert sum(is_shadowed(split, f"request-{i}") for i in range(4000)) / 4000 == pytest.approx(0.25, abs=0.03)
    assert not is_shadowed(_split({3: 1, 4: 1}), "request")


def test_the_command(published: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", published.url]
    assert main(["models", *store, "split", "rows", "3=95", "4=5", "--shadow", "5", "--shadow-percent", "10"]) == 0
    assert capsys.readouterr().out == "rows@prod -> version 3: 95%, version 4: 5%, shadow version 5: 10%\n"
    assert main(["models", *store, "list"]) == 0
    assert "prod=3 (version 3: 95%, version 4: 5%, shadow version 5: 10%)" in capsys.readouterr().out
    assert main(["models", *store, "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["splits"]["prod"]["shares"] == [
        {"version": 3, "weight": 95.0},
        {"version": 4, "weight": 5.0},
    ]
    assert main(["models", *store, "rollback", "rows"]) == 0
    assert _shares(published) == {}
    assert main(["models", *store, "split", "rows", "3:95", "4=x", "3=1", "3=2"]) == 2
    assert "'3:95', '4=x', '3=2': a share is VERSION=WEIGHT" in capsys.readouterr().err
