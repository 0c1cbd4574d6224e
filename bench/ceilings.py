"""`python -m bench ceilings`: measured limits of the machine, by a copy and a matmul.

Other benchmarks report shares of these limits: bytes over the copy's bytes/s, operations over the
matmul's operations/s. The copy reads and writes 1 GiB each (256 MiB on a CPU); the matmul is of two
square matrices. On CUDA it also times a small launch in a CUDA graph, the least time of a kernel.
On a CPU that has convolution tiles, the tiles' products from registers take the matmul's place: a
matmul in PyTorch reaches less than the convolutions on some.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import rows, timing
from resnet_fast.dispatch import backends
from resnet_fast.runtime import graph_timing
from resnet_fast.runtime.options import DEVICES
from resnet_fast.spec.dtypes import PRECISIONS


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of a device: bytes/s of a copy (read plus written), operations/s of a matmul.

    dtype: of the matmul. launch_us: time of a minimal launch in a CUDA graph; None if not measured.
    tiles: the operations are those of resnet_fast's tiles, from registers, not of a matmul.
    """

    bytes_per_s: float
    flops_per_s: float
    dtype: str
    launch_us: float | None = None
    tiles: bool = False

    def floor_ms(self, moved: float, flops: float) -> float:
        """Minimum time of a launch that moves `moved` bytes and does `flops` operations."""
        return 1e3 * max(moved / self.bytes_per_s, flops / self.flops_per_s)


def measure(device: torch.device, dtype: str) -> Ceilings:
    """Best of a few copies and products on `device`."""
    cuda = device.type == "cuda"
    size = 2**30 if cuda else 2**28
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_ms = best_ms(lambda: target.copy_(source), device)
    spin = None if cuda else tiles(dtype)
    if spin is not None:
        flops, ms = spin(), best_ms(spin, device)
    else:
        side = 8192 if cuda else 1024
        a, b = (torch.randn(side, side, device=device).to(PRECISIONS[dtype]) for _ in range(2))
        flops, ms = 2 * side**3, best_ms(lambda: a @ b, device)
    launch_us = small_launch_us(device) if cuda else None
    return Ceilings(2e3 * size / copy_ms, 1e3 * flops / ms, dtype, launch_us, spin is not None)


def tiles(dtype: str, steps: int = 2**20) -> Callable[[], int] | None:
    """`steps` products of the CPU's convolution tiles on every thread: returns the operations.

    None if the CPU has no tiles for `dtype`.
    """
    native, _ = backends.native_module()
    if native is None or dtype not in ("fp32", "bf16") or not native.spin(dtype == "bf16", 1):
        return None
    return lambda: native.spin(dtype == "bf16", steps)


def small_launch_us(device: torch.device, launches: int = 1000, samples: int = 20) -> float:
    """Median microseconds per launch in a graph of `launches` additions to one element."""
    one = torch.zeros(1, device=device)
    one.add_(1)
    graph = graph_timing.captured(lambda: one.add_(1), launches)
    times = [graph_timing.elapsed_ms(graph.replay) for _ in range(samples)]
    return 1e3 * statistics.median(times) / launches


def best_ms(run, device: torch.device, samples: int = 10) -> float:
    """The fastest of `samples` samples: noise only slows a measurement of a limit."""
    return min(sample_ms(run, device, samples))


def median_ms(run, device: torch.device, samples: int = 11) -> float:
    """The median of `samples` samples, with a cold L2 cache on CUDA (`graph_timing.cold_ms`)."""
    return statistics.median(sample_ms(run, device, samples, cold=True))


def sample_ms(run, device: torch.device, samples: int, cold: bool = False) -> list[float]:
    """Milliseconds of `run`, `samples` times, each over enough repeats to exceed the noise.

    On CUDA the repeats are one graph between two events, to time the GPU alone: Python takes longer
    to launch than most layers take to run. cold: on CUDA, flush L2 before each repeat.
    """
    sync = timing.synchronizer(device)
    fastest = timing.warm_up(lambda i: run(), sync)
    if cold and device.type == "cuda":
        return graph_timing.cold_ms(run, samples)
    repeats = timing.repeats_for(fastest)
    if device.type != "cuda":
        repeats = min(repeats, 20)
        times = timing.interleave({"": lambda i: run()}, rounds=samples, repeats=repeats)
        return times[""]
    graph = graph_timing.captured(run, repeats)
    return [graph_timing.elapsed_ms(graph.replay) / repeats for _ in range(samples)]


def row(facts: rows.Row, found: Ceilings) -> rows.Row:
    """The row of a measurement."""
    return rows.layer_row(
        facts, benchmark="ceilings", dtype=found.dtype,
        provider="resnet_fast" if found.tiles else "torch",
        gb_per_s=found.bytes_per_s / 1e9, tflop_per_s=found.flops_per_s / 1e12,
        launch_us=found.launch_us,
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench ceilings`."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16",
                        help="of the matmul (default: bf16)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the row to a file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 2 if the device is not available."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: expected cpu: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    found = measure(device, args.dtype)
    print(
        f"{rows.device_name(device)}: copy {found.bytes_per_s / 1e9:.0f} GB/s, "
        f"{args.dtype} {'tiles' if found.tiles else 'matmul'} "
        f"{found.flops_per_s / 1e12:.3g} TFLOP/s"
        + ("" if found.launch_us is None else f", {found.launch_us:.2f} us per small launch")
    )
    if args.out is not None:
        rows.append(args.out, [row(rows.facts(device), found)])
    return 0
