"""The picture of `python -m bench scaling`: images/s and peak memory against each axis.

A column an axis, two rows a mode and dtype, logarithmic, a colour a provider. Crosses are points
that had no memory, dashed is the rate that the floor allows, thin what bytes alone and operations
alone would allow, dotted the memory of the device.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from bench.curves import AXES, Panel, label
from bench.report import neutral

COLORS = {"resnet_fast": "#e8590c", "compile": "#4dabf7", "eager": "#8b949e",
          "eager_nchw": "#40c057"}  # fmt: skip
FLOOR = "#845ef7"
FLOORS = {
    "floor_ms": {"linestyle": "--", "linewidth": 1.4, "label": "at most, by bytes and operations"},
    "bytes_ms": {"linestyle": "-", "linewidth": 0.6, "label": "by bytes alone"},
    "flops_ms": {"linestyle": "-.", "linewidth": 0.6, "label": "by operations alone"},
}
WIDTH = 65  # of the title's lines, in characters a panel


def plot(panels: Sequence[Panel], path: Path) -> None:
    """PNG of `panels` at `path`. RuntimeError without matplotlib."""
    neutral(_plot, panels, path)


def _plot(panels: Sequence[Panel], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys((panel.mode, panel.dtype) for panel in panels))
    axes_names = [axis for axis in AXES if any(panel.axis == axis for panel in panels)]
    figure = Figure(
        figsize=(4.7 * len(axes_names), 7.0 * len(blocks) + 0.4), layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12)
    grid = figure.subplots(2 * len(blocks), len(axes_names), squeeze=False)
    for panel in panels:
        row, column = 2 * blocks.index((panel.mode, panel.dtype)), axes_names.index(panel.axis)
        _rates(grid[row][column], panel)
        _memory(grid[row + 1][column], panel)
    drawn = {(panel.mode, panel.dtype, panel.axis) for panel in panels}
    for i, block in enumerate(blocks):
        for column, axis in enumerate(axes_names):
            if (*block, axis) not in drawn:
                grid[2 * i][column].set_axis_off()
                grid[2 * i + 1][column].set_axis_off()
    handles = {}
    for axes in grid.flat:
        for handle, said in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(said, handle)
    wide = len(axes_names)
    origin = "; ".join(dict.fromkeys(panel.origin for panel in panels))
    figure.legend(handles.values(), handles, loc="outside upper center", frameon=False,
                  ncols=min(len(handles), 2 * wide + wide // 3),
                  title=textwrap.fill(origin, WIDTH * wide))  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rates(axes, panel: Panel) -> None:
    _curves(axes, panel, "images_per_s")
    if panel.limits is not None:
        batches = {panel.place(row): row["batch"] for own in panel.curves.values() for row in own}
        for name, style in FLOORS.items():
            least = {place: getattr(work, name) for place, work in panel.work.items()}
            rates = [1e3 * batches[place] / ms for place, ms in least.items()]
            axes.plot(_x(panel, least), rates, color=FLOOR, **style)
    _finish(axes, panel, "images/s")
    axes.set_title(panel.title, fontsize=9.5, loc="left")


def _memory(axes, panel: Panel) -> None:
    _curves(axes, panel, "peak_mb")
    room = next(iter(panel.curves.values()))[0]["device_mb"]
    if room and room < 4 * axes.get_ylim()[1]:
        axes.axhline(room, color=FLOOR, linestyle=":", linewidth=1.2, label="memory of the device")
    _finish(axes, panel, "peak memory, MiB")


def _curves(axes, panel: Panel, figure: str) -> None:
    """A line a provider, with the places that failed as crosses at the panel's edge."""
    axes.set_yscale("log")
    for name in panel.curves:
        own = panel.measured(name)
        style = {"color": COLORS.get(name), "label": label(name)}
        values = [row[figure] for row in own.values()]
        axes.plot(_x(panel, own), values, marker="o", markersize=4, linewidth=1.6, **style)
    edge = 0.03 if figure == "images_per_s" else 0.97
    for i, name in enumerate(panel.curves):
        where = _x(panel, panel.missing(name))
        axes.scatter(
            where, [edge + (0.05 * i if edge < 0.5 else -0.05 * i)] * len(where), 40, marker="x",
            color=COLORS.get(name), transform=axes.get_xaxis_transform(), linewidth=1.8,
        )  # fmt: skip


def _x(panel: Panel, places) -> list[float]:
    """Where places are drawn: models side by side, numbers where they are."""
    return [panel.places.index(p) if panel.axis == "depth" else p for p in places]


def _finish(axes, panel: Panel, quantity: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ticks = _x(panel, panel.places)
    if panel.axis == "depth":
        flops = [panel.work[place].flops for place in panel.places]
        axes.set_xticks(ticks, [
            f"{place}\n{flop / flops[0]:.1f}x"
            for place, flop in zip(panel.places, flops, strict=True)
        ], fontsize=8)  # fmt: skip
        axes.set_xlabel("model, and its operations against the first's")
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel({"batch": "batch", "resolution": "pixels a side"}[panel.axis])
    low, high = axes.get_ylim()
    if high / low < 150:  # a tick a decade would be one or two
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.25, linewidth=0.6, which="major")
    axes.spines[["top", "right"]].set_visible(False)
