"""`python -m bench cutlass`: estimated time of a model's convolutions by the native Hopper kernels.

An estimate, not a measurement. nvcc compiles csrc/cuda/conv_sm90_bf16.cu without a GPU, and
`bench.sass` reads the code of each tile. The kernels are persistent: a multiprocessor runs one
program, of one warp group that loads and two that compute. With the constants of `bench.estimate`,
a tile takes

    main = steps · max(tensor cores, instructions of a step)    epilogue = instructions after them
    pingpong     max(main, (main + epilogue) / 2): two tiles at a time, one in each part
    cooperative  main + epilogue: both warp groups compute the tile of 256 pixels

and a launch max(bytes / bandwidth, bytes through L2 / its bandwidth, FLOP / rate, first load +
tiles of a multiprocessor · time of a tile) + gap. A cluster of two multiprocessors reads filters
once.
The other columns are the estimates of `kernels.conv_cost`: Triton's tile by rule, and cuDNN with a
pass over its output.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import cuda, sass
from bench.estimate import GPUS, Gpu, cdiv
from bench.layers import Layer, layers_of
from bench.machine_code import tool
from bench.models import model_names
from resnet_fast.runtime.options import names, positive

SOURCE = cuda.ROOT / "csrc" / "cuda" / "conv_sm90_bf16.cu"
DEPTH = 64  # channels of a step
COOPERATIVE = 256  # pixels of a tile that both warp groups compute together
CLUSTERED = 128  # filters of a tile; these and cooperative ones form clusters


class Tile(NamedTuple):
    """A compiled tile: pixels, filters, and instructions of a warp per step and after the steps."""

    pixels: int
    filters: int
    step: int
    epilogue: int


def tile_of(name: str, disassembly: str) -> Tile:
    """The tile of a kernel from its name and the output of `nvdisasm`.

    A step has 4 products per 64 pixels of a warp group. The compiler peels one step off the loop.
    """
    loops = sass.tensor_loops(disassembly)
    if not loops:
        raise ValueError(f"{name[:60]}: expected a loop of wgmma products, found none")
    step, products, filters = min(loops)
    most = max(count for _, count, _ in loops)
    whole = min(size for size, count, _ in loops if count == most)
    pixels = 16 * products * (2 if "Cooperative" in name else 1)
    return Tile(pixels, filters, step, max(0, whole - 2 * step))


def microseconds(tile: Tile, layer: Layer, batch: int, gpu: Gpu) -> float:
    """Estimated time of a launch in 16 bits."""
    (n, c, h, w), (_, k, p, q) = layer.shapes(batch)
    taps = layer.kernel[0] * layer.kernel[1]
    pixels, steps = n * p * q, taps * cdiv(c, DEPTH)
    tiles = cdiv(pixels, tile.pixels) * cdiv(k, tile.filters)
    tensor = 2 * tile.pixels * tile.filters * DEPTH / 4096
    main = steps * max(tensor, tile.step * gpu.warp_cycles)
    epilogue = tile.epilogue * gpu.warp_cycles
    together = tile.pixels == COOPERATIVE
    each = main + epilogue if together else max(main, (main + epilogue) / 2)
    rounds = gpu.first_load_us + cdiv(tiles, gpu.multiprocessors) * each / gpu.clock * 1e6
    y = 2 * pixels * k * (1 + layer.residual)
    x = 2 * n * c * h * w
    if taps == 1 and layer.conv.stride == (2, 2):
        x //= 4  # it reads one pixel of four
    sharing = 2 if together or tile.filters == CLUSTERED else 1
    through = tiles * steps * (tile.pixels + tile.filters / sharing) * DEPTH * 2 + y
    floor = gpu.floor_us(x + y + 2 * k * taps * c, 2 * pixels * k * taps * c)
    return max(rounds, 1e6 * through / gpu.l2_bytes_per_s, floor) + gpu.gap_us


def others(layer: Layer, batch: int, gpu: Gpu) -> tuple[float, float]:
    """Estimated times of Triton's tile by rule, and of cuDNN with a pass."""
    from resnet_fast.kernels import conv_cost, conv_plan, conv_split
    from resnet_fast.kernels.launch import SHARED_KIB

    x_shape, (n, _, p, q) = layer.shapes(batch)
    x, w = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (x_shape, layer.weight_shape)
    )
    fusion = conv_plan.Fusion(residual=x if layer.residual else None)
    gemm = conv_plan.gemm_of(x, w, layer.conv, fusion, n * p * q)
    size = gpu.multiprocessors, SHARED_KIB[90] << 10
    configs = conv_plan.forward_configs(fusion, layer.filters, size[1])
    configs, rule = conv_split.with_splits(configs, gemm, *size)
    triton = conv_cost.microseconds(configs[rule], gemm, *size) + gpu.gap_us
    return triton, conv_cost.with_pass(gemm) + gpu.gap_us


def compiled() -> list[Tile]:
    """The tiles of SOURCE, compiled for sm_90a. Raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "code.cubin"
        if said := cuda.compile_cubin(SOURCE, "sm_90a", cuda.flags(), cubin):
            raise RuntimeError(f"{SOURCE.name}: {said}")
        code = tool("nvdisasm", cubin)
    parts = re.split(r"\n\s*\.section\s+\.text\.", code)[1:]
    return [tile_of(part.split(",", 1)[0], part) for part in parts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench cutlass`."""
    add = parser.add_argument
    add("--model", type=names(model_names), default=["resnet50"], metavar="NAME,…",
        help="models (default: resnet50)")  # fmt: skip
    add("--batch", type=positive(int), default=256, metavar="N", help="images (default: 256)")
    add("--gpu", choices=list(GPUS), default="h200", help="default: h200")


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 if the kernels do not compile, 2 without nvcc or CUTLASS."""
    missing = "nvcc is not on PATH" if shutil.which("nvcc") is None else cuda.sources()[1]
    if missing:
        print(f"cutlass: {missing}", file=sys.stderr)
        return 2
    gpu = GPUS[args.gpu]
    try:
        tiles = compiled()
    except (RuntimeError, ValueError) as error:
        print(f"cutlass: {error}", file=sys.stderr)
        return 1
    for tile in tiles:
        shape = f"{tile.pixels}x{tile.filters}"
        print(f"{shape}: {tile.step} instructions a step, {tile.epilogue} after")
    for model in args.model:
        print(table(model, args.batch, tiles, gpu))
    return 0


def table(model: str, batch: int, tiles: Sequence[Tile], gpu: Gpu) -> str:
    """One line per convolution of 8 or more channels, and the sums."""
    lines = [
        f"{model} infer bf16 batch {batch} on {gpu.name}, ESTIMATE in us",
        f"{'layer':28} {'n':>2} {'native':>8} {'tile':>8} {'Triton':>8} {'cuDNN':>8}",
    ]
    sums = [0.0, 0.0, 0.0]
    for layer, count in layers_of(model).items():
        if layer.channels < 8:
            continue
        native, tile = min((microseconds(tile, layer, batch, gpu), tile) for tile in tiles)
        times = native, *others(layer, batch, gpu)
        sums = [total + count * time for total, time in zip(sums, times, strict=True)]
        shape = f"{tile.pixels}x{tile.filters}"
        lines.append(
            f"{layer!s:28} {count:2d} {times[0]:8.1f} {shape:>8} {times[1]:8.1f} {times[2]:8.1f}"
        )
    lines.append(f"{'all':31} {sums[0]:8.1f} {'':8} {sums[1]:8.1f} {sums[2]:8.1f}")
    return "\n".join(lines)
