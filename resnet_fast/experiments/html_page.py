"""A self-contained page: one HTML file with embedded pictures, light or dark.

Pictures are PNG with a transparent background and grey text, readable in both modes. A page embeds
them as base64; they are also written as files.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.optional import imported

GREY = "#768390"
COLORS = (GREY, "#e8590c", "#4dabf7", "#845ef7", "#2f9e44", "#f08c00")


def neutral(draw: Callable[..., None], *arguments: Any) -> None:
    """draw(*arguments) with grey text and axes on a transparent background and lines in COLORS.

    MissingPackage without matplotlib.
    """
    matplotlib = imported("matplotlib", "pictures", "matplotlib")
    from cycler import cycler  # a dependency of matplotlib

    grey = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "grid.color", "legend.labelcolor"), GREY,
    )  # fmt: skip
    clear = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.transparent": True}
    colors = {"axes.prop_cycle": cycler(color=COLORS)}
    with matplotlib.rc_context({**grey, **clear, **colors, "font.size": 10}):
        draw(*arguments)


def document(title: str, body: str) -> str:
    """The page; `body` is the content of its body element."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def claims(found: Sequence[tuple[str, bool]]) -> str:
    """A list of claims, each with a tick or a cross."""
    items = "".join(
        f'<li class="{"good" if held else "bad"}">{html.escape(text)}</li>' for text, held in found
    )
    return f'<ul class="claims">{items}</ul>'


def picture(path: Path, alt: str) -> str:
    """The PNG at `path` as an embedded image."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll">{image}</div>'


def table(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; its first line is the header, its first `left` columns are text."""
    out = []
    for number, line in enumerate(lines):
        tag = "th" if number == 0 else "td"
        cells = "".join(
            f"<{tag}{'' if i < left else ' class=n'}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(line)
        )
        out.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(out)}</table></div>'


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2b8a3e; --bad: #e03131;
  --accent: #e8590c }
@media (prefers-color-scheme: dark) { :root { --good: #51cf66; --bad: #ff6b6b; --accent: #ff922b } }
* { box-sizing: border-box }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 0 auto;
  padding: 1.5rem 1rem 3rem }
h1 { font-size: 1.9rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem }
p { margin: .4rem 0 .8rem; max-width: 46rem }
code, pre { font: .85em/1.5 ui-monospace, monospace }
.quiet, footer { opacity: .65; font-size: .9rem } footer { margin-top: 3rem }
.badge { font-size: .9rem; vertical-align: middle; padding: .15em .7em; border-radius: 1em;
  border: 1px solid }
.badge.good, .good b { color: var(--good) } .badge.bad, .bad b { color: var(--bad) }
.tiles { display: grid; gap: .8rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)) }
.tiles div { background: var(--soft); border: 1px solid var(--line); border-radius: .7rem;
  padding: .8rem 1rem }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--accent) }
.tiles span { font-size: .85rem; opacity: .8 }
.claims { list-style: none; padding: 0; margin: 0 }
.claims li { padding: .2rem 0 .2rem 1.7rem; position: relative }
.claims li::before { position: absolute; left: .2rem; font-weight: 700 }
.claims .good::before { content: "\\2713"; color: var(--good) }
.claims .bad::before { content: "\\2717"; color: var(--bad) }
img { width: 100%; min-width: 40rem; height: auto; margin: .6rem 0 }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .45rem .8rem;
  margin: .5rem 0 }
summary { cursor: pointer } pre { overflow-x: auto; white-space: pre }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; min-width: 60% }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums }
th { font-weight: 600; opacity: .75 } .n { text-align: right }
.verify { font-size: .8rem } .verify td, .verify th { padding-right: .55rem }
.verify td:nth-child(5) { white-space: normal; min-width: 12rem }
meter { width: 4rem; height: .8rem }
"""
