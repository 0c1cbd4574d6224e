"""What rows of `bench.scaling` say: a curve a provider along each axis, their floor, and captions.

The floor is `bench.roofline`'s: what the bytes and operations of the fused schedule take at the
limits of the device. It is there for GPUs whose limits are known, by a row of `bench.ceilings` or
by `roofline.KNOWN`; the tensors of a small batch stay in a CPU's caches, and no copy bounds those.
A caption is made of figures of its panel alone: fits by least squares over logarithms, shares,
places where a curve bends or ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench import roofline, rows
from bench.ceilings import Ceilings
from bench.step import DTYPES
from bench.table import LABELS, columns

AXES = {"batch": "batch", "resolution": "image_size", "depth": "model"}
"""Axis → the field of a row that it sweeps."""

ORDER = ("resnet_fast", "compile", "eager", "eager_nchw")
SATURATED = 0.9  # of the highest rate
FLAT = 1.25  # times the time of the smallest batch
ONE = "One point: no growth to read off."

Place = int | str
"""A batch size, pixels a side, or a model's name."""


@dataclass(frozen=True)
class Work:
    """What a step at one place must do: bytes and operations, least time, memory's part of it."""

    bytes: int
    flops: int
    floor_ms: float | None = None
    memory_share: float | None = None


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

    @cached_property
    def lead(self) -> str | None:
        """The provider that captions speak of first: ours, where it has figures."""
        return next((name for name in self.curves if self.measured(name)), None)

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
    size = DTYPES[row["dtype"]].itemsize
    steps = roofline.steps_of(row["model"], row["mode"], row["batch"], size, row["image_size"])
    moved = sum(step.count * step.bytes for step in steps)
    flops = sum(step.count * step.flops for step in steps)
    if limits is None:
        return Work(moved, flops)
    floors = {step: step.count * step.floor_ms(limits) for step in steps}
    total = sum(floors.values())
    memory = sum(ms for step, ms in floors.items() if step.bound(limits) == "memory")
    return Work(moved, flops, total, memory / total)


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
        if name in row["cpu_or_gpu"].lower() and DTYPES[row["dtype"]].itemsize == 2:
            return Ceilings(*limits, row["dtype"])
    return None


def exponent(points: Mapping[float, float]) -> float | None:
    """p of the y ~ x^p that fits best; None for fewer than two places."""
    if len(points) < 2:
        return None
    x, y = ([math.log(v) for v in values] for values in (points, points.values()))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return along / sum((a - x_mean) ** 2 for a in x)


def line(points: Mapping[float, float]) -> tuple[float, float] | None:
    """a, b of the y ~ a + b·x with the least relative errors; None for fewer than two places."""
    if len(points) < 2:
        return None
    weights = {x: 1 / y**2 for x, y in points.items()}
    total = sum(weights.values())
    x_mean = sum(w * x for x, w in weights.items()) / total
    y_mean = sum(w * points[x] for x, w in weights.items()) / total
    along = sum(w * (x - x_mean) * (points[x] - y_mean) for x, w in weights.items())
    b = along / sum(w * (x - x_mean) ** 2 for x, w in weights.items())
    return y_mean - b * x_mean, b


def saturation(rates: Mapping[int, float]) -> int | None:
    """The first batch at SATURATED of the highest rate; None where that is the largest batch."""
    enough = SATURATED * max(rates.values())
    first = next(batch for batch, rate in rates.items() if rate >= enough)
    return None if first == list(rates)[-1] else first


def rate_caption(panel: Panel) -> str:
    """What the images/s of a panel say."""
    if panel.lead is None or len(panel.measured(panel.lead)) < 2:
        return ONE
    said = {"batch": _batch_rate, "resolution": _resolution_rate, "depth": _depth_rate}
    return " ".join((*said[panel.axis](panel), *_floor(panel)))


def _batch_rate(panel: Panel) -> list[str]:
    rates = {
        name: {batch: row["images_per_s"] for batch, row in panel.measured(name).items()}
        for name in _drawn(panel)
    }
    bends = {name: saturation(curve) for name, curve in rates.items()}
    said = []
    full = {name: f"{batch}" for name, batch in bends.items() if batch is not None}
    if full:
        share = f"{1 - SATURATED:.0%}"
        said.append(f"Within {share} of the highest rate from batch {_each(full)}.")
    rising = {name: f"{list(rates[name])[-1]}" for name, batch in bends.items() if batch is None}
    if rising:
        said.append(f"Still rising at batch {_each(rising)}.")
    times = {batch: row["ms_p50"] for batch, row in panel.measured(panel.lead).items()}
    first, *_ = times
    flat = [batch for batch, ms in times.items() if ms <= FLAT * times[first]]
    if flat[-1] != first:
        said.append(
            f"Up to batch {flat[-1]} a step takes at most {FLAT}x its time at {first} "
            f"({LABELS[panel.lead]}): there it is not the images that cost."
        )
    return said


def _resolution_rate(panel: Panel) -> list[str]:
    powers = {
        name: exponent({size: 1 / r["images_per_s"] for size, r in panel.measured(name).items()})
        for name in _drawn(panel)
    }
    each = _each({name: f"{power:.2f}" for name, power in powers.items()})
    return [f"Time an image grows as side to the power of {each}; pixels alone give 2."]


def _depth_rate(panel: Panel) -> list[str]:
    first, last = _ends(panel.measured(panel.lead))
    times = {
        name: f"{own[first]['images_per_s'] / own[last]['images_per_s']:.1f}x"
        for name in _drawn(panel)
        if {first, last} <= (own := panel.measured(name)).keys()
    }
    a, b = panel.work[first], panel.work[last]
    return [
        f"{last} takes {_each(times)} the time of {first} for {b.flops / a.flops:.1f}x the "
        f"operations and {b.bytes / a.bytes:.1f}x the bytes."
    ]


def _floor(panel: Panel) -> list[str]:
    if panel.limits is None:
        return []
    own = panel.measured(panel.lead)
    first, last = _ends(own)
    share = {p: f"{panel.work[p].floor_ms / own[p]['ms_p50']:.0%}" for p in (first, last)}
    return [
        f"{LABELS[panel.lead]} is at {share[first]} of the floor's rate at {_at(panel, first)} "
        f"and at {share[last]} at {_at(panel, last)}, where "
        f"{panel.work[last].memory_share:.0%} of the floor is bytes."
    ]


def memory_caption(panel: Panel) -> str:
    """What the peak memory of a panel says, and where it runs out."""
    if panel.lead is None or len(panel.measured(panel.lead)) < 2:
        return " ".join([ONE, *_ends_early(panel)])
    said = _batch_memory(panel) if panel.axis == "batch" else _memory_growth(panel)
    return " ".join((*said, *_against_eager(panel), *_ends_early(panel)))


def _batch_memory(panel: Panel) -> list[str]:
    lines = {
        name: line({batch: row["peak_mb"] for batch, row in panel.measured(name).items()})
        for name in _drawn(panel)
    }
    each = _each({n: f"{max(a, 0):.0f} + {_figure(b)} an image" for n, (a, b) in lines.items()})
    room = panel.curves[panel.lead][0]["device_mb"]
    full = {
        name: f"{math.floor((room - a) / b):,}" for name, (a, b) in lines.items() if room and b > 0
    }
    said = [f"MiB: {each}."]
    if full:
        said.append(f"So {room / 1024:.0f} GiB last to batch {_each(full)}.")
    return said


def _memory_growth(panel: Panel) -> list[str]:
    if panel.axis == "resolution":
        powers = {
            name: exponent({size: row["peak_mb"] for size, row in panel.measured(name).items()})
            for name in _drawn(panel)
        }
        each = _each({name: f"{power:.2f}" for name, power in powers.items()})
        return [f"Peak memory grows as side to the power of {each}."]
    first, last = _ends(panel.measured(panel.lead))
    times = {
        name: f"{own[last]['peak_mb'] / own[first]['peak_mb']:.1f}x"
        for name in _drawn(panel)
        if {first, last} <= (own := panel.measured(name)).keys()
    }
    return [f"{last} needs {_each(times)} the memory of {first}."]


def _against_eager(panel: Panel) -> list[str]:
    if panel.lead == "eager" or "eager" not in panel.curves:
        return []
    own, eager = panel.measured(panel.lead), panel.measured("eager")
    both = [place for place in panel.places if place in own and place in eager]
    if not both:
        return []
    ratio = own[both[-1]]["peak_mb"] / eager[both[-1]]["peak_mb"]
    return [f"{LABELS[panel.lead]} needs {ratio:.2f}x of eager's at {_at(panel, both[-1])}."]


def _ends_early(panel: Panel) -> list[str]:
    found = {}
    for name in panel.curves:
        for place, why in panel.missing(name).items():
            found.setdefault(why, {}).setdefault(LABELS[name], []).append(_at(panel, place))
    return [
        f"{why.capitalize()}: "
        + "; ".join(f"{name} at {', '.join(places)}" for name, places in each.items())
        + "."
        for why, each in found.items()
    ]


def _drawn(panel: Panel) -> list[str]:
    """Providers with at least two places."""
    return [name for name in panel.curves if len(panel.measured(name)) > 1]


def _each(values: Mapping[str, str]) -> str:
    """"a (one), b (another)", providers by their labels."""
    return ", ".join(f"{value} ({LABELS[name]})" for name, value in values.items())


def _ends(own: Mapping[Place, rows.Row]) -> tuple[Place, Place]:
    places = list(own)
    return places[0], places[-1]


def _at(panel: Panel, place: Place) -> str:
    return {"batch": f"batch {place}", "resolution": f"{place} px"}.get(panel.axis, f"{place}")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text(found: Sequence[Panel]) -> str:
    """A table a panel, and below it what its pictures' captions say."""
    return "\n\n".join(
        "\n".join((panel.title, _table(panel), rate_caption(panel), memory_caption(panel)))
        for panel in found
    )


def _table(panel: Panel) -> str:
    lines = [(panel.axis, "provider", "images/s", "ms", "peak MiB", "vs eager", "% of floor")]
    for place in panel.places:
        for name in panel.curves:
            floor = panel.work[place].floor_ms
            row = panel.measured(name).get(place)
            if row is None:
                why = panel.missing(name).get(place)
                if why is not None:
                    lines.append((f"{place}", LABELS[name], why, *["–"] * 4))
                continue
            ratio = row["speedup_vs_eager"]
            lines.append((
                f"{place}", LABELS[name], _figure(row["images_per_s"]), f"{row['ms_p50']:.2f}",
                f"{row['peak_mb']:.0f}", "–" if ratio is None else f"{ratio:.2f}x",
                "–" if floor is None else f"{100 * floor / row['ms_p50']:.0f}",
            ))  # fmt: skip
    return columns(lines, left=2)
