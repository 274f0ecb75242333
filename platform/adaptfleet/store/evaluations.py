"""Evaluations of a version: records beside it, each created once under a number of its own. The version itself never changes."""

import re

from adaptfleet.contracts.errors import StoreError
from adaptfleet.contracts.evaluating import EvaluationRecord
from adaptfleet.store.objects import Objects
from adaptfleet.store.records import evaluation_key, evaluations_prefix, from_bytes, to_bytes

_NUMBER = re.compile(r"(\d{6,})\.json")
_MAX_TRIES = 200


def add_evaluation(objects: Objects, name: str, version: int, record: EvaluationRecord) -> int:
    """Creates the record under the next free number and returns the number. A writer that loses the race takes the one after it."""
    content = to_bytes(record)
    number = max(_numbers(objects, name, version), default=0)
    for _ in range(_MAX_TRIES):
        number += 1
        key = evaluation_key(name, version, number)
        # Equal bytes, the time to the microsecond among them, are our own first attempt, whose answer was lost on the wire.
        if objects.put_new(key, content) or objects.get(key) == content:
            return number
    raise StoreError(f"evaluations of {name}@{version} were added by others {_MAX_TRIES} times while this one was tried. Try again.")


def read_evaluations(objects: Objects, name: str, version: int) -> list[EvaluationRecord]:
    """The version's records, the newest last."""
    records = []
    for number in sorted(_numbers(objects, name, version)):
        key = evaluation_key(name, version, number)
        content = objects.get(key)
        if content is not None:
            records.append(from_bytes(EvaluationRecord, key, content))
    return records


def _numbers(objects: Objects, name: str, version: int) -> set[int]:
    """Numbers given so far. What is no record of ours, such as a writer's staging file, is passed over."""
    names = (info.key.rpartition("/")[2] for info in objects.list(evaluations_prefix(name, version)))
    return {int(match[1]) for match in map(_NUMBER.fullmatch, names) if match}
