"""The report's plots as PNG files: they open, and show each point as often as the page does."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from adaptfleet.contracts.loading import parse_contract
from adaptfleet.contracts.search import SweepJob
from adaptfleet.core.reports import raster
from adaptfleet.core.reports.charts import line_chart
from adaptfleet.core.reports.scatter import Dot, scatter
from adaptfleet.on_ray.tune.finalists import Settled
from adaptfleet.on_ray.tune.report import write_report
from adaptfleet.on_ray.tune.sweep_folder import Record, SweepFolder


def marks(content: bytes, colour: str, at_least: float) -> int:
    """Patches of a colour that are about as large as a dot of the radius, in the drawing's units; lines and letters are none."""
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    mask = np.abs(image - np.array(ImageColor.getrgb(colour))).max(axis=2) < 12
    found = 0
    while mask.any():
        start = tuple(int(i) for i in np.argwhere(mask)[0])
        mask[start], todo, size = False, [start], 0
        while todo:
            row, column = todo.pop()
            size += 1
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1] and mask[near]:
                    mask[near] = False
                    todo.append(near)
        found += size > 0.8 * math.pi * (at_least * raster.SCALE) ** 2
    return found


def test_a_front_has_its_dots() -> None:
    best = [Dot("a", 100.0, 3.0, is_best=True)]
    others = [Dot("b", 50.0, 4.5), Dot("<c>", 120.0, 5.0), Dot("d", 110.0, 4.5), Dot("e", 130.0, 4.0, is_barred=True)]
    content = raster.png(scatter("t & t", [*best, *others], "bytes", "nll", recommended="a"))
    assert content.startswith(b"\x89PNG") and Image.open(io.BytesIO(content)).size[0] == 980 * raster.SCALE
    assert marks(content, raster.ACCENT, 6) == 1 and marks(content, raster.FAINT, 5) == 3
    assert marks(content, raster.GOOD, 2) == 1, "the ring around the recommended one"


def test_a_figure_without_a_drawing_is_told() -> None:
    with pytest.raises(ValueError, match="holds no drawing"):
        raster.png(line_chart("t", []))


def settled(sweep: SweepJob, count: int) -> Settled:
    records = [
        Record(
            f"rank{n}", {"rank": None, "ratio": 0.0, "bits": "16"}, "finished", {"nll": 2.0 - 0.3 * n, "bytes": (n + 1) * 1e8}, search_s=n
        )
        for n in range(count)
    ]
    return Settled(records, records, records, [], records[0], {}, {}, records[-1], "why")


def test_the_plots_lie_beside_the_page_which_links_them(fresh_home: Path) -> None:
    sweep = parse_contract(SweepJob, "{job: sweep, name: s, space: joint}")
    folder = SweepFolder.open(sweep)
    page = write_report(sweep, folder, settled(sweep, 5)).read_text()
    assert re.findall(r'<a href="(\w+\.png)">', page) == ["front.png", "over_time.png"]
    assert not list(folder.path.glob(".*.png.*")), "whole or not there"
    front = (folder.path / "front.png").read_bytes()
    # the baseline's cross cuts the middle out of its dot
    assert marks(front, raster.ACCENT, 3) == 4
    assert marks((folder.path / "over_time.png").read_bytes(), raster.ACCENT, 3) == 5


def test_one_objective_has_no_front_to_draw(fresh_home: Path, monkeypatch: Any) -> None:
    sweep = parse_contract(SweepJob, "{job: sweep, name: s, space: distill_alpha}")
    folder = SweepFolder.open(sweep)
    records = [Record(f"alpha{n}", {"alpha": 0.5, "temperature": 1.0}, "finished", {"eval_loss": 2.0 - n}, search_s=n) for n in range(3)]
    write_report(sweep, folder, Settled(records, records, records[-1:], [], None, {}, {}, records[-1], "why"))
    assert not (folder.path / "front.png").exists() and (folder.path / "over_time.png").exists()
