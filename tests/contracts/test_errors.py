"""One exception tree, each of which Ray can ship between processes."""

import inspect
import pickle

import pytest

from adaptfleet.contracts import errors

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_each_error_pickles(kind: type[errors.AdaptfleetError]) -> None:
    returned = pickle.loads(pickle.dumps(kind("rank is 0; use 1 or more")))
    assert type(returned) is kind and str(returned) == "rank is 0; use 1 or more"


def test_one_root_and_all_drawn() -> None:
    assert len(TREE) > 8
    for kind in TREE:
        assert issubclass(kind, errors.AdaptfleetError)
        assert kind.__name__ in (errors.__doc__ or "")
