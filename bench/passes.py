"""`python -m bench passes`: every memory-bound op at the shapes of ResNet-50, relative to a copy.

A pass reads and writes each of its tensors once. The quality of its kernel is its bandwidth as a
share of a measured copy's. Each implementation that can run on the device is timed, after its
result is compared with the reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import rows
from bench.ceilings import Ceilings, measure, median_ms
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime.options import DEVICES
from resnet_fast.spec.dtypes import PRECISIONS, stats_dtype
from resnet_fast.spec.layout import mask_shape

SHAPES = {  # channels, side: the stem, the outputs of bottlenecks and the inside of one
    "stem 64@112": (64, 112),
    "layer1 64@56": (64, 56),
    "layer1 256@56": (256, 56),
    "layer2 512@28": (512, 28),
    "layer3 1024@14": (1024, 14),
    "layer4 2048@7": (2048, 7),
}
IMPLS = {"cuda": ("triton", "native"), "cpu": ("native",)}
Pass = tuple[str, list[Any], float]
"""Op, arguments except `impl`, number of activations moved (one bit per element: 1/16 in bf16)."""


def passes(x: Tensor) -> dict[str, Pass]:
    """The memory-bound ops on tensors like x, by name."""
    c, wide = x.size(1), stats_dtype(x)
    bit = 1 / (8 * x.element_size())
    y, z = (torch.randn_like(x) for _ in range(2))
    mask = torch.randint(0, 256, mask_shape(x), dtype=torch.uint8, device=x.device)
    a, b, mean, rstd = (torch.rand(c, dtype=wide, device=x.device) + 0.5 for _ in range(4))
    scale, shift, centre = (torch.rand(x.shape[:2], dtype=wide, device=x.device) for _ in range(3))
    none, windows = [None] * 3, [[3, 3], [2, 2], [1, 1]]
    pooled, index = ops.bn_relu_max_pool(x, a, b, *windows, True, "reference")
    small = (pooled.numel() + index.numel() / x.element_size()) / x.numel()
    return {
        "statistics": ("bn_stats", [x], 1),
        "bn + relu": ("bn_act", [x, a, b, *none, True, True], 2 + bit),
        "bn + add + relu": ("bn_act", [x, a, b, y, None, None, True, True], 3 + bit),
        "bn + bn + relu": ("bn_act", [x, a, b, y, mean, rstd, True, True], 3 + bit),
        "add + relu": ("add_relu", [x, y, True], 3 + bit),
        "relu backward": ("add_relu_bwd", [x, mask], 2 + bit),
        "sums": ("bn_act_bwd_reduce", [x, mask, y, mean, rstd, a, *none, None], 2 + bit),
        "sums of two": ("bn_act_bwd_reduce", [x, mask, y, mean, rstd, a, z, a, b, mean], 3 + bit),
        "bn backward": ("bn_act_bwd_apply", [x, mask, a, y, mean, b, rstd, None], 3 + bit),
        "bn backward + residual": ("bn_act_bwd_apply", [x, None, a, y, mean, b, rstd, z], 4),
        "bn + relu + max-pool": ("bn_relu_max_pool", [x, a, b, *windows, True], 1 + small),
        "max-pool backward": ("max_pool_bwd", [pooled, index, x, mean, rstd, *windows], 2 + small),
        "statistics of images": ("image_stats", [x], 1),
        "gate + add + relu": ("gated_act", [x, scale, shift, y, True, True], 3 + bit),
        "gate sums": ("gated_act_bwd_reduce", [x, mask, y, centre], 3 + bit),
        "gate backward": ("gated_act_bwd_apply", [x, scale, shift, y, centre, scale], 3),
        "average pool": ("global_avg_pool", [x], 1),
    }


def measurements(
    name: str, n: int, dtype: str, limits: Ceilings, facts: rows.Row
) -> Iterator[tuple[str, str, Callable[[], rows.Row]]]:
    """(pass, implementation, function that returns the timed row) of all that run at a shape."""
    device = torch.device(facts["device"])
    channels, side = SHAPES[name]
    # Mean 0.5: a mean near zero is a small difference of large sums, and mostly rounding error.
    x = (torch.randn(n, channels, side, side, device=device) + 0.5).to(PRECISIONS[dtype])
    for what, (op, args, activations) in passes(
        x.contiguous(memory_format=torch.channels_last)
    ).items():
        run = partial(getattr(ops, op), *args)
        moved = int(activations * x.numel() * x.element_size())
        for impl in IMPLS[device.type]:
            if backends.refusal(impl, op, device.type, x.dtype) is None:
                given = {**facts, "mode": what, "batch": n, "dtype": dtype, "layer": name}
                yield what, impl, partial(measured, run, impl, moved, limits, given)


def measured(
    run: Callable[[str], Any], impl: str, moved: int, limits: Ceilings, facts: rows.Row
) -> rows.Row:
    """The row of a pass that moves `moved` bytes, by one implementation."""
    gate(run, impl)
    ms = median_ms(partial(run, impl), torch.device(facts["device"]))
    return rows.layer_row(
        facts, benchmark="passes", layout="channels_last", provider=impl, impl=impl, ms_p50=ms,
        gb_per_s=moved / ms / 1e6, percent_of_floor=100 * limits.floor_ms(moved, 0) / ms,
    )  # fmt: skip


def gate(run: Callable[[str], Any], impl: str) -> None:
    """Raise RuntimeError unless `impl` gives what the reference does, up to rounding."""
    results = [run(name) for name in (impl, "reference")]
    for ours, theirs in zip(*([r] if isinstance(r, Tensor) else r for r in results), strict=True):
        if not ours.is_floating_point() or ours.numel() == 0:
            continue
        error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
        if not error <= 16 * max(torch.finfo(ours.dtype).eps, 1e-6):
            raise RuntimeError(f"differs from the reference by {error:.2e} of the norm")


def text(found: list[rows.Row]) -> str:
    """One line per shape and pass: each implementation's ms and share of the copy's bandwidth."""
    impls = list(dict.fromkeys(row["provider"] for row in found))
    lines = [f"{'at':16} {'pass':24}" + "".join(f" {impl + ' ms':>14}  % copy" for impl in impls)]
    for key in dict.fromkeys((row["layer"], row["mode"]) for row in found):
        own = {row["provider"]: row for row in found if (row["layer"], row["mode"]) == key}
        cells = [
            f" {own[impl]['ms_p50']:14.4f} {own[impl]['percent_of_floor']:7.0f}"
            if impl in own else f" {'-':>14} {'-':>7}"
            for impl in impls
        ]  # fmt: skip
        lines.append(f"{key[0]:16} {key[1]:24}" + "".join(cells))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench passes`."""
    parser.add_argument("--shape", default=",".join(SHAPES),
                        help=f"some of: {', '.join(SHAPES)} (default: all)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256, help="batch size (default: 256)")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16", help="default: bf16")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl",
                        help="append the rows to this file")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a pass failed, 2 for a bad argument.

    The rows of a pass are appended when it is done; passes after a failed one still run.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: expected cpu: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    names = args.shape.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        print(f"--shape: expected some of {', '.join(SHAPES)}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    if args.batch < 1:
        print(f"--batch: expected at least 1, got {args.batch}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    facts, limits = rows.facts(device), measure(device, args.dtype)
    done = rows.Collection("passes", args.out)
    with torch.no_grad():
        for name in names:
            with done.part(name):
                for what, impl, run in measurements(name, args.batch, args.dtype, limits, facts):
                    with done.part(f"{what} at {name} by {impl}"):
                        done.add([run()])
    if done.found:
        print(text(done.found))
    return done.status()
