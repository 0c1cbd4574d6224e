"""`python -m bench roofline`: the least time that a model's steps can take, and what they took.

A step is one launch of the fused schedule: a convolution in one of the modes of `bench.layers`, or
a pass over memory of `bench.passes`. It moves each of its tensors once, so it cannot take less than
its bytes at the bandwidth of a copy, nor than its operations at the rate of a large product
(Williams, Waterman & Patterson 2009, "Roofline", CACM 52(4)). The sum of these floors bounds the
images/s of the whole model. It needs no device; with rows of `layers` and `passes` (--rows) of the
same model, batch and dtype each step also says what it took and by whom.

Left out: loss and optimizer, and vectors of one value a channel.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fast
from bench import rows
from bench.ceilings import Ceilings, measure
from bench.layers import layers_of
from bench.report import neutral
from bench.step import DTYPES
from resnet_fast.blocks import ChainBlock
from resnet_fast.options import DEVICES

# bytes/s and 16-bit operations/s that a copy and a large product reach on a device
KNOWN = {"h200": (4.3e12, 790e12)}
MODES = {"infer": ("infer",), "train": ("fprop", "dgrad", "wgrad")}
KINDS = {"1x1": "#e8590c", "3x3": "#4dabf7", "other filters": "#845ef7", "passes": "#8b949e"}


@dataclass(frozen=True)
class Step:
    """A launch that a pass over the model makes `count` times; bytes and flops are of one.

    ms and provider: what it took, where rows say so.
    """

    mode: str
    name: str
    kind: str
    count: int
    bytes: int
    flops: int
    ms: float | None = None
    provider: str = ""

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    def floor_ms(self, limits: Ceilings) -> float:
        """The least that one launch takes."""
        return limits.floor_ms(self.bytes, self.flops)

    def bound(self, limits: Ceilings) -> str:
        """Which limit that is."""
        memory = self.bytes / limits.bytes_per_s >= self.flops / limits.flops_per_s
        return "memory" if memory else "compute"


def steps_of(model: str, kind: str, n: int, size: int, image: int = 224) -> list[Step]:
    """The steps of inference or training ("infer", "train") of `model` on n images.

    size: bytes an element. In the order in which they first come, forward before backward.
    """
    found: Counter[Step] = Counter()
    for mode in MODES[kind]:
        for layer, count in layers_of(model, image).items():
            if mode == "dgrad" and layer.channels < 16:
                continue  # nobody asks for the gradient of an image
            filters = f"{layer.kernel[0]}x{layer.kernel[1]}"
            shape = filters if filters in KINDS else "other filters"
            moved = layer.bytes(n, size, mode)
            found[Step(mode, str(layer), shape, 1, moved, layer.flops(n))] += count
    for mode, name, channels, side, values in _passes(model, kind, size, image):
        step = Step(mode, f"{name} {channels}@{side}", "passes", 1, int(n * values * size), 0)
        found[step] += 1
    return [replace(step, count=count) for step, count in found.items()]


Pass = tuple[str, str, int, int, float]
"""Mode, name as in `bench.passes`, channels, side, activations moved an image."""


@functools.cache
def _passes(model: str, kind: str, size: int, image: int) -> list[Pass]:
    """The passes over memory around the convolutions, on their way forward and back."""
    found: list[Pass] = []
    bit, byte = 1 / (8 * size), 1 / size

    def values(x: Tensor) -> int:
        return x[0].numel()

    def add(mode: str, name: str, x: Tensor, moved: float) -> None:
        found.append((mode, name, x.size(1), x.size(2), moved))

    def block(module: ChainBlock, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        parts, x, v = module.parts(), inputs[0], values(y)
        if parts.norms[0] is not None:  # pre-activation
            own = values(x)
            if kind == "infer":
                add("infer", "bn + relu", x, 2 * own)
            else:
                add("fprop", "statistics", x, own)
                add("dgrad", "bn backward + residual", x, 4 * own)
        if parts.norms[-1] is None:
            if kind == "train" and parts.shortcut != "none":
                add("fprop", "addition", y, 3 * v)
            return
        if kind == "train":
            two = parts.projection_norm is not None
            names = ("bn + bn + relu", "sums of two") if two else ("bn + add + relu", "sums")
            alone = parts.shortcut == "none"
            add("fprop", "bn + relu" if alone else names[0], y, (3 - alone + bit) * v)
            add("dgrad", names[1], y, (2 + two + bit) * v)

    def pool(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        x, large, small = inputs[0], values(inputs[0]), values(y)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            add(MODES[kind][0], "average pool", x, large)
            if kind == "train":
                add("dgrad", "average pool backward", x, large)
        elif kind == "infer":
            add("infer", "max-pool", x, large + small)
        else:
            add("fprop", "bn + relu + max-pool", x, large + (1 + byte) * small)
            add("dgrad", "max-pool backward", x, 2 * large + (1 + byte) * small)

    with torch.device("meta"):
        net = resnet_fast.unfuse(resnet_fast.create_model(model, impl="reference")).eval()
        for module in net.modules():
            if isinstance(module, ChainBlock):
                module.register_forward_hook(block)
            elif isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
                module.register_forward_hook(pool)
        net(torch.empty(1, 3, image, image))
    return found


def measured(steps: Iterable[Step], found: Iterable[rows.Row]) -> list[Step]:
    """`steps` with what the newest rows of `bench.layers` and `bench.passes` say of them."""
    times: dict[tuple[str, str], rows.Row] = {}
    for row in sorted(found, key=lambda row: row["date"]):
        if row["benchmark"] == "layers" and row["provider"] == "resnet_fast":
            times[row["mode"], row["layer"]] = row
        elif row["benchmark"] == "passes":
            key = "", f"{row['mode']} {row['layer'].rpartition(' ')[2]}"
            other = times.get(key)
            if other is None or other["date"] < row["date"] or row["ms_p50"] < other["ms_p50"]:
                times[key] = row
    result = []
    for step in steps:
        row = times.get(("" if step.kind == "passes" else step.mode, step.name))
        if row is not None:
            step = replace(step, ms=row["ms_p50"], provider=row["impl"] or row["provider"])
        result.append(step)
    return result


def text(steps: Sequence[Step], limits: Ceilings, n: int) -> str:
    """A line a step, the costliest first, then what all of them take at the least."""
    floors = {step: step.count * step.floor_ms(limits) for step in steps}
    total = sum(floors.values())
    lines = [
        f"{'mode':6} {'step':32} {'n':>2} {'MB':>8} {'GFLOP':>8} {'FLOP/B':>7} {'floor ms':>9} "
        f"{'share':>6} {'bound':8} {'ms':>8} {'% floor':>8} provider"
    ]
    for step in sorted(steps, key=floors.__getitem__, reverse=True):
        floor = step.floor_ms(limits)
        took = "" if step.ms is None else f"{step.ms:.4f}"
        share = "" if step.ms is None else f"{100 * floor / step.ms:.0f}"
        lines.append(
            f"{step.mode:6} {step.name:32} {step.count:2d} {step.bytes / 1e6:8.1f} "
            f"{step.flops / 1e9:8.1f} {step.intensity:7.1f} {floor:9.4f} "
            f"{floors[step] / total:6.1%} {step.bound(limits):8} {took:>8} {share:>8} "
            f"{step.provider}".rstrip()
        )
    lines.append(summary(steps, limits, n))
    return "\n".join(lines)


def summary(steps: Sequence[Step], limits: Ceilings, n: int) -> str:
    """All the floors together, and the time of what was measured."""
    total = sum(step.count * step.floor_ms(limits) for step in steps)
    moved = sum(step.count * step.bytes for step in steps)
    said = (
        f"{sum(step.count for step in steps)} launches move {moved / n / 1e6:.0f} MB an image: "
        f"at least {total:.2f} ms, no more than {1e3 * n / total:,.0f} images/s"
    )
    known = [step for step in steps if step.ms is not None]
    if known:
        took = sum(step.count * step.ms for step in known)
        least = sum(step.count * step.floor_ms(limits) for step in known)
        said += f"; {len(known)} of {len(steps)} steps measured: {took:.2f} ms, floor {least:.2f}"
    return said


def plot(found: dict[str, Sequence[Step]], limits: Ceilings, title: str, path: Path) -> None:
    """A roofline a kind of pass ("infer", "train") with the steps on it; PNG at `path`.

    An area is a step's share of the floors' sum. Measured steps are full below the roof, at the
    rate that they reached; the others are hollow on it. Passes multiply nothing: their place is at
    the left, those that are not measured in one circle. RuntimeError without matplotlib.
    """
    neutral(_plot, found, limits, title, path)


def _plot(found, limits, title, path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = 3.0, 4000.0
    ridge = limits.flops_per_s / limits.bytes_per_s
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (kind, steps) in zip(panels, found.items(), strict=True):
        roof = [left, ridge, right]
        rates = [min(limits.flops_per_s, x * limits.bytes_per_s) / 1e12 for x in roof]
        axes.plot(roof, rates, color="#8b949e", linewidth=1.5, zorder=1)
        total = sum(step.count * step.floor_ms(limits) for step in steps)
        for shape, color in KINDS.items():
            for filled in (False, True):
                own = [s for s in steps if s.kind == shape and (s.ms is not None) == filled]
                x = [max(s.intensity, left * 1.4) for s in own]
                times = [s.ms if filled else s.floor_ms(limits) for s in own]
                y = [i * s.bytes / t / 1e9 for s, i, t in zip(own, x, times, strict=True)]
                area = [2500 * s.count * s.floor_ms(limits) / total for s in own]
                if own and shape == "passes" and not filled:
                    x, y, area = x[:1], y[:1], [sum(area)]
                axes.scatter(
                    x, y, area, alpha=0.75, zorder=2, linewidth=1.2, edgecolors=color,
                    facecolors=color if filled else "none",
                )  # fmt: skip
        shares = Counter()
        for step in steps:
            shares[step.kind] += step.count * step.floor_ms(limits) / total
        for shape, color in KINDS.items():
            if shares[shape]:
                label = f"{shape}: {shares[shape]:.0%} of the least time"
                axes.scatter([], [], 50, color=color, label=label, alpha=0.75)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", xlim=(left, right))
        axes.set_ylim(top=1.35 * limits.flops_per_s / 1e12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.set_title({"infer": "inference", "train": "training"}[kind], fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.grid(alpha=0.25, linewidth=0.6, which="major")
        axes.spines[["top", "right"]].set_visible(False)
        axes.text(right, rates[1] * 1.08, f"{limits.flops_per_s / 1e12:.3g} TFLOP/s ",
                  fontsize=8, ha="right", va="bottom")  # fmt: skip
        axes.annotate(
            f"{limits.bytes_per_s / 1e12:.2g} TB/s",
            (ridge / 15, ridge / 15 * limits.bytes_per_s / 1e12), (-8, 4),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    panels[0].set_ylabel("TFLOP/s")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench roofline`."""
    parser.add_argument("--model", choices=resnet_fast.list_models(), default="resnet50",
                        metavar="NAME")  # fmt: skip
    parser.add_argument("--mode", default="infer,train", help="of infer,train")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--limits", default="h200", metavar="NAME",
                        help=f"{', '.join(KNOWN)}, or cpu or cuda: measured here")  # fmt: skip
    parser.add_argument("--rows", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
                        help="of bench layers and passes")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write roofline.json and roofline.png")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print a table a mode; 2 for a bad argument."""
    try:
        kinds, limits = _asked(args), _limits(args)
        found = [row for row in rows.read(args.rows) if _fits(row, args)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    size = DTYPES[args.dtype].itemsize
    steps = {
        kind: measured(steps_of(args.model, kind, args.batch, size, args.image_size), found)
        for kind in kinds
    }
    for kind, own in steps.items():
        print(f"{args.model}, {kind}, {args.dtype}, batch {args.batch}")
        print(text(own, limits, args.batch), end="\n\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        title = (
            f"{args.model}, {args.dtype}, batch {args.batch}, {args.image_size} px: "
            "every launch of the fused schedule (area: its share of the least time)"
        )
        listed = {kind: [asdict(step) for step in own] for kind, own in steps.items()}
        (args.out / "roofline.json").write_text(json.dumps(listed, indent=1))
        try:
            plot(steps, limits, title, args.out / "roofline.png")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _asked(args: argparse.Namespace) -> list[str]:
    kinds = args.mode.split(",")
    unknown = [kind for kind in kinds if kind not in MODES]
    if unknown:
        raise ValueError(f"--mode: expected some of {', '.join(MODES)}, got {unknown[0]!r}")
    if args.batch < 1 or args.image_size < 32:
        raise ValueError("--batch: expected at least 1, and --image-size at least 32")
    return kinds


def _fits(row: rows.Row, args: argparse.Namespace) -> bool:
    same = row["batch"] == args.batch and row["dtype"] == args.dtype
    return (
        same
        and row["benchmark"] in ("layers", "passes")
        and row["model"] in (args.model, None)
        and row["image_size"] in (args.image_size, None)
    )


def _limits(args: argparse.Namespace) -> Ceilings:
    if args.limits in KNOWN:
        return Ceilings(*KNOWN[args.limits], args.dtype)
    if args.limits not in DEVICES:
        names = ", ".join((*KNOWN, *DEVICES))
        raise ValueError(f"--limits: expected one of {names}, got {args.limits!r}")
    if args.limits == "cuda" and not torch.cuda.is_available():
        raise ValueError("--limits: torch.cuda.is_available() is False here")
    return measure(torch.device(args.limits), args.dtype)
