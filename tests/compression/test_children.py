"""Which adapters a compressed model serves: a rounded one those of its parent, as its manifest says; a pruned one its own alone."""

import asyncio
from pathlib import Path

import pytest

from adaptfleet.contracts.artifacts import Draft, Manifest
from adaptfleet.contracts.errors import ModelError, PublishError
from adaptfleet.contracts.evaluating import EvaluateJob
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.core.models.loading import base_revision
from adaptfleet.on_ray.evaluate.subjects import resolve_subjects
from adaptfleet.on_ray.published_models import adapters_taken, at_hand
from adaptfleet.on_ray.serve.bases import ServedBase
from adaptfleet.on_ray.serve.catalog import Catalog
from adaptfleet.on_ray.serve.refusal import RefusalError
from adaptfleet.store.registry import Registry
from tests.serve.tiny_llama import make_adapter, make_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("children")
    parent = make_base(root / "parent")
    return {"parent": parent, "child": make_base(root / "child", seed=5), "adapter": make_adapter(parent, root / "adapter", rank=4)}


@pytest.fixture
def registry(fresh_home: Path, folders: dict[str, Path]) -> Registry:
    """`rounded` and `pruned` hold the same child: what they serve is what their manifests say."""
    registry, revision = Registry.open(), base_revision(folders["parent"])
    registry.publish(Draft(kind="model", name="rounded", serves_adapters_of=revision), folders["child"])
    registry.publish(Draft(kind="model", name="pruned"), folders["child"])
    registry.publish(
        Draft(kind="adapter", name="task", base="parent", base_revision=revision, method={"kind": "lora", "rank": 4}), folders["adapter"]
    )
    return registry


def served(registry: Registry, name: str) -> Manifest | None:
    spec = ModelSpec(source=name)
    folder = Path(at_hand(spec, registry).source)
    catalog = Catalog(registry, ServedBase(name, base_revision(folder), adapters_taken(spec, registry)))
    listed = {card.id for card in asyncio.run(catalog.cards())}
    assert ("task" in listed) == (name == "rounded")
    return asyncio.run(catalog.find("task")).adapter


def test_the_endpoint_of_a_rounded_model_takes_its_parents_adapters(registry: Registry) -> None:
    adapter = served(registry, "rounded")
    assert adapter and adapter.reference == "task@1"


def test_the_endpoint_of_a_pruned_model_refuses_them(registry: Registry) -> None:
    with pytest.raises(RefusalError, match=r"task@1 was trained on parent of revision .*; this endpoint serves pruned of revision"):
        served(registry, "pruned")


def test_an_evaluation_does_the_same(registry: Registry) -> None:
    def resolve(base: str) -> None:
        resolve_subjects(EvaluateJob.model_validate({"subjects": ["base", "task"], "model": {"source": base}}), registry)

    resolve("rounded")
    with pytest.raises(ModelError, match=r"task@1 was trained on parent of the revision"):
        resolve("pruned")


def test_only_a_model_serves_adapters_of_another(registry: Registry, folders: dict[str, Path]) -> None:
    draft = Draft(kind="adapter", name="odd", base="parent", base_revision="0" * 64, serves_adapters_of="0" * 64)
    with pytest.raises(PublishError, match="serves_adapters_of is given, but this is of the kind adapter"):
        registry.publish(draft, folders["adapter"])
