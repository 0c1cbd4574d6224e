"""What a panel of `bench.curves` says in words, under its picture and its table.

Every sentence is made of figures of that panel: exponents and lines that fit its curves, places
where a curve bends or ends, shares of the floor. There is none for what the rows do not show.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench import rows
from bench.curves import SATURATED, Panel, Place, exponent, figure, label, line, saturation

FLAT = 1.25  # times the time of the smallest batch
FAR = 8  # times the largest batch: no line is drawn out further
ONE = "One point: no growth to read off."


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
    ends = {name: saturation(curve) for name, curve in rates.items()}
    sentences = {
        "full": f"Within {1 - SATURATED:.0%} of the highest rate from batch",
        "rising": "Still rising at batch",
        "falls": "Falling again after batch",
    }
    said = []
    for how, words in sentences.items():
        each = {name: f"{batch}" for name, (end, batch) in ends.items() if end == how}
        if each:
            said.append(f"{words} {_each(each)}.")
    times = {batch: row["ms_p50"] for batch, row in panel.measured(panel.lead).items()}
    first, *_ = times
    flat = [batch for batch, ms in times.items() if ms <= FLAT * times[first]]
    if flat[-1] != first:
        said.append(
            f"Up to batch {flat[-1]} a step takes at most {FLAT}x its time at {first} "
            f"({label(panel.lead)}): there it is not the images that cost."
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
        f"{label(panel.lead)} is at {share[first]} of the floor's rate at {_at(panel, first)} "
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
    each = _each({n: f"{max(a, 0):.0f} + {figure(b)} an image" for n, (a, b) in lines.items()})
    room = panel.curves[panel.lead][0]["device_mb"]
    ends = {name: (room - a) / b for name, (a, b) in lines.items() if room and b > 0}
    full = {n: f"{math.floor(end):,}" for n, end in ends.items() if end <= FAR * panel.places[-1]}
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
    return [f"{label(panel.lead)} needs {ratio:.2f}x of eager's at {_at(panel, both[-1])}."]


def _ends_early(panel: Panel) -> list[str]:
    found = {}
    for name in panel.curves:
        for place, why in panel.missing(name).items():
            found.setdefault(why, {}).setdefault(label(name), []).append(_at(panel, place))
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
    return ", ".join(f"{value} ({label(name)})" for name, value in values.items())


def _ends(own: Mapping[Place, rows.Row]) -> tuple[Place, Place]:
    places = list(own)
    return places[0], places[-1]


def _at(panel: Panel, place: Place) -> str:
    return {"batch": f"batch {place}", "resolution": f"{place} px"}.get(panel.axis, f"{place}")
