"""The result of an experiment, as a table, JSON, a PNG and an HTML page."""

from __future__ import annotations

import datetime
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..runtime import cpu_info
from ..runtime.files import replacing
from . import html_page

DPI = 144


@dataclass(frozen=True)
class Claim:
    """One sentence, and whether it holds in this run."""

    text: str
    holds: bool

    def __str__(self) -> str:
        return f"{'yes' if self.holds else 'NO '}  {self.text}"


@dataclass(frozen=True)
class Findings:
    """The result of one run of an experiment.

    Attributes:
        title: a heading.
        about: what was done and why; empty lines separate paragraphs.
        claims: what the experiment should show.
        table: rows of cells; the first row is the header, the first column is text.
        figures: every number of the table and the picture, as plain values.
        draw: draws the picture into a matplotlib figure.
        size: width and height of the picture, in inches; 6 wide is legible at 500 pixels.
    """

    title: str
    about: str
    claims: Sequence[Claim]
    table: Sequence[Sequence[str]]
    figures: Mapping[str, Any]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (6.0, 3.0)


def text(findings: Findings) -> str:
    """The table and the claims, for a terminal."""
    widths = [max(map(len, column)) for column in zip(*findings.table, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in findings.table
    ]
    return "\n".join([*lines, "", *map(str, findings.claims)])


def write(findings: Findings, name: str, settings: Mapping[str, Any], out: Path) -> Path:
    """Write OUT/figures.json, OUT/NAME.png and OUT/index.html; returns the path of the page.

    MissingPackage without matplotlib, after figures.json is written.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "experiment": name,
        "date": datetime.date.today().isoformat(),
        "resnet_fast": __version__,
        "torch": str(torch.__version__),
        "machine": _machine(settings.get("device", "cpu")),
        "settings": dict(settings),
    }
    record = {
        **facts,
        "claims": [{"text": claim.text, "holds": claim.holds} for claim in findings.claims],
        "figures": findings.figures,
    }
    source = json.dumps(_plain(record), indent=1, allow_nan=False)
    _write(out / "figures.json", source + "\n")
    path = out / f"{name}.png"
    html_page.neutral(_picture, findings, path)
    page_path = out / "index.html"
    _write(page_path, _page(findings, facts, path))
    return page_path


def _write(path: Path, text: str) -> None:
    with replacing(path, "w", encoding="utf-8") as file:
        file.write(text)


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_info.name()}, {threads} thread{'s' if threads > 1 else ''}"


def _plain(value: Any) -> Any:
    """`value` for JSON: NaN and infinity (the loss of a net that diverged) become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _picture(findings: Findings, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=findings.size, layout="constrained")
    FigureCanvasAgg(figure)
    findings.draw(figure)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def plain_axes(*axes: Any, counts: bool = False) -> None:
    """Light grid, no frame, a legend if lines have labels; `counts`: x ticks are integers."""
    from matplotlib.ticker import MaxNLocator

    for one in axes:
        if counts:
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.title.set_fontsize(10.5)
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=9, loc="best")


def _page(findings: Findings, facts: Mapping[str, Any], path: Path) -> str:
    paragraphs = "".join(f"<p>{html.escape(part)}</p>" for part in findings.about.split("\n\n"))
    claims = html_page.claims([(claim.text, claim.holds) for claim in findings.claims])
    claims = f"<section><h2>What holds</h2>{claims}</section>" if findings.claims else ""
    settings = [("setting", "value"), *((k, str(v)) for k, v in facts["settings"].items())]
    return html_page.document(
        f"resnet_fast: {findings.title}",
        f"""<header>
<h1>{html.escape(findings.title)}</h1>
<p class="quiet">{html.escape(facts["machine"])}, PyTorch
{html.escape(facts["torch"])}, resnet_fast {facts["resnet_fast"]}, {facts["date"]}</p>
</header>
<main>
<section>{paragraphs}</section>
{claims}
<section><h2>Figures</h2>{html_page.picture(path, findings.title)}
{html_page.table(findings.table)}</section>
<section><h2>Settings</h2><details><summary>of this run</summary>
{html_page.table(settings)}</details>
</section>
</main>
<footer>Made by <code>resnet-fast experiment {facts["experiment"]}</code>. Every number is in
<code>figures.json</code> beside this page.</footer>""",
    )
