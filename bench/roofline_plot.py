"""The picture of `python -m bench roofline`: launches on the roof, and how their floors add up.

One column per kind of pass ("infer", "train"). Top: a roofline (Williams, Waterman & Patterson
2009). A hollow circle is a launch of what runs at its floor; its area is its share of the sum.
Filled circles are measured steps of the ideal schedule, at the rate that they reached. Passes do no
matrix products: one circle at the left shows them all. Bottom: the sum of the floors of what runs
and of the ideal schedule, by part. Without a list of what runs, only the ideal schedule is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.ceilings import Ceilings
from bench.floors import KINDS, PARTS, Schedules, Step, total
from bench.report import neutral
from resnet_fast.experiments.html_page import GREY

COLORS = dict(
    zip(PARTS, ("#e8590c", "#4dabf7", "#845ef7", GREY, "#e64980", "#f783ac", "#40c057"),
        strict=True)
)  # fmt: skip
LABELS = {"dz": "dz in memory", "φ(x)": "φ(x) in memory", "vectors": "vectors, parameters"}
NAMES = {"runs": "what runs", "ideal": "ideal schedule"}
LEFT, RIGHT = 3.0, 4000.0  # operations per byte


def plot(found: Mapping[str, Schedules], limits: Ceilings, n: int, title: str, path: Path) -> None:
    """Write a PNG of the floors for batches of n to `path`. RuntimeError without matplotlib."""
    neutral(_plot, found, limits, n, title, path)


def _plot(found, limits, n, title, path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.0), layout="constrained")
    FigureCanvasAgg(figure)
    shape = {"height_ratios": (2.6, 1)}
    grid = figure.subplots(2, len(found), sharey="row", squeeze=False, gridspec_kw=shape)
    parts = []
    for (roof, bars), (kind, own) in zip(grid.T, found.items(), strict=True):
        head = own.ideal if own.runs is None else own.runs
        _roof(roof, head, own.ideal, limits)
        whole = total(head, limits).ms
        roof.set_title(
            f"{'inference' if kind == 'infer' else 'training'}: at least {whole:.2f} ms,\n"
            f"at most {1e3 * n / whole:,.0f} images/s", fontsize=10,
        )  # fmt: skip
        parts += _bars(bars, own, limits, n)
    grid[0][0].set_ylabel("TFLOP/s")
    grid[0][0].set_ylim(top=1.35 * limits.flops_per_s / 1e12)  # of all, as they share it
    what = "ideal schedule" if own.runs is None else "every launch that runs"
    what += ", at its floor (estimate)"
    if any(step.ms is not None for own in found.values() for step in own.ideal):
        what += "; full: ideal schedule's, measured"
    figure.suptitle(f"{title}:\n{what}", fontsize=10)
    handles = {part: figure.axes[0].scatter([], [], 50, color=COLORS[part]) for part in PARTS}
    shown = [part for part in PARTS if part in parts]
    figure.legend(
        [handles[part] for part in shown], [LABELS.get(part, part) for part in shown],
        loc="outside lower center", ncols=4, frameon=False, fontsize=9,
        handletextpad=0.2, columnspacing=1.4,
    )  # fmt: skip
    figure.savefig(path, dpi=170)


def _roof(axes: Any, head: Sequence[Step], ideal: Sequence[Step], limits: Ceilings) -> None:
    """The roof, the steps of `head` on it, and the measured steps of `ideal` below it."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    ridge = limits.flops_per_s / limits.bytes_per_s
    roof = [LEFT, ridge, RIGHT]
    rates = [min(limits.flops_per_s, x * limits.bytes_per_s) / 1e12 for x in roof]
    axes.plot(roof, rates, color=GREY, linewidth=1.5, zorder=1)
    for kind in KINDS:
        _circles(axes, [step for step in head if step.kind == kind], head, limits, False)
        known = [step for step in ideal if step.kind == kind and step.ms is not None]
        _circles(axes, known, ideal, limits, True)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", xlim=(LEFT, RIGHT))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, linewidth=0.6, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(RIGHT, rates[1] * 1.08, f"{limits.flops_per_s / 1e12:.3g} TFLOP/s ",
              fontsize=9, ha="right", va="bottom")  # fmt: skip
    axes.annotate(
        f"{limits.bytes_per_s / 1e12:.2g} TB/s",
        (ridge / 15, ridge / 15 * limits.bytes_per_s / 1e12), (-8, 4),
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip


def _circles(axes: Any, own: Sequence[Step], every: Sequence[Step], limits: Ceilings, full: bool):
    """Steps of one kind, at the rate that they reached (full) or could reach."""
    if not own:
        return
    whole, color = total(every, limits).ms, COLORS[own[0].kind]
    x = [max(step.intensity, LEFT * 1.4) for step in own]
    times = [step.ms if full else step.floor_ms(limits) for step in own]
    y = [i * step.bytes / t / 1e9 for step, i, t in zip(own, x, times, strict=True)]
    area = [2500 * step.count * step.floor_ms(limits) / whole for step in own]
    if own[0].kind == "passes" and not full:
        x, y, area = x[:1], [x[0] * limits.bytes_per_s / 1e12], [sum(area)]
    axes.scatter(
        x, y, area, alpha=0.75, zorder=2, linewidth=1.2, edgecolors=color,
        facecolors=color if full else "none",
    )  # fmt: skip


def _bars(axes: Any, own: Schedules, limits: Ceilings, n: int) -> list[str]:
    """One bar per schedule, by part; returns the parts that occur."""
    shown = {NAMES[name]: steps for name, steps in own._asdict().items() if steps is not None}
    shown = dict(reversed(shown.items()))  # from bottom to top
    longest = max(total(steps, limits).ms for steps in shown.values())
    parts = []
    for name, steps in shown.items():
        left = 0.0
        for part in PARTS:
            one = total(steps, limits, part)
            if not one.launches:
                continue
            parts.append(part)
            axes.barh(name, one.ms, 0.62, left, color=COLORS[part])
            if one.ms > 0.1 * longest:  # the text is nearly as wide
                axes.text(left + one.ms / 2, name, f"{one.ms:.2f}", ha="center", va="center",
                          fontsize=8, color="#16181d")  # fmt: skip
            left += one.ms
        axes.text(left, name, f"  {left:.2f} ms,\n  {1e3 * n / left:,.0f} images/s", va="center",
                  fontsize=9)  # fmt: skip
    axes.set(xlim=(0, 1.7 * longest), xlabel="ms, sum of the floors")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return parts
