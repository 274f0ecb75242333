"""Recomputes the quickstart's figures from the saved answers, with code of its own, and fails where they differ.

python bench/rescore.py
"""

import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "quickstart.json"
ANSWERS = Path(__file__).parent / "results" / "raw" / "quickstart_answers.jsonl"


class Pairs(list):
    """A JSON object as it stands in the text, repeated keys and all."""


def as_object(text: str) -> dict[str, str] | None:
    """None for what is no JSON object, and for one with a key given twice: which of its values is meant cannot be told."""
    try:
        value = json.loads(text, object_pairs_hook=Pairs)
    except ValueError:
        return None
    if not isinstance(value, Pairs) or len({key for key, _ in value}) < len(value):
        return None
    return dict(value)


def main() -> int:
    if not ANSWERS.is_file():
        print(f"{ANSWERS} is not there: run `make quickstart` first")
        return 2
    results = json.loads(RESULTS.read_text())
    rows = [json.loads(line) for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    status = 0
    for series in sorted({row["series"] for row in rows}):
        mine = [row for row in rows if row["series"] == series]
        exact = common = given = wanted = 0
        for row in mine:
            expected, answer = as_object(row["expected"]) or {}, as_object(row["answer"])
            exact += answer == expected
            common += sum(1 for key, value in (answer or {}).items() if expected.get(key) == value)
            given += len(answer or {})
            wanted += len(expected)
        for figure, value in (("exact_match", exact / len(mine)), ("field_f1", 2 * common / (given + wanted))):
            name = f"{series}_{figure}"
            agrees = abs(value - results[name]) <= 5.1e-5  # written with four decimals
            status |= not agrees
            print(f"{name:<32} {value:.4f}  {'as printed' if agrees else f'DIFFERS from {results[name]:.4f}'}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
