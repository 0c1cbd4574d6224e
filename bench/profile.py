"""Kernel times of a step on a GPU, by PyTorch's profiler, next to their estimates.

Kernels are grouped by name and grid, so launches of one kernel at different sizes are separate.
`by_name` sums them and adds the estimate (`bench.estimate`, not a measurement) for kernels that it
knows by name.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPLAYS = 3
CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

Event = Mapping[str, Any]
"""An event of a Chrome trace: name, ts and dur in µs, args."""


def recorded(run: Callable[[int], object], replays: int = REPLAYS) -> list[Event]:
    """GPU events of `replays` calls of the warm step `run`."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        for i in range(replays):
            run(i)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("cat") in CATEGORIES]


def summary(
    events: Iterable[Event],
    estimate: Mapping[str, Any] | None = None,
    replays: int = REPLAYS,
) -> dict[str, Any]:
    """Kernels of one step, the slowest first, and by name next to the launches of `estimate`.

    Counts and total_us are per step, the mean over `replays`. span_us is the time from a step's
    first kernel to the next step's, busy_us the part of it in which kernels ran.
    """
    events = list(events)
    kernels = _grouped(events, lambda event: (event["name"], _grid(event)), replays)
    for kernel in kernels:
        kernel["name"], kernel["grid"] = kernel.pop("key")
    names = _grouped(events, lambda event: event["name"], replays)
    predicted = by_kernel(() if estimate is None else estimate["launches"])
    for name in names:
        name["name"] = name.pop("key")
        name |= predicted.pop(name["name"], {"estimate_count": None, "estimate_us": None})
    for missing, values in predicted.items():
        nothing = {"count": 0, "total_us": 0.0, "mean_us": None}
        names.append({**nothing, "name": missing, **values})
    busy = sum(event["dur"] for event in events) / replays
    span = max((e["ts"] + e["dur"] for e in events), default=0) - min(
        (e["ts"] for e in events), default=0
    )
    return {
        "replays": replays,
        "busy_us": round(busy, 2),
        "span_us": round(span / replays, 2),
        "estimate_us": None if estimate is None else round(1e3 * estimate["total_ms"], 2),
        "by_name": names,
        "kernels": kernels,
    }


def by_kernel(launches: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Number of launches of each kernel in an estimate, and their total time."""
    found: dict[str, dict[str, Any]] = {}
    for one in launches:
        own = found.setdefault(one["kernel"], {"estimate_count": 0, "estimate_us": 0.0})
        own["estimate_count"] += one["count"]
        own["estimate_us"] = round(own["estimate_us"] + one["count"] * one["estimate_us"], 3)
    return found


def text(found: Mapping[str, Any], longest: int = 12) -> str:
    """One line per kernel of `summary`, the `longest` slowest ones."""
    lines = [f"{'kernel':60} {'count':>7} {'us':>9} {'each':>8} {'estimate us':>12}"]
    for one in found["by_name"][:longest]:
        each, guess = (_cell(one[key]) for key in ("mean_us", "estimate_us"))
        name = one["name"] if len(one["name"]) <= 60 else one["name"][:59] + "…"
        total = _cell(one["total_us"])
        lines.append(f"{name:60} {one['count']:7g} {total:>9} {each:>8} {guess:>12}")
    lines.append(
        f"busy {_cell(found['busy_us'])} of {_cell(found['span_us'])} us per step, "
        f"estimate {_cell(found['estimate_us'])} us"
    )
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _grouped(
    events: Sequence[Event], key: Callable[[Event], Any], replays: int
) -> list[dict[str, Any]]:
    groups: dict[Any, list[float]] = defaultdict(list)
    for event in events:
        groups[key(event)].append(event["dur"])
    found = [
        {
            "key": name,
            "count": round(len(times) / replays, 2),
            "total_us": round(sum(times) / replays, 3),
            "mean_us": round(sum(times) / len(times), 3),
        }
        for name, times in groups.items()
    ]
    return sorted(found, key=lambda one: -one["total_us"])


def _grid(event: Event) -> tuple[int, ...] | None:
    grid = event.get("args", {}).get("grid")
    return None if grid is None else tuple(grid)
