"""`python -m bench roofline`: minimum time of a model's steps, and measured times.

It compares two schedules. "What runs" is every launch of the Triton kernels on a GPU, from
`bench.floors`. The "ideal schedule" moves every tensor of a fused block once: its steps are
convolutions in a mode of `bench.layers` and passes of `bench.passes`, without loss, optimizer and
vectors of one value per channel. The floor of a launch is its bytes at the bandwidth of a copy or
its operations at the rate of a large matmul, whichever takes longer. The sum of these floors, an
estimate, bounds the images/s of the whole model. The command needs no device, and Triton only for
what runs. With rows of `layers` and `passes` (--rows) of the same model, batch and dtype, each step
of the ideal schedule also shows its measured time and implementation.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fast
from bench import roofline_plot, rows
from bench.ceilings import Ceilings, measure
from bench.compile import hopper
from bench.estimate import GPUS
from bench.floors import PARTS, Schedules, Step, kind_of, launched, total
from bench.layers import joins_of, layers_of
from bench.step import Case
from resnet_fast.blocks import ChainBlock
from resnet_fast.runtime.options import DEVICES
from resnet_fast.spec.dtypes import PRECISIONS

# bytes/s and 16-bit operations/s that a copy and a large matmul reach on a device
KNOWN = {name: (gpu.bytes_per_s, gpu.flops_per_s) for name, gpu in GPUS.items()}
MODES = {"infer": ("infer",), "train": ("fprop", "dgrad", "wgrad")}


def steps_of(model: str, kind: str, n: int, size: int, image: int = 224) -> list[Step]:
    """The ideal schedule of inference or training ("infer", "train") of `model` on n images.

    size: bytes per element. Steps are in order of first appearance, forward before backward.
    In inference a projection and the convolution that adds it are one step.
    """
    found: Counter[Step] = Counter()
    layers = Counter(layers_of(model, image))
    if kind == "infer":
        for projection, joined in joins_of(model, image):
            y = math.prod(projection.shapes(n)[1])  # neither written nor read
            moved = joined.bytes(n, size) + projection.bytes(n, size) - 2 * y * size
            name = f"{joined}".replace("+res", "+projection")
            flops = joined.flops(n) + projection.flops(n)
            step = Step("infer", name, kind_of(joined.kernel), 1, moved, flops)
            found[step] += layers[projection]
            layers[joined] -= layers.pop(projection)
    for mode in MODES[kind]:
        for layer, count in (+layers).items():
            if mode == "dgrad" and layer.channels < 16:
                continue  # the gradient of an image is not computed
            moved = layer.bytes(n, size, mode)
            found[Step(mode, str(layer), kind_of(layer.kernel), 1, moved, layer.flops(n))] += count
    for mode, name, channels, side, values in _passes(model, kind, size, image):
        step = Step(mode, f"{name} {channels}@{side}", "passes", 1, int(n * values * size), 0)
        found[step] += 1
    return [replace(step, count=count) for step, count in found.items()]


Pass = tuple[str, str, int, int, float]
"""Mode, name as in `bench.passes`, channels, side, activations moved per image."""


@functools.cache
def _passes(model: str, kind: str, size: int, image: int) -> list[Pass]:
    """The passes over memory around the convolutions, forward and backward."""
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
    """`steps` with the times of the newest rows of `bench.layers` and `bench.passes`."""
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
    """One line per step, slowest first, then the sum of all floors."""
    whole = total(steps, limits).ms
    lines = [
        f"{'mode':6} {'step':32} {'n':>3} {'MB':>8} {'GFLOP':>8} {'FLOP/B':>7} {'floor ms':>9} "
        f"{'share':>6} {'bound':8} {'ms':>8} {'% floor':>8} provider"
    ]
    shown = _gathered(steps)
    for step in sorted(shown, key=lambda one: -one.count * one.floor_ms(limits)):
        floor = step.floor_ms(limits)
        took = "" if step.ms is None else f"{step.ms:.4f}"
        share = "" if step.ms is None else f"{100 * floor / step.ms:.0f}"
        lines.append(
            f"{step.mode:6} {step.name:32} {step.count:3d} {step.bytes / 1e6:8.1f} "
            f"{step.flops / 1e9:8.1f} {step.intensity:7.1f} {floor:9.4f} "
            f"{step.count * floor / whole:6.1%} {step.bound(limits):8} {took:>8} {share:>8} "
            f"{step.provider}".rstrip()
        )
    lines.append(summary(steps, limits, n))
    return "\n".join(lines)


def _gathered(steps: Sequence[Step]) -> list[Step]:
    """`steps` with launches of equal mode and name merged into one step, their mean."""
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        groups.setdefault((step.mode, step.name), []).append(step)
    found = []
    for own in groups.values():
        count = sum(step.count for step in own)
        moved, flops = (
            sum(step.count * getattr(step, field) for step in own) // count
            for field in ("bytes", "flops")
        )
        found.append(own[0] if len(own) == 1 else replace(
            own[0], count=count, bytes=moved, flops=flops
        ))  # fmt: skip
    return found


def comparison(found: Schedules, limits: Ceilings) -> str:
    """One line per part of the step: what runs, the ideal schedule, and the difference."""
    head = f"{'launches':>8} {'GB':>7} {'floor ms':>8}"
    lines = [
        f"{'':13} {'what runs':>25}   {'ideal schedule':>25}   {'difference':>16}",
        f"{'part':13} {head}   {head}   {'GB':>7} {'floor ms':>8}",
    ]
    for part in (*PARTS, None):
        runs, ideal = (total(steps, limits, part) for steps in found)
        if runs.launches or ideal.launches:
            sides = [f"{one.launches:8d} {one.bytes / 1e9:7.2f} {one.ms:8.3f}"
                     for one in (runs, ideal)]  # fmt: skip
            more = f"{(runs.bytes - ideal.bytes) / 1e9:+7.2f} {runs.ms - ideal.ms:+8.3f}"
            lines.append(f"{part or 'all':13} {'   '.join((*sides, more))}")
    small = [step for step in found.runs if step.part == "vectors"]
    if limits.launch_us and len(small) > 1:
        ms = sum(s.count * max(s.floor_ms(limits), limits.launch_us / 1e3) for s in small)
        lines.append(
            f"vectors: {ms:.2f} ms with {limits.launch_us:.1f} us per launch in a CUDA graph, "
            f"against floors of {total(small, limits).ms:.2f} ms"
        )
    return "\n".join(lines)


def summary(steps: Sequence[Step], limits: Ceilings, n: int) -> str:
    """The sum of all floors, and the time of the measured steps."""
    all_of_it = total(steps, limits)
    said = (
        f"{all_of_it.launches} launches move {all_of_it.bytes / n / 1e6:.0f} MB per image: "
        f"at least {all_of_it.ms:.2f} ms, at most {1e3 * n / all_of_it.ms:,.0f} images/s"
    )
    known = [step for step in steps if step.ms is not None]
    if known:
        took = sum(step.count * step.ms for step in known)
        least = sum(step.count * step.floor_ms(limits) for step in known)
        said += f"; {len(known)} of {len(steps)} steps measured: {took:.2f} ms, floor {least:.2f}"
    return said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench roofline`."""
    parser.add_argument("--model", choices=resnet_fast.list_models(), default="resnet50",
                        metavar="NAME", help="model (default: resnet50)")  # fmt: skip
    parser.add_argument("--mode", default="infer,train", help="default: infer,train")
    parser.add_argument("--batch", type=int, default=256, help="batch size (default: 256)")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16", help="default: bf16")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--limits", default="h200", metavar="NAME",
                        help=f"limits of {' or '.join(KNOWN)}, or cpu or cuda to measure this "
                             "machine's (default: h200)")  # fmt: skip
    parser.add_argument("--rows", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
                        help="measured rows of bench layers and passes")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="write roofline.json and roofline.png to this folder")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables of each mode; 2 for a bad argument."""
    try:
        kinds, limits = _asked(args), _limits(args)
        rows_found = [row for row in rows.read(args.rows) if _fits(row, args)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    size = PRECISIONS[args.dtype].itemsize
    found: dict[str, Schedules] = {}
    for kind in kinds:
        steps = steps_of(args.model, kind, args.batch, size, args.image_size)
        runs, why = _runs(args, kind)
        found[kind] = own = Schedules(runs, measured(steps, rows_found))
        title = f"{args.model}, {kind}, {args.dtype}, batch {args.batch}"
        on = f"{limits.bytes_per_s / 1e12:.3g} TB/s, {limits.flops_per_s / 1e12:.3g} TFLOP/s"
        if own.runs is None:
            print(f"{title}: cannot list what runs: {why}\n")
        else:
            print(f"{title}: what runs, floors at {on} (estimate)")
            print(text(own.runs, limits, args.batch), end="\n\n")
        print(f"{title}: ideal schedule, every tensor of a fused block once, at {on} (estimate)")
        print(text(own.ideal, limits, args.batch), end="\n\n")
        if own.runs is not None:
            print(f"{title}: what runs beside the ideal schedule (estimate)")
            print(comparison(own, limits), end="\n\n")
    return 0 if args.out is None else _write(args, found, limits)


def _runs(args: argparse.Namespace, kind: str) -> tuple[list[Step] | None, str]:
    """What runs, or why it cannot be listed."""
    if args.limits == "cpu":
        return None, "it lists the launches of a GPU, and --limits is cpu"
    case = Case(args.model, kind, args.batch, args.dtype, torch.device("cuda"), args.image_size)
    try:
        return launched(case, _target(args.limits)), ""
    except ImportError as error:
        return None, f"Triton is needed ({error})"
    except ValueError as error:  # interpreted kernels
        return None, str(error)


def _target(limits: str) -> Any:
    """The GPU that launches are chosen for: a Hopper, or with "cuda" this machine's."""
    if limits != "cuda":
        return hopper()
    from resnet_fast.kernels.launch import target

    return target(torch.empty(0, device="cuda"))


def _write(args: argparse.Namespace, found: dict[str, Schedules], limits: Ceilings) -> int:
    """Write roofline.json (per mode the steps of both schedules) and the picture."""
    args.out.mkdir(parents=True, exist_ok=True)
    listed = {
        kind: {
            name: None if steps is None else [asdict(step) for step in steps]
            for name, steps in own._asdict().items()
        }
        for kind, own in found.items()
    }
    (args.out / "roofline.json").write_text(json.dumps(listed, indent=1))
    title = f"{args.model}, {args.dtype}, batch {args.batch}, {args.image_size} px on {args.limits}"
    try:
        roofline_plot.plot(found, limits, args.batch, title, args.out / "roofline.png")
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
        return Ceilings(*KNOWN[args.limits], args.dtype, GPUS[args.limits].small_us)
    if args.limits not in DEVICES:
        names = ", ".join((*KNOWN, *DEVICES))
        raise ValueError(f"--limits: expected one of {names}, got {args.limits!r}")
    if args.limits == "cuda" and not torch.cuda.is_available():
        raise ValueError("--limits: cuda needs a GPU: torch.cuda.is_available() is False here")
    return measure(torch.device(args.limits), args.dtype)
