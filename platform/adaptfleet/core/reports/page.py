"""One HTML file that needs nothing else. Every text that is put in is escaped here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --ink: #1f2430; --soft: #6b7280; --rule: #e6e7ea;
  --accent: #2f6f9f; --good: #2e7d5b; --bad: #b4534b; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181d; --card: #1c2027; --ink: #e4e6ea; --soft: #9aa1ad; --rule: #2d323b;
  --accent: #7fb4dd; --good: #7cc4a0; --bad: #e09a92; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 26px; font-weight: 620; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; font-weight: 620; margin: 44px 0 14px; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 12px; margin-top: 24px; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.scroll + .charts { margin-top: 16px; }
figure { margin: 0; padding: 12px 14px 6px; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; font-weight: 560; }
figcaption .last { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: 0.35; }
.mark { fill: var(--accent); }
.mark.hidden { opacity: 0; }
.mark.hidden:hover { opacity: 1; }
.bar { fill: var(--accent); opacity: 0.75; }
.bar:hover { opacity: 1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
.card { padding: 14px 18px; margin-bottom: 14px; }
.turn { margin: 0 0 10px; }
.turn small, .answers small { display: block; color: var(--soft); font-size: 12px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 14px;
  border-top: 1px solid var(--rule); padding-top: 10px; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--soft); }
@media print { body { background: none; } .tile, figure, .card { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    title: str
    body: str
    """HTML. Empty: the section is left out."""


def page(title: str, subtitle: str, head: str, sections: Iterable[Section]) -> str:
    """The whole file. `head` and the sections' bodies are HTML by the functions below and by `charts`."""
    shown = "".join(f"<section><h2>{escape(section.title)}</h2>{section.body}</section>" for section in sections if section.body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is fetched and nothing runs, whatever a row's text may hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>{head}{shown}</main></body></html>\n"
    )


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Numbers at a glance: (what, value)."""
    inner = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for what, value in values)
    return f'<div class="tiles">{inner}</div>' if values else ""


def charts(figures: Sequence[str]) -> str:
    """Figures by `charts`, side by side."""
    drawn = "".join(figures)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(column)}</th>" for column in columns) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{head}{body}</table></div>' if rows else ""


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns, the names on the left."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table>{body}</table></div>' if rows else ""


def conversation(turns: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str, bool | None]]) -> str:
    """A card: turns as (role, text), and below them answers side by side as (name, text, right; None where it is not judged)."""
    asked = "".join(f'<div class="turn"><small>{escape(role)}</small><div class="text">{escape(text)}</div></div>' for role, text in turns)
    given = ""
    for name, text, is_right in answers:
        kind, told = {None: ("", ""), True: (" right", " · right"), False: (" wrong", " · wrong")}[is_right]
        given += f'<div><small>{escape(name)}<span class="{kind.strip()}">{told}</span></small><div class="text">{escape(text)}</div></div>'
    return f'<div class="card">{asked}<div class="answers">{given}</div></div>'


def folded(summary: str, text: str) -> str:
    """Preformatted text behind a line to click on."""
    return f'<details class="card"><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>'
