"""The plot of a front: what it shows, what it leads to, and that nothing a name holds becomes markup."""

import re
import xml.etree.ElementTree as ET

from adaptfleet.core.reports.scatter import Dot, anchor, scatter


def dots() -> list[Dot]:
    return [
        Dot("a", 100.0, 3.0, is_best=True, values={"bits": "16"}, detail="a\nnll 3"),
        Dot("b", 50.0, 4.0, is_best=True, values={"bits": "8"}),
        Dot("<c>", 120.0, 5.0, is_barred=True, values={"bits": "8 & more"}),
    ]


def test_every_dot_leads_to_its_row_and_can_be_hidden_by_its_values() -> None:
    drawn = scatter("t", dots(), "bytes", "nll", baseline="a", recommended="b")
    svg = ET.fromstring(re.search(r"<svg.*</svg>", drawn, re.DOTALL)[0].replace("&quot;", ""))  # type: ignore[index]
    links = svg.findall("a")
    assert {link.get("href") for link in links} == {f"#{anchor(name)}" for name in ("a", "b", "<c>")}
    assert [circle.get("class") for link in links for circle in link.findall("circle")].count("ring") == 1
    assert len([path for link in links for path in link.findall("path")]) == 1
    boxes = re.findall(r'id="box-([\w-]+)"', drawn)
    classes = {link.get("class") for link in links}
    assert set(boxes) == classes and len(boxes) == 3
    assert all(f".pareto:has(#box-{mark}:not(:checked)) .{mark} {{ display: none; }}" in drawn for mark in boxes)
    assert "<c>" not in drawn and "<script" not in drawn


def test_the_stairs_join_the_front_from_left_to_right() -> None:
    drawn = scatter("t", dots(), "bytes", "nll")
    corners = [tuple(map(float, pair.split(","))) for pair in re.search(r'class="steps" points="([^"]*)"', drawn)[1].split()]  # type: ignore[index]
    assert len(corners) == 3 and corners == sorted(corners)
    assert corners[0][1] == corners[1][1] and corners[1][0] == corners[2][0], "level until the next point, then down to it"


def test_an_axis_of_one_value_has_no_boxes() -> None:
    assert "checkbox" not in scatter("t", [Dot("a", 1.0, 1.0, values={"x": "1"})], "x", "y")
    assert scatter("t", [], "x", "y") == ""
