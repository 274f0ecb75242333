"""A page's figures as PNG, for places that show no SVG: the same drawing, element by element, in the page's light colours."""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html import unescape

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Pixels of a unit of the drawing."""
_FINER = 2
"""It is drawn so much larger and made smaller, for smooth edges."""
_HEAD, _FOOT = 34, 24
"""Units above the drawing, for its title, and below it, for what its marks mean where the figure says so."""
GROUND, INK, SOFT, RULE = "#ffffff", "#1f2430", "#6b7280", "#e6e7ea"
ACCENT, GOOD, BAD = "#2f6f9f", "#2e7d5b", "#b4534b"
FAINT, _LINE = "#a2a6ad", "#8fb3cc"
"""What lies behind the others, and lines: paler than the marks on them, which can be told from them so."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def png(figure: str) -> bytes:
    """A figure of `scatter` or `line_chart` as a PNG file. ValueError: it holds no drawing."""
    found = re.search(r"<svg\b.*?</svg>", figure, re.DOTALL)
    if found is None:
        raise ValueError("the figure holds no drawing")
    drawing = ET.fromstring(found[0])
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    key = re.search(r'<div class="key">([^<]*)</div>', figure)
    canvas = _Canvas(width, _HEAD + height + (_FOOT if key else 0))
    if key:
        canvas.text(14, height + 14, unescape(key[1]), 11, SOFT, "l")
    captions = [unescape(text) for text in re.findall(r"<span[^>]*>([^<]*)</span>", figure.partition("</figcaption>")[0])]
    for caption, anchor, x, colour in zip(captions, "lr", (14.0, width - 14), (INK, SOFT), strict=False):
        canvas.text(x, 22 - _HEAD, caption, 14, colour, anchor)
    for element in _flat(drawing):
        _draw(canvas, element)
    return canvas.file()


def _flat(element: ET.Element) -> Iterator[ET.Element]:
    """In the order in which they lie over each other, links left out."""
    for child in element:
        yield child
        if child.tag == "a":
            yield from _flat(child)


def _draw(canvas: "_Canvas", element: ET.Element) -> None:
    kind, at = element.get("class", ""), {key: float(value) for key, value in element.attrib.items() if _NUMBER.fullmatch(value)}
    match element.tag:
        case "line":
            canvas.line([(at["x1"], at["y1"]), (at["x2"], at["y2"])], RULE, 1)
        case "text":
            anchor = {"end": "r", "middle": "m"}.get(element.get("text-anchor", ""), "l")
            canvas.text(at["x"], at["y"], element.text or "", 11, SOFT, anchor)
        case "polyline":
            numbers = list(map(float, _NUMBER.findall(element.get("points", ""))))
            canvas.line(list(zip(numbers[::2], numbers[1::2], strict=True)), _LINE, 1.0 if "faint" in kind else 1.8)
        case "circle" if "hidden" not in kind:
            filled = {"mark": ACCENT, "dot best": ACCENT, "dot": FAINT}.get(kind)
            canvas.circle(at["cx"], at["cy"], at["r"], filled, GOOD if kind == "ring" else SOFT)
        case "path":
            x, y, across, _, _, down = map(float, _NUMBER.findall(element.get("d", "")))
            canvas.line([(x, y), (x + across, y)], BAD, 2)
            canvas.line([(x + across / 2, y - down / 2), (x + across / 2, y + down / 2)], BAD, 2)
        case "rect":
            canvas.box(at["x"], at["y"], at["width"], at["height"])


class _Canvas:
    """Takes the drawing's units, below the head."""

    def __init__(self, width: float, height: float) -> None:
        self._unit = SCALE * _FINER
        self._image = Image.new("RGB", (round(width * self._unit), round(height * self._unit)), GROUND)
        self._pen = ImageDraw.Draw(self._image)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return x * self._unit, (y + _HEAD) * self._unit

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        if len(points) > 1:
            self._pen.line([self._at(x, y) for x, y in points], colour, round(width * self._unit), joint="curve")

    def circle(self, x: float, y: float, radius: float, filled: str | None, outline: str) -> None:
        left, top = self._at(x - radius, y - radius)
        right, bottom = self._at(x + radius, y + radius)
        width = 0 if filled else 2 * self._unit
        self._pen.ellipse((left, top, right, bottom), filled, None if filled else outline, width)

    def box(self, x: float, y: float, width: float, height: float) -> None:
        self._pen.rectangle((*self._at(x, y), *self._at(x + width, y + height)), ACCENT)

    def text(self, x: float, y: float, text: str, size: float, colour: str, anchor: str) -> None:
        font = ImageFont.load_default(size * self._unit)
        self._pen.text(self._at(x, y), text, colour, font, f"{anchor}s")

    def file(self) -> bytes:
        target = io.BytesIO()
        size = self._image.width // _FINER, self._image.height // _FINER
        self._image.resize(size, Image.Resampling.BOX).save(target, "PNG")
        return target.getvalue()
