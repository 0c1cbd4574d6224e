"""Curves from the rows of `bench.scaling`: a panel an axis, a curve a provider, and their floor.

The floor is `bench.roofline`'s: what the bytes and operations of the fused schedule take at the
limits of the device. It is there for GPUs whose limits are known, by a row of `bench.ceilings` or
by `roofline.KNOWN`; the tensors of a small batch stay in a CPU's caches, and no copy bounds those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench import roofline, rows
from bench.ceilings import Ceilings
from bench.table import LABELS, columns
from resnet_fast.spec.dtypes import PRECISIONS

AXES = {"batch": "batch", "resolution": "image_size", "depth": "model"}
"""Axis → the field of a row that it sweeps."""

ORDER = ("resnet_fast", "compile", "eager", "eager_nchw")

Place = int | str
"""A batch size, pixels a side, or a model's name."""


@dataclass(frozen=True)
class Work:
    """What a step at one place must do, and what that takes at the least.

    floor_ms: all launches, each bound by its bytes or its operations. bytes_ms, flops_ms: all
    bytes, all operations as one. None without known limits.
    """

    bytes: int
    flops: int
    floor_ms: float | None = None
    bytes_ms: float | None = None
    flops_ms: float | None = None


@dataclass(frozen=True)
class Panel:
    """The curves of one axis, mode and dtype: rows by provider, in the order of `places`."""

    axis: str
    mode: str
    dtype: str
    curves: Mapping[str, Sequence[rows.Row]]
    limits: Ceilings | None = None

    def place(self, row: rows.Row) -> Place:
        """Where on the axis a row is."""
        return row[AXES[self.axis]]

    def measured(self, provider: str) -> dict[Place, rows.Row]:
        """The rows of a provider that have figures."""
        return {self.place(r): r for r in self.curves[provider] if r["failed"] is None}

    def missing(self, provider: str) -> dict[Place, str]:
        """The places of a provider that have none, and why."""
        return {self.place(r): r["failed"] for r in self.curves[provider] if r["failed"]}

    @cached_property
    def work(self) -> dict[Place, Work]:
        """What each place must do, along the axis; models from the least operations to the most."""
        every = {self.place(row): row for curve in self.curves.values() for row in curve}
        found = {place: work_of(row, self.limits) for place, row in every.items()}
        depth = self.axis == "depth"
        return dict(sorted(found.items(), key=lambda item: item[1].flops if depth else item[0]))

    @property
    def places(self) -> list[Place]:
        """Along the axis."""
        return list(self.work)

    @property
    def origin(self) -> str:
        """Device, versions, day and commit of the rows."""
        row = next(iter(self.curves.values()))[0]
        commit = f" at {row['git_sha']}" if row["git_sha"] else ""
        return f"{row['cpu_or_gpu']}, PyTorch {row['torch']}, {row['date'][:10]}{commit}"

    @property
    def title(self) -> str:
        """Mode, dtype, axis and what stayed fixed."""
        row = next(iter(self.curves.values()))[0]
        fixed = {"batch": f"batch {row['batch']}", "resolution": f"{row['image_size']} px",
                 "depth": row["model"]}  # fmt: skip
        mode = {"infer": "inference", "train": "training"}[self.mode]
        rest = ", ".join(said for axis, said in fixed.items() if axis != self.axis)
        return f"{mode} in {self.dtype} against {self.axis}; {rest}"


def work_of(row: rows.Row, limits: Ceilings | None) -> Work:
    """Bytes, operations and floor of one step of the row's case."""
    size = PRECISIONS[row["dtype"]].itemsize
    steps = roofline.steps_of(row["model"], row["mode"], row["batch"], size, row["image_size"])
    moved = sum(step.count * step.bytes for step in steps)
    flops = sum(step.count * step.flops for step in steps)
    if limits is None:
        return Work(moved, flops)
    total = sum(step.count * step.floor_ms(limits) for step in steps)
    apart = limits.floor_ms(moved, 0), limits.floor_ms(0, flops)
    return Work(moved, flops, total, *apart)


def panels(found: Iterable[rows.Row]) -> list[Panel]:
    """A panel a mode, dtype and axis, each from the rows of its newest run."""
    every = list(found)
    runs: dict[tuple[str, str, str], list[rows.Row]] = {}
    for row in every:
        if row["benchmark"] == "scaling":
            for axis in row["over"].split(","):
                runs.setdefault((row["mode"], row["dtype"], axis), []).append(row)
    result = []
    for (mode, dtype, axis), own in sorted(runs.items(), key=lambda run: _rank(*run[0])):
        last = max(row["date"] for row in own)
        curves: dict[str, list[rows.Row]] = {}
        for row in (row for row in own if row["date"] == last):
            curves.setdefault(row["provider"], []).append(row)
        limits = limits_of(own[-1], every)
        places = Panel(axis, mode, dtype, curves, limits).places
        ordered = {
            name: sorted(curve, key=lambda row, axis=axis, at=places: at.index(row[AXES[axis]]))
            for name, curve in sorted(curves.items(), key=_order)
        }
        result.append(Panel(axis, mode, dtype, ordered, limits))
    return result


def _rank(mode: str, dtype: str, axis: str) -> tuple[str, str, int]:
    return mode, dtype, list(AXES).index(axis)


def _order(curve: tuple[str, object]) -> tuple[int, str]:
    name = curve[0]
    return ORDER.index(name) if name in ORDER else len(ORDER), name


def limits_of(row: rows.Row, found: Iterable[rows.Row]) -> Ceilings | None:
    """The limits of the row's GPU in its dtype, measured or known; None for a CPU and unknown."""
    if row["device"] != "cuda":
        return None
    own = [
        one for one in found
        if one["benchmark"] == "ceilings" and one["dtype"] == row["dtype"]
        and one["cpu_or_gpu"] == row["cpu_or_gpu"]
    ]  # fmt: skip
    if own:
        last = max(own, key=lambda one: one["date"])
        return Ceilings(1e9 * last["gb_per_s"], 1e12 * last["tflop_per_s"], row["dtype"])
    for name, limits in roofline.KNOWN.items():
        if name in row["cpu_or_gpu"].lower() and PRECISIONS[row["dtype"]].itemsize == 2:
            return Ceilings(*limits, row["dtype"])
    return None


def table(panel: Panel) -> str:
    """A line a place and provider; the share of the floor where there is one."""
    floor = panel.limits is not None
    heads = ("images/s", "ms", "peak MiB", "vs eager", *["% of floor"] * floor)
    lines = [(panel.axis, "provider", *heads)]
    for place, work in panel.work.items():
        for name in panel.curves:
            row = panel.measured(name).get(place)
            if row is not None:
                ratio = row["speedup_vs_eager"]
                cells = [
                    figure(row["images_per_s"]), f"{row['ms_p50']:.2f}", f"{row['peak_mb']:.0f}",
                    "–" if ratio is None else f"{ratio:.2f}x",
                ]  # fmt: skip
                cells += [f"{100 * work.floor_ms / row['ms_p50']:.0f}"] if floor else []
            elif place in panel.missing(name):
                cells = [panel.missing(name)[place], *["–"] * (len(heads) - 1)]
            else:
                continue
            lines.append((f"{place}", label(name), *cells))
    return columns(lines, left=2)


def label(provider: str) -> str:
    """A provider's name where people read it."""
    return LABELS.get(provider, provider)


def figure(value: float) -> str:
    """Three digits, whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
