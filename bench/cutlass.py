"""`python -m bench cutlass`: estimated time of a model's convolutions by the native Hopper kernels.

An estimate, not a measurement. nvcc compiles csrc/cuda/conv_sm90_bf16.cu without a GPU, and
`bench.sass` reads the code of each tile. `kernels.conv_cost.by_native` estimates a launch from it,
for an H200, and has the numbers of the tiles; the command fails if the compiled code differs. The
other columns are the estimates of Triton's tile by rule, and of cuDNN with a pass over its output.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench import cuda, sass
from bench.compile import MULTIPROCESSORS, hopper
from bench.layers import Layer, layers_of
from bench.machine_code import tool
from bench.models import model_names
from resnet_fast.runtime.options import names, positive

if TYPE_CHECKING:
    from resnet_fast.kernels.conv_cost import NativeTile

SOURCE = cuda.ROOT / "csrc" / "cuda" / "conv_sm90_bf16.cu"


def tile_of(name: str, disassembly: str) -> NativeTile:
    """The tile of a kernel from its name and the output of `nvdisasm`.

    A step has 4 products per 64 pixels of a warp group. The compiler peels one step off the loop.
    """
    from resnet_fast.kernels.conv_cost import NativeTile

    loops = sass.tensor_loops(disassembly)
    if not loops:
        raise ValueError(f"{name[:60]}: expected a loop of wgmma products, found none")
    step, products, filters = min(loops)
    most = max(count for _, count, _ in loops)
    whole = min(size for size, count, _ in loops if count == most)
    pixels = 16 * products * (2 if "Cooperative" in name else 1)
    return NativeTile(pixels, filters, step, max(0, whole - 2 * step))


def times(layer: Layer, batch: int, tiles: Sequence[NativeTile]) -> tuple[NativeTile, list[float]]:
    """The native tile by its rule, and the estimated times of it, of Triton's tile by rule, and of
    cuDNN with a pass.
    """
    from resnet_fast.kernels import conv_cost, conv_plan, launch

    x_shape, _ = layer.shapes(batch)
    x, w = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for shape in (x_shape, layer.weight_shape)
    )
    fusion = conv_plan.Fusion(residual=x if layer.residual else None)
    gemm = conv_plan.gemm_of(x, w, layer.conv, fusion)
    ruled = conv_cost.native_tile(gemm, MULTIPROCESSORS)[:2]
    tile = next(tile for tile in tiles if tile[:2] == ruled)
    with launch.compile_for(hopper(), lambda *_: None):
        triton = conv_plan.fused_us(x, w, layer.conv, fusion)
    native = conv_cost.by_native(tile, gemm, MULTIPROCESSORS)
    library = conv_cost.with_pass(gemm, 2 + gemm.residual)
    return tile, [time + conv_cost.GAP for time in (native, triton, library)]


def compiled() -> list[NativeTile]:
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


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 if the kernels do not compile or are not those that `conv_cost` has, 2
    without nvcc or CUTLASS.
    """
    from resnet_fast.kernels.conv_cost import NATIVE_TILES

    missing = "nvcc is not on PATH" if shutil.which("nvcc") is None else cuda.sources()[1]
    if missing:
        print(f"cutlass: {missing}", file=sys.stderr)
        return 2
    try:
        tiles = compiled()
    except (RuntimeError, ValueError) as error:
        print(f"cutlass: {error}", file=sys.stderr)
        return 1
    known = {tile[:2]: tile for tile in NATIVE_TILES}
    if len(tiles) != len(known) or not all(_near(tile, known.get(tile[:2])) for tile in tiles):
        print(f"cutlass: conv_cost.NATIVE_TILES has other numbers, compiled: {tiles}",
              file=sys.stderr)  # fmt: skip
        return 1
    for tile in tiles:
        shape = f"{tile.pixels}x{tile.filters}"
        print(f"{shape}: {tile.step} instructions a step, {tile.epilogue} after")
    for model in args.model:
        print(table(model, args.batch, tiles))
    return 0


def _near(tile: NativeTile, known: NativeTile | None) -> bool:
    """Whether both have the same numbers of instructions, within 5%."""
    return known is not None and all(
        abs(a - b) <= 0.05 * b for a, b in zip(tile, known, strict=True)
    )


def table(model: str, batch: int, tiles: Sequence[NativeTile]) -> str:
    """One line per convolution of 8 or more channels, and the sums."""
    lines = [
        f"{model} infer bf16 batch {batch} on h200, ESTIMATE in us",
        f"{'layer':28} {'n':>2} {'native':>8} {'tile':>8} {'Triton':>8} {'cuDNN':>8}",
    ]
    sums = [0.0, 0.0, 0.0]
    for layer, count in layers_of(model).items():
        if layer.channels < 8:
            continue
        tile, us = times(layer, batch, tiles)
        sums = [total + count * time for total, time in zip(sums, us, strict=True)]
        shape = f"{tile.pixels}x{tile.filters}"
        lines.append(
            f"{layer!s:28} {count:2d} {us[0]:8.1f} {shape:>8} {us[1]:8.1f} {us[2]:8.1f}"
        )
    lines.append(f"{'all':31} {sums[0]:8.1f} {'':8} {sums[1]:8.1f} {sums[2]:8.1f}")
    return "\n".join(lines)
