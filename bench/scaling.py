"""`python -m bench scaling`: throughput and memory against batch, resolution and depth.

One axis is swept while the other two stay at a centre (of `RANGES`, or the middle of a list of
yours that lacks it). Points are measured as `bench.models` measures cases, behind the same gate,
each axis from its ends inwards, so that a budget that runs out leaves coarse curves and no half
ones. A provider that runs out of memory beside the others is measured alone; where that fails too
the row says so and the curve goes on. `bench.curves` reads the rows,
`--plot` draws them; with `--rows` nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bench import ceilings, curves, memory, models, roofline, rows, scaling_plot
from bench.step import Case
from resnet_fast.runtime.options import device, integers, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranges:
    """What is swept on a kind of device unless asked otherwise, and where the rest stays."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    centre: tuple[str, int, int]
    dtype: str
    minutes: float


RANGES = {
    "cpu": Ranges(
        ("resnet18", "resnet34", "resnet50"), (1, 4, 16), (64, 128, 224),
        ("resnet18", 4, 128), "fp32", 10,
    ),
    "cuda": Ranges(
        ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (128, 160, 192, 224, 256, 320, 384, 448),
        ("resnet50", 64, 224), "bf16", 60,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A place on one or more curves."""

    model: str
    batch: int
    image_size: int
    over: tuple[str, ...]


def coarse_first(values: Sequence[Value]) -> list[Value]:
    """`values` in an order whose every beginning spans them: the ends, then middles of gaps."""
    last = len(values) - 1
    order, gaps = list(dict.fromkeys([0, max(last, 0)])) if values else [], [(0, last)]
    for low, high in gaps:  # grows
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [values[i] for i in order]


def points(
    over: Iterable[str],
    models: Sequence[str],
    batches: Sequence[int],
    sizes: Sequence[int],
    centre: tuple[str, int, int],
) -> list[Point]:
    """Every point once, the centre first, then the axes in turns, each by `coarse_first`."""
    lists = (models, batches, sizes)
    fixed = [
        value if value in choice else choice[len(choice) // 2]
        for choice, value in zip(lists, centre, strict=True)
    ]
    sweeps = []
    for axis in over:
        place = ("depth", "batch", "resolution").index(axis)
        ordered = dict.fromkeys([fixed[place], *coarse_first(lists[place])])
        sweeps.append([
            (axis, tuple(value if i == place else fixed[i] for i in range(3)))
            for value in ordered
        ])  # fmt: skip
    found: dict[tuple[Any, ...], list[str]] = {}
    for turn in zip_longest(*sweeps):
        for axis, place in filter(None, turn):
            found.setdefault(place, []).append(axis)
    return [Point(*place, tuple(axes)) for place, axes in found.items()]


@dataclass
class Sweep:
    """Measures points one by one and remembers what the next ones need."""

    providers: list[str]
    seconds: float
    facts: rows.Row
    device_mb: float | None = None
    room_mb: float | None = None
    failed: bool = False
    plain: dict[str, nn.Module] = field(default_factory=dict)
    admitted: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    known: dict[str, tuple[float, float]] = field(default_factory=dict)  # mode → bytes, peak

    def measure(self, case: Case, over: Sequence[str]) -> list[rows.Row]:
        """Rows of the case; of a provider that has no memory for it, one that says so."""
        key = case.model, case.mode, case.dtype
        if case.model not in self.plain:
            self.plain[case.model] = models.plain_model(case.model, case.image_size)
        plain = self.plain[case.model]
        if key not in self.admitted:
            self.admitted[key] = models.admitted(plain, case, self.providers)
        if not self.admitted[key]:
            self.failed = True
            return []
        moved = 0 if self.room_mb is None else bytes_of(case)
        if self.room_mb is not None and self.need_mb(case.mode, moved) > self.room_mb:
            why = dict.fromkeys(self.providers, "more than the free memory, by estimate")
            return self._rows([], why, case, over)
        found, why = self._measure(plain, case, self.providers)
        short = [name for name, reason in why.items() if reason in models.SHORT]
        if len(self.providers) > 1:  # together they hold more than one alone
            for name in short:
                models.say(f"{case}: {name} alone, for want of memory")
                more, again = self._measure(plain, case, [name])
                found += more
                del why[name]
                why |= again
        self.failed |= any(reason not in models.SHORT for reason in why.values())
        if found and moved >= self.known.get(case.mode, (0, 0))[0]:
            self.known[case.mode] = moved, max(row["peak_mb"] for row in found)
        why = {name: reason for name, reason in why.items() if reason in models.SHORT}
        return self._rows(found, why, case, over)

    def need_mb(self, mode: str, moved: float) -> float:
        """Peak memory that a case which moves `moved` bytes should need, by the largest so far."""
        most, peak = self.known.get(mode, (1, 0.0))
        return peak * moved / most

    def _measure(self, plain: nn.Module, case: Case, providers: Sequence[str]):
        return models.measure(plain, case, providers, self.facts, seconds=self.seconds)

    def _rows(self, found, why, case: Case, over: Sequence[str]) -> list[rows.Row]:
        every = {"over": ",".join(over), "device_mb": self.device_mb}
        without = [
            {**self.facts, "model": case.model, "mode": case.mode, "batch": case.batch,
             "dtype": case.dtype, "layout": models.PROVIDERS[name].layout, "provider": name,
             "image_size": case.image_size, "impl": case.impl, "optimizer": case.optimizer,
             "graph": case.graph, "failed": reason}
            for name, reason in why.items()
        ]  # fmt: skip
        return [
            rows.point_row({**row, **every, "benchmark": "scaling"}) for row in (*found, *without)
        ]


def bytes_of(case: Case) -> int:
    """What the fused schedule moves in one step of the case."""
    size = PRECISIONS[case.dtype].itemsize
    steps = roofline.steps_of(case.model, case.mode, case.batch, size, case.image_size)
    return sum(one.count * one.bytes for one in steps)


def within(
    todo: Iterable[tuple[Case, Sequence[str]]],
    seconds: float,
    measure: Callable[[Case, Sequence[str]], list[rows.Row]],
    clock: Callable[[], float] = time.perf_counter,
) -> list[rows.Row]:
    """Rows of the cases that should end within `seconds`; the others are named on stderr.

    A case is expected to take as long as the longest of its mode so far.
    """
    start, longest = clock(), {}
    found: list[rows.Row] = []
    for case, over in todo:
        begin = clock()
        left, expected = seconds - (begin - start), longest.get(case.mode, 0.0)
        if expected > left:
            models.say(f"scaling: left out {case}: {expected:.0f} s, {left:.0f} s left")
            continue
        found += measure(case, over)
        longest[case.mode] = max(expected, clock() - begin)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench scaling`; what is not given comes from `RANGES`."""
    add = parser.add_argument

    def ranges(name: str) -> str:
        found = {kind: ",".join(map(str, getattr(r, name))) for kind, r in RANGES.items()}
        return "; ".join(f"{kind}: {values}" for kind, values in found.items())

    centres = " and ".join(
        f"{model}, batch {batch}, {size} px on {kind}"
        for kind, (model, batch, size) in ((kind, r.centre) for kind, r in RANGES.items())
    )
    parser.epilog = (
        f"While one axis is swept the others stay at {centres}, where their lists have it, else at "
        "the middle of the list."
    )
    add("--over", type=names(lambda: curves.AXES), default=list(curves.AXES), metavar="AXIS,…",
        help=f"axes to sweep, of {','.join(curves.AXES)} (all)")  # fmt: skip
    add("--model", type=names(models.model_names), metavar="NAME,…",
        help=f"swept by depth ({ranges('models')})")  # fmt: skip
    add("--batch", type=integers, metavar="N,…", help=f"swept by batch ({ranges('batches')})")
    add("--image-size", type=integers, metavar="N,…",
        help=f"swept by resolution, at least 32 ({ranges('sizes')})")  # fmt: skip
    add("--mode", type=names(lambda: models.MODES), default=list(models.MODES),
        metavar="infer,train")  # fmt: skip
    add("--dtype", type=names(lambda: PRECISIONS), metavar="fp32,bf16,fp16",
        help="fp32 on a CPU, bf16 on a GPU")  # fmt: skip
    add("--device", type=device, default=torch.device("cpu"), metavar="cpu|cuda")
    add("--providers", type=names(lambda: models.PROVIDERS), metavar="NAME,…",
        default=["eager", "compile", "resnet_fast"],
        help=f"of {', '.join(models.PROVIDERS)} (all but eager_nchw)")  # fmt: skip
    add("--impl", choices=models.IMPLS, default="auto", help="implementation that resnet_fast runs")
    add("--graph", action="store_true", help="CUDA graphs, as in bench models")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--seconds", type=positive(float), default=3.0, metavar="S", help="timing of a case (3)")
    add("--minutes", type=positive(float), metavar="M",
        help="budget: "
        + ", ".join(f"{r.minutes:g} on {kind}" for kind, r in RANGES.items()))  # fmt: skip
    add("--out", type=Path, default=Path("build/bench/scaling.jsonl"), metavar="FILE.jsonl",
        help="append the rows to this file (build/bench/scaling.jsonl)")  # fmt: skip
    add("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    add("--rows", type=Path, nargs="+", metavar="FILE.jsonl", help="measure nothing, show these")


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw; 1 when a gate was red or a provider failed, 2 for a bad argument."""
    if args.rows is not None:
        try:
            found = rows.read(args.rows)
        except (OSError, ValueError) as error:
            print(f"--rows: {error}", file=sys.stderr)
            return 2
        return show(found, args.plot)
    if args.image_size is not None and min(args.image_size) < 32:
        print("--image-size: expected at least 32", file=sys.stderr)
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    ranges = RANGES[args.device.type]
    cuda = args.device.type == "cuda"
    facts = rows.facts(args.device)
    # out of memory is an error on a GPU and, as a rule, the end of the process on a CPU
    room = None if cuda else memory.available_mb()
    sweep = Sweep(args.providers, args.seconds, facts, memory.device_mb(args.device), room)
    found: list[rows.Row] = []

    def keep(new: list[rows.Row]) -> list[rows.Row]:
        found.extend(new)
        if new:
            rows.append(args.out, new)
        return new

    dtypes = args.dtype or [ranges.dtype]
    start = time.perf_counter()
    if cuda:
        keep([ceilings.row(facts, ceilings.measure(args.device, dt)) for dt in dtypes])
    todo = [
        (Case(point.model, mode, point.batch, dtype, args.device, point.image_size, args.impl,
              graph=args.graph and cuda), point.over)
        for point in points(args.over, args.model or ranges.models, args.batch or ranges.batches,
                            args.image_size or ranges.sizes, ranges.centre)
        for mode, dtype in product(args.mode, dtypes)
    ]  # fmt: skip
    seconds = 60 * (args.minutes or ranges.minutes) - (time.perf_counter() - start)
    within(todo, seconds, lambda case, over: keep(sweep.measure(case, over)))
    return max(show(found, args.plot), int(sweep.failed))


def show(found: Sequence[rows.Row], picture: Path | None) -> int:
    """The table on stdout and the picture; 1 where there is nothing to show."""
    panels = curves.panels(found)
    if not panels:
        print("scaling: no rows of this benchmark", file=sys.stderr)
        return 1
    for panel in panels:
        print(panel.title, curves.table(panel), sep="\n", end="\n\n")
    if picture is not None:
        try:
            scaling_plot.plot(panels, picture)
        except RuntimeError as error:
            print(f"scaling: {error}", file=sys.stderr)
            return 1
    return 0
