"""Several bases: which one answers for a model, what is built for them, and what is refused before anything starts."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import BaseSpec, ServingSpec
from adaptfleet.on_ray.serve.bases import ServedBase, deployment_name
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.deployment import build, cores_of
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.on_ray.serve.routing import RecentPrefixes, Replica, Wanted, choose
from adaptfleet.on_ray.serve.viewer import Viewer
from adaptfleet.store.registry import Registry
from k8s.validation.serve_config import replicas
from tests.serve.tiny_llama import make_adapter, make_base

TINY, SMALL, OTHER = "1" * 64, "2" * 64, "3" * 64
BASES = (ServedBase("tiny", TINY), ServedBase("tiny-w8", SMALL, frozenset({TINY})), ServedBase("other", OTHER))


LORA = {"kind": "lora", "rank": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter's files for all: here it counts what their manifests say."""
    root = tmp_path_factory.mktemp("adapter")
    return make_adapter(make_base(root / "base"), root / "adapter", 4)


@pytest.fixture
def registry(fresh_home: Path, folder: Path) -> Registry:
    registry = Registry.open()
    for name, base, revision in (("streets", "tiny", TINY), ("numbers", "other", OTHER), ("strange", "far", "4" * 64)):
        registry.publish(Draft(kind="adapter", name=name, base=base, base_revision=revision, method=LORA), folder)
    return registry


def _catalog(registry: Registry, of: str = "tiny") -> Catalog:
    own = next(base for base in BASES if base.id == of)
    return Catalog(registry, own, BASES)


def _base(catalog: Catalog, model: str | None, **viewer: Any) -> str:
    return asyncio.run(catalog.find(model, Viewer(**viewer))).base


def _refusal(catalog: Catalog, model: str, **viewer: Any) -> RefusalError:
    with pytest.raises(RefusalError) as raised:
        asyncio.run(catalog.find(model, Viewer(**viewer)))
    return raised.value


@pytest.mark.parametrize("of", ["tiny", "tiny-w8", "other"])
def test_every_process_comes_to_the_same_base(registry: Registry, of: str) -> None:
    catalog = _catalog(registry, of)
    assert [_base(catalog, base.id) for base in BASES] == ["tiny", "tiny-w8", "other"]
    assert _base(catalog, None) == "tiny"
    assert [_base(catalog, model) for model in ("numbers", "numbers@1", "numbers@prod", "other:numbers")] == ["other"] * 4
    assert _base(catalog, "counting", aliases={"counting": "other:numbers"}) == "other"


def test_an_adapter_that_two_bases_take_is_its_own_bases_unless_the_other_is_named(registry: Registry) -> None:
    catalog = _catalog(registry)
    assert _base(catalog, "streets") == "tiny"
    assert _base(catalog, "tiny-w8:streets@1") == "tiny-w8"


def test_what_fits_no_base_or_another_says_so(registry: Registry) -> None:
    catalog = _catalog(registry)
    wrong = _refusal(catalog, "tiny:numbers")
    assert (wrong.status, wrong.code) == (400, "wrong_base")
    assert "is an adapter of other, not of tiny" in wrong.message
    stranger = _refusal(catalog, "strange")
    assert (stranger.status, stranger.code) == (400, "wrong_base")
    assert all(f"{base.id} of revision {base.revision[:12]}" in stranger.message for base in BASES)
    unknown = _refusal(catalog, "other:numbrs")
    assert (unknown.status, unknown.code) == (404, "model_not_found")
    assert "Did you mean 'numbers'" in unknown.message
    hidden = _refusal(catalog, "other", may_see=lambda name: name != "other")
    assert (hidden.status, "other," in hidden.message.partition("Served:")[2]) == (404, False)


def test_the_list_has_all_bases_and_each_adapters_own(registry: Registry) -> None:
    cards = asyncio.run(_catalog(registry, "other").cards(Viewer(aliases={"counting": "numbers", "rounded": "tiny-w8:streets"})))
    assert {card.id: card.base for card in cards} == {
        "tiny": "tiny",
        "tiny-w8": "tiny-w8",
        "other": "other",
        "streets": "tiny",
        "streets@1": "tiny",
        "numbers": "other",
        "numbers@1": "other",
        "counting": "other",
        "rounded": "tiny-w8",
    }


def test_a_split_over_two_bases_is_answered_by_the_users_sides(registry: Registry, folder: Path) -> None:
    registry.publish(Draft(kind="adapter", name="streets", base="other", base_revision=OTHER, method=LORA), folder, None)
    registry.split("streets", {1: 50.0, 2: 50.0})
    catalog = _catalog(registry)
    sides = {user: _base(catalog, "streets", user=user) for user in map(str, range(40))}
    assert set(sides.values()) == {"tiny", "other"}
    assert sides == {user: _base(_catalog(registry, "other"), "streets", user=user) for user in sides}


def test_what_failed_a_request_is_asked_again_only_where_nobody_else_is() -> None:
    two = [Replica("r0", 0, frozenset({"streets"})), Replica("r1", 3)]
    assert choose(Wanted("streets", avoided=frozenset({"r0"})), two, RecentPrefixes()).id == "r1"
    assert choose(Wanted("streets", avoided=frozenset({"r0"})), two[:1], RecentPrefixes()).id == "r0"


# what is built


def _args(**first: Any) -> dict[str, Any]:
    further = {"model": {"source": "small@2"}, "replicas": {"min": 0, "max": 3}, "cpus_per_replica": 2, "drain_s": 7.0}
    return {"served_name": "tiny", "cpus_per_replica": 4, "more_bases": [further], **first}


def test_each_base_is_a_deployment_of_its_own_behind_the_gateway(fresh_home: Path) -> None:
    found = {part.name: part for part in replicas({"import_path": "serve_apps.openai:app", "args": _args(embeddings={})})}
    assert set(found) == {"gateway", "endpoint-tiny", "endpoint-small", "embedder"}
    assert [(found[name].cpus, found[name].least, found[name].most) for name in ("endpoint-tiny", "endpoint-small")] == [
        (4, 1, 1),
        (2, 0, 3),
    ]
    assert (found["gateway"].cpus, found["endpoint-small"].drain_s, found["gateway"].drain_s) == (0, 7, 120)


def test_one_base_is_built_as_before(fresh_home: Path) -> None:
    assert [part.name for part in replicas({"import_path": "serve_apps.openai:app", "args": {}})] == ["endpoint"]


def test_deployment_names_are_what_serve_takes() -> None:
    assert deployment_name("my base#1") == "endpoint-my_base_1"


def test_what_is_wrong_with_any_base_is_told_of_all(registry: Registry) -> None:
    spec = ServingSpec(
        served_name="tiny",
        pinned=("numbers", "streets", "unpublished"),
        engine_args={"model": "x"},
        more_bases=(BaseSpec(model=ModelSpec(source="/models/other"), served_name="mine", engine_args={"dtype": "y"}),),
    )
    with pytest.raises(ServingError) as raised:
        build(spec)
    for said in ("tiny: engine_args sets model", "mine: engine_args sets dtype", "numbers@1 is pinned for tiny and was trained on mine"):
        assert said in str(raised.value)
    assert "streets" not in str(raised.value)


def test_cores_are_what_is_said_and_the_rest_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    spec = parse_contract(
        ServingSpec, "cpus_per_replica: 5\nmore_bases: [{served_name: a, replicas: 2}, {served_name: b, replicas: {min: 0, max: 3}}]"
    )
    assert cores_of(spec.bases()) == [5, 2, 2]
    assert cores_of(ServingSpec().bases()) == [15]
