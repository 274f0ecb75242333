"""The validation of a data set as one page of HTML, which needs no other file, no script and no network."""

from html import escape

from adaptfleet.core.data.validation import Bar, Finding, Validation, statistics

_WIDTH, _HEIGHT = 640, 180
_LEFT, _BOTTOM, _TOP = 56, 24, 8
_STYLE = """\
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --page: #fcfcfd; --bar: #3e63dd; --bad: #ce2c31;
  --note: #ab6400; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #edeef0; --soft: #b0b4ba; --line: #363a3f; --page: #111113; --bar: #849dff; --bad: #ff9592; --note: #ffca16; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; max-width: 640px; height: auto; display: block; } svg rect { fill: var(--bar); } svg line { stroke: var(--line); }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
summary { cursor: pointer; } .bad { color: var(--bad); } .note { color: var(--note); } .soft { color: var(--soft); }
details { margin: .5rem 0; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }"""


def page(validation: Validation, contract: str) -> str:
    """All text that comes from the data or the contract is escaped."""
    parts = [f"<h1>Data of {escape(contract)}</h1>", f'<p class="soft">{escape(", ".join(validation.sources))}</p>']
    verdict = "It can be trained on." if validation.is_trainable else "It cannot be trained on as it is."
    parts.append(f'<p class="{"soft" if validation.is_trainable else "bad"}"><strong>{verdict}</strong></p>')
    parts.append(_table(validation))
    for side in validation.sides:
        bars = side.histogram()
        if bars:
            parts.append(f"<h2>Tokens of a row, {escape(side.name)}</h2>")
            parts.append(_histogram(bars, f"Rows by their number of tokens, {side.name}"))
    parts.append("<h2>What was found</h2>")
    parts += [_finding(finding) for finding in sorted(validation.findings, key=lambda f: not f.is_fatal)]
    if not validation.findings:
        parts.append("<p>Nothing.</p>")
    title = f"<title>Data of {escape(contract)}</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{title}<style>\n{_STYLE}\n</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body>\n</html>\n"


def _table(validation: Validation) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *(side.name for side in validation.sides)))
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in statistics(validation)]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody></table>"


def _histogram(bars: list[Bar], label: str) -> str:
    most = max(bar.count for bar in bars)
    step = (_WIDTH - _LEFT) / len(bars)
    base = _HEIGHT - _BOTTOM
    drawn = []
    for i, bar in enumerate(bars):
        height = (base - _TOP) * bar.count / most
        said = f"{bar.first:,} to {bar.last:,} tokens: {bar.count:,} rows"
        place = f'x="{_LEFT + i * step:.1f}" y="{base - height:.1f}" width="{max(step - 2, 1):.1f}" height="{height:.1f}"'
        drawn.append(f"<rect {place}><title>{said}</title></rect>")
    axis = [
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 9}" text-anchor="end">{most:,}</text>',
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">{bars[0].first:,}</text>',
        f'<text x="{_WIDTH}" y="{_HEIGHT - 6}" text-anchor="end">{bars[-1].last:,} tokens</text>',
    ]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">{"".join([*axis, *drawn])}</svg>'


def _finding(finding: Finding) -> str:
    kind = "bad" if finding.is_fatal else "note"
    title = f'<strong class="{kind}">{"error" if finding.is_fatal else "note"}</strong> {escape(finding.title)}'
    if not finding.lines:
        return f"<p>{title}</p>"
    lines = "\n".join(escape(line) for line in finding.lines)
    return f"<details{' open' if finding.is_fatal else ''}><summary>{title}</summary><pre>{lines}</pre></details>"
