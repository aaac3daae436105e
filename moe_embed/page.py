"""One HTML file that needs nothing else: its frame, its style, and pictures that carry their numbers.

No server, no network, no library. A picture's numbers are in a link to a CSV file that is inside the page; the few lines of JavaScript
read them back to say what is under the pointer, and without JavaScript everything is drawn all the same.
"""

import csv
import html
import io
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence

from moe_embed import fields

# Okabe and Ito, "Color Universal Design" (2008), as in Wong, Nature Methods 8:441 (2011): told apart by the colour-blind. In this
# order so that neighbours differ in lightness too. The blue and the vermilion are also the two sides of a heat map.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")

COMMAND = re.compile(
    r"(?:(?<!\S)--|python -m )[a-z][^\s,;]*[^\s,;:.)]"
)  # a flag with its value, or a command, in a sentence

WIDTH = 460  # of a picture that is not wide, in the units of its viewBox

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d1f22; --faint: #6b7078; --line: #dcdde0; --card: #fff;
        --c0: #0072B2; --c1: #D55E00; --c2: #009E73; --c3: #CC79A7; --c4: #B97F00; --c5: #56B4E9; --c6: #8A8A8A; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e6e7e9; --faint: #9aa0a8; --line: #33373d; --card: #1c1f23;
          --c0: #4AA8E0; --c1: #F0803C; --c2: #2BC49A; --c4: #E69F00; --c6: #A8A8A8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.5rem 5rem; max-width: 1080px; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .2rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
p { margin: .3rem 0 .8rem; max-width: 76ch; } .lead, nav { color: var(--faint); }
nav a, a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; } nav a { margin-right: 1.1em; }
p code { display: inline-block; max-width: 100%; overflow-wrap: anywhere; font-size: .92em; } /* a flag is not cut at its hyphens */
.missing { color: var(--faint); border-left: 3px solid var(--line); padding-left: .8em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; padding: .8rem .9rem .5rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.wide .picture, .memory .picture { overflow: auto hidden; padding-top: 8px; } .wide svg { min-width: 760px; } .memory svg { min-width: 600px; }
figcaption { font-size: .86rem; margin-bottom: .3rem; } figcaption b { font-weight: 600; } figcaption span { color: var(--faint); }
svg { display: block; width: 100%; height: auto; overflow: visible; font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--faint); } svg .name { fill: var(--ink); } svg .grid-line { stroke: var(--line); stroke-width: 1; }
svg .hair { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 2; visibility: hidden; }
svg .shown { visibility: visible; } svg .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; } svg .second { stroke-dasharray: 5 3; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; }
svg .empty { fill: var(--line); fill-opacity: .45; }
.foot { display: flex; justify-content: space-between; gap: 1em; min-height: 1.6em; margin: .2rem 0 0; max-width: none; font-size: .78rem;
        color: var(--faint); font-variant-numeric: tabular-nums; } .foot output { text-align: right; color: var(--ink); }
.memory svg > rect:first-child { fill: none; } .memory svg text { fill: var(--ink); } .memory svg path { stroke: var(--ink); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; color: var(--faint); } td:first-child, th:first-child, .word { text-align: left; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--faint); }
pre { font-size: .78rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; }
@media print { body { max-width: none; } figure svg { min-width: 0 !important; } figure { break-inside: avoid; } }
"""

# What is under the pointer, read from the figure's own CSV.
SCRIPT = r"""
for (const figure of document.querySelectorAll("figure[data-box]")) {
  const svg = figure.querySelector("svg"), hair = svg.querySelector("line.hair"), out = figure.querySelector("output");
  const [left, top, width, height] = figure.dataset.box.split(" ").map(Number);
  const href = figure.querySelector("a[download]").getAttribute("href");
  const rows = [[]], cell = /("(?:[^"]|"")*"|[^,\r\n]*)(,|\r?\n|$)/g, text = decodeURIComponent(href.slice(href.indexOf(",") + 1)).trimEnd();
  for (let m; (m = cell.exec(text)) !== null;) {
    rows.at(-1).push(m[1].startsWith('"') ? m[1].slice(1, -1).replaceAll('""', '"') : m[1]);
    if (m[2] === "") break;
    if (m[2] !== ",") rows.push([]);
  }
  const names = rows.shift(), scale = Number(svg.viewBox.baseVal.width);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), k = scale / box.width;
    const x = ((event.clientX - box.left) * k - left) / width, y = ((event.clientY - box.top) * k - top) / height;
    if (x < 0 || x > 1 || y < 0 || y > 1) { out.textContent = ""; if (hair) hair.style.visibility = "hidden"; return; }
    if (figure.dataset.kind.startsWith("map")) {
      const r = Math.min(rows.length - 1, Math.floor(y * rows.length)), c = Math.min(names.length - 2, Math.floor(x * (names.length - 1)));
      out.textContent = `${rows[r][0]} · ${names[c + 1]}: ${rows[r][c + 1]}`;
      return;
    }
    const [from, to, log] = figure.dataset.x.split(" ").map(Number), scaled = v => log ? Math.log2(v) : v;
    const at = from + x * (to - from), said = [];
    let place = at;
    names.slice(1).forEach((name, i) => {
      const there = rows.filter(row => row[i + 1] !== "");
      if (!there.length) return;
      const near = there.reduce((a, b) => Math.abs(scaled(b[0]) - at) < Math.abs(scaled(a[0]) - at) ? b : a);
      if (!said.length) { said.push(`${names[0]} ${near[0]}`); place = scaled(near[0]); }
      said.push(names.length > 2 ? `${name} ${near[i + 1]}` : near[i + 1]);
    });
    out.textContent = said.join(" · ");
    if (hair) { const px = left + width * (to === from ? 0.5 : (place - from) / (to - from)); hair.setAttribute("x1", px); hair.setAttribute("x2", px); hair.style.visibility = "visible"; }
  });
  svg.addEventListener("pointerleave", () => { out.textContent = ""; if (hair) hair.style.visibility = "hidden"; });
}
"""


def document(*, title: str, lead: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """The whole page. `sections`: an id -> (heading, what is in it, HTML). `title` and `lead` are text."""
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, (heading, _) in sections.items())
    body = "\n".join(
        f'<section id="{name}"><h2>{text(heading)}</h2>\n{inside}</section>'
        for name, (heading, inside) in sections.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><header><h1>{text(title)}</h1>"
        f'<p class="lead">{text(lead)}</p><nav>{links}</nav></header>\n{body}\n'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def figure(
    svg: str,
    *,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence],
    note: str = "",
    kind: str = "",
    **data: str,
) -> str:
    """A picture with a title, a note and its numbers as a CSV file to download; what is in `data` is for SCRIPT."""
    attributes = "".join(f' data-{name}="{text(value)}"' for name, value in ({"kind": kind} | data).items() if value)
    file = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
    return (
        f'<figure class="{kind}"{attributes}><figcaption><b>{text(title)}</b> <span>{text(note)}</span></figcaption>'
        f'<div class="picture">{svg}</div>'
        f'<p class="foot"><a download="{file}.csv" href="{as_link(columns, rows)}">CSV</a><output></output></p></figure>\n'
    )


def as_link(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A CSV file as a data: link; numbers with six digits, None as an empty cell, a text in one line.

    A lone carriage return in a name would end a row: the writer of Python 3.11 puts no quotes round it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_in_csv, columns))
    writer.writerows(map(_in_csv, row) for row in rows)
    return "data:text/csv;charset=utf-8," + urllib.parse.quote(file.getvalue(), safe=" ,.:;/()+-=@!*'$~[]")


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Text and numbers in rows; numbers with four digits or more, None as a dash."""
    rows = list(rows)
    kinds = [_kind(x) for x in rows[0]] if rows else [""] * len(columns)
    head = "".join(f"<th{kind}>{text(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"


def say(sentence: str, *, missing: bool = False) -> str:
    """A paragraph; of what is not there, set apart. Flags and commands in it are code, so that no line ends within one."""
    kind = ' class="missing"' if missing else ""
    said, end = "", 0
    for found in COMMAND.finditer(sentence):
        said += f"{text(sentence[end : found.start()])}<code>{text(found[0])}</code>"
        end = found.end()
    return f"<p{kind}>{said}{text(sentence[end:])}</p>\n"


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>\n'


def svg(parts: Iterable[str], height: float, label: str, *, width: float = WIDTH) -> str:
    """Shapes in a frame of so many units, drawn as wide as there is room."""
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{text(label)}">{"".join(parts)}</svg>'


def text(said: str) -> str:
    """Text as HTML, in an attribute too."""
    return html.escape(said)


def _in_csv(x):
    return f"{x:.6g}" if isinstance(x, float) else fields.one_line(x) if isinstance(x, str) else x


def _kind(x) -> str:
    return ' class="word"' if isinstance(x, str) and not x[:1].isdigit() else ""


def _cell(x) -> str:
    if x is None:
        return "<td>–</td>"
    said = text(x) if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    return f"<td{_kind(x)}>{said}</td>"
