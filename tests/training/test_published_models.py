"""A published checkpoint as a base: found by its reference, and nothing else taken for one."""

from pathlib import Path

import pytest

from adaptfleet.contracts.artifacts import Draft
from adaptfleet.contracts.errors import ModelError
from adaptfleet.contracts.model import ModelSpec
from adaptfleet.contracts.serving import ServingSpec
from adaptfleet.core.models.loading import base_revision, load_base, resolve_model_folder
from adaptfleet.on_ray.published_models import at_hand
from adaptfleet.store.registry import Registry


@pytest.fixture
def registry(fresh_home: Path, tiny_base: Path) -> Registry:
    registry = Registry.open()
    registry.publish(Draft(kind="model", name="merged"), tiny_base)
    (fresh_home / "rows").mkdir()
    (fresh_home / "rows" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    registry.publish(Draft(kind="dataset", name="rows"), fresh_home / "rows")
    return registry


@pytest.mark.parametrize("source", ["merged", "merged@1", "merged@prod"])
def test_a_reference_becomes_the_folder_of_its_files(registry: Registry, tiny_base: Path, source: str) -> None:
    found = at_hand(ModelSpec(source=source, dtype="float32"))
    assert base_revision(resolve_model_folder(found)) == base_revision(tiny_base)
    load_base(found)


def test_the_served_name_is_the_models(registry: Registry) -> None:
    assert ServingSpec(model=ModelSpec(source="merged@1")).base_id() == "merged"


@pytest.mark.parametrize("source", ["smollm2-135m", "org/merged", "./merged", "other", "no such name!"])
def test_anything_else_stays_as_it_is(registry: Registry, source: str) -> None:
    assert at_hand(ModelSpec(source=source)).source == source


def test_what_is_no_model_is_refused(registry: Registry) -> None:
    with pytest.raises(ModelError, match=r"'rows' is rows@1 of the registry, which is of the kind dataset, not a model"):
        at_hand(ModelSpec(source="rows"))
