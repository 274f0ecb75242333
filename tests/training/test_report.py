"""The report of a run: well-formed, self-contained, every logged point in its curve, and no text of a row becomes markup."""

import itertools
import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from adaptfleet.contracts.artifacts import FileEntry, Manifest
from adaptfleet.contracts.jobs import FinetuneJob
from adaptfleet.contracts.loading import parse_contract
from adaptfleet.core.data.encoding import Encoded
from adaptfleet.core.data.examples import Example, Message
from adaptfleet.core.data.tokens import Rows, TokenFile, record_batch, write_tokens
from adaptfleet.core.reports.charts import MAX_MARKS, histogram, line_chart
from adaptfleet.core.steps import plan_steps
from adaptfleet.on_ray.train.report import write_report
from adaptfleet.on_ray.train.run_folder import RunFolder
from adaptfleet.on_ray.train.samples import write_after, write_before

HOSTILE = '</div><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\x00"\''
VOID = {"meta"}


class Page(HTMLParser):
    """Every element in its place, or an AssertionError."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def train_line(step: int) -> dict[str, float]:
    return {"loss": 3 / step, "learning_rate": 1e-3 / step, "grad_norm": 0.5 + step, "tokens_per_s": 300.0 + step}


@pytest.fixture
def folder(fresh_home: Path) -> tuple[RunFolder, FinetuneJob, Manifest]:
    job = parse_contract(FinetuneJob, f"data: {{train: {json.dumps('./' + HOSTILE + '.jsonl')}}}\npublish: {{name: tickets}}\n")
    folder = RunFolder.open(job)
    write_tokens(
        fresh_home / "tokens.arrow", [record_batch([Encoded(list(range(n)), [False] + [True] * (n - 1)) for n in (5, 8, 8, 20, 3)])]
    )
    train, test = (Rows([TokenFile(fresh_home / "tokens.arrow")], np.asarray(numbers)) for numbers in ([0, 1, 2, 3], [4]))
    folder.write_rows(train, test, plan_steps(train, job.train), [])
    lines = [{"kind": "train", "step": step, **train_line(step)} for step in range(1, 21)]
    lines.insert(10, {"kind": "evaluation", "step": 10, "eval_loss": 1.25, "exact_match": 0.5})
    lines.append({"kind": "evaluation", "step": 20, "eval_loss": 0.75, "exact_match": 0.875})
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        "base": "tiny", "base_revision": "a" * 64, "data_sha256": "b" * 64, "fingerprint": job.fingerprint(), "num_steps": 20,
        "num_duplicates": 1, "num_tokens": 1234, "pack_fill": 0.93, "libraries": {"torch": "2.0"},
    }  # fmt: skip
    folder.write_json("facts.json", facts)
    examples = [
        Example((Message("user", HOSTILE), Message("assistant", "right"))),
        Example((Message("user", "q"), Message("assistant", HOSTILE))),
    ]
    write_before(folder, examples, [HOSTILE, ""])
    write_after(folder, ["right", "no"])
    manifest = Manifest(
        kind="adapter",
        name="tickets",
        version=3,
        base="tiny",
        parents=(f"data:{HOSTILE}",),
        metrics={"exact_match": 0.875, "num_steps": 20.0},
        files={"adapter_config.json": FileEntry(sha256="c" * 64, num_bytes=1)},
        created_at=datetime.now(UTC),
    )
    return folder, job, manifest


def test_the_page_is_whole_and_needs_nothing_else(folder: tuple[RunFolder, FinetuneJob, Manifest]) -> None:
    file = write_report(*folder[:2], folder[2].metrics, folder[2])
    page = Page(file.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "object", "embed", "form", "a", "base"} == set()
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "srcset") for name in attributes)
    assert "http" not in re.sub(r"http-equiv", "", file.read_text(encoding="utf-8"))
    assert [f.name for f in file.parent.iterdir() if f.name.startswith(".report")] == []


def test_a_rows_text_is_shown_as_it_is_and_is_never_markup(folder: tuple[RunFolder, FinetuneJob, Manifest]) -> None:
    text = write_report(*folder[:2], folder[2].metrics, folder[2]).read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text
    shown = "".join(Page(text).texts)
    # prompt, before; expected; source, parent, and once more in the contract, where YAML writes it in its own quotes
    assert shown.count("</div><script>alert(1)</script>") >= 5
    assert "before training · wrong" in shown and "after training · right" in shown


def test_the_curves_hold_every_logged_point(folder: tuple[RunFolder, FinetuneJob, Manifest]) -> None:
    page = Page(write_report(*folder[:2], folder[2].metrics, folder[2]).read_text(encoding="utf-8"))
    values = {key: [f"step {step}: {train_line(step)[key]:.6g}" for step in range(1, 21)] for key in train_line(1)}
    for points in values.values():
        for point in points:
            assert point in page.texts
    assert "step 10: 1.25" in page.texts and "step 20: 0.75" in page.texts
    lines = [str(attributes["points"]).split() for tag, attributes in page.tags if tag == "polyline"]
    assert [len(points) for points in lines] == [20, 20, 20, 20, 2]
    places = [tuple(map(float, point.split(","))) for point in lines[0]]
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(places)), "a falling loss falls in the drawing"
    for label in ("training loss", "learning rate", "gradient norm", "tokens per second", "held-out loss", "lengths of training rows"):
        assert label in page.texts
    assert "4, 41 tokens, 37 of them in the loss" in page.texts


def test_a_long_curve_keeps_every_point_and_thins_its_marks() -> None:
    points = [(float(i), 1.0 / i) for i in range(1, 5001)]
    page = Page(line_chart("loss", points, noisy=True))
    drawn = [str(attributes["points"]).split() for tag, attributes in page.tags if tag == "polyline"]
    assert [len(line) for line in drawn] == [5000, 5000]
    assert MAX_MARKS / 2 < sum(tag == "circle" for tag, _ in page.tags) <= MAX_MARKS + 1
    assert "step 5000: 0.0002" in page.texts


@pytest.mark.parametrize(
    "values", [[0.5], [0.0], [2.0, 2.0, 2.0], [1e-9, 3e-9], [-5.0, 1e9], [1.0, float("nan"), 2.0, float("inf")], [1e300, -1e300]]
)
def test_curves_of_any_numbers_stay_in_the_drawing(values: list[float]) -> None:
    page = Page(line_chart("x", list(enumerate(values, 1))))
    for tag, attributes in page.tags:
        if tag == "circle":
            assert 0 <= float(str(attributes["cx"])) <= 560 and 0 <= float(str(attributes["cy"])) <= 220
    assert (" · 2 not finite" in "".join(page.texts)) == (len(values) == 4)
    assert line_chart("x", [(1, float("nan"))]) == "" and line_chart("x", []) == ""


@pytest.mark.parametrize("values", [[7], [1, 1, 1], list(range(1000)), [1, 100_000]])
def test_a_histogram_counts_every_value_once(values: list[int]) -> None:
    bars = [text for text in Page(histogram("lengths", values, "tokens")).texts if " tokens: " in text]
    assert sum(int(bar.rpartition(" ")[2]) for bar in bars) == len(values) and len(bars) <= 24
