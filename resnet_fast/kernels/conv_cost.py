"""Estimated time of a convolution on a GPU: the rule where no tuning table has the shape.

It ranks the tiles of the Triton kernel, cuDNN, and the tiles of the native kernels.

The model is that of `bench.estimate`, with round numbers for what that reads from compiled code:

    time = max(bytes / bandwidth, bytes through L2 / its bandwidth, rounds · one program)
    one program = first load + steps · step + epilogue

A multiprocessor runs `resident` programs at a time. In a program each instruction of a warp waits
for those before it, `PACE` cycles in the mean, so a program alone leaves most of a multiprocessor
idle. Constants are those of a Hopper GPU (bench/estimate.py has their sources). Other GPUs have
other times, but the same order of tiles in most cases. `RESNET_FAST_AUTOTUNE` measures.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .config_select import Config, Configs
from .sizes import cdiv

PACE = 4.4  # cycles per instruction of a warp
CLOCK = 1755.0  # cycles per microsecond
MEMORY, L2 = 4.3e6, 7e6  # bytes per microsecond
RATE = 790e6  # FLOP per microsecond in 16 bits
FIRST_LOAD, LOAD = 1.0, 0.8  # microseconds
MERGE = 1.5  # microseconds: sums to L2, counter, barriers
SMALL, GAP = 2.5, 1.0  # microseconds: a launch that moves little, and between two launches
HOST = 20.0  # microseconds: assumed for the host to start cuDNN's convolution in training
REGISTERS, THREADS = 65536, 2048
FEW = 8  # channels: one 16-byte vector; cuDNN is slow for fewer, as measured for 3


class Gemm(NamedTuple):
    """GEMM_M = pixels, GEMM_N = filters, GEMM_K = taps · channels of a convolution.

    filters and channels are those of one group; size is in bytes per element, rate in FLOP per
    cycle of a multiprocessor. residual: whether the epilogue adds one. source: channels of a
    projection that the kernel adds, or 0.
    dgrad is the GEMM of GEMM_M = pixels of x, GEMM_N = channels of x. stride: the convolution's, so
    that a pixel has only taps/stride² taps. gate: whether the epilogue applies a ReLU's gradient
    and sums the result.
    """

    pixels: int
    filters: int
    taps: int
    channels: int
    groups: int
    size: int
    rate: int
    residual: bool = False
    source: int = 0
    stride: int = 1
    gate: bool = False

    def tiles(self, config: tuple[int, ...]) -> int:
        """Number of output tiles."""
        columns = cdiv(self.filters, config[1]) * self.groups
        return cdiv(self.pixels, config[0]) * columns

    def steps(self, config: tuple[int, ...]) -> int:
        """Steps over GEMM_K; a configuration gives their length in 2-byte elements."""
        own = self.taps * cdiv(self.channels, self._depth(config))
        return cdiv(own, self.stride**2) + self.source_steps(config)

    def source_steps(self, config: tuple[int, ...]) -> int:
        """Those of them that are the projection's."""
        return cdiv(self.source, self._depth(config))

    def _depth(self, config: tuple[int, ...]) -> int:
        return config[2] * 2 // self.size


@functools.lru_cache(1 << 16)
def microseconds(config: Config, gemm: Gemm, processors: int, shared: int) -> float:
    """Estimated time of a launch whose tile is `config`: GEMM_M, GEMM_N, GEMM_K, warps, stages, and
    the number of parts of GEMM_K.
    """
    block_m, block_n, block_k, warps, stages, split = config
    step_bytes = (block_m + block_n) * block_k * 2
    values = block_m * block_n // (32 * warps)  # of the tile, per thread
    steps = cdiv(gemm.steps(config), split)
    programs = gemm.tiles(config) * split
    kept = values * gemm.size // 4 if gemm.source else 0  # the projection, in the dtype of y
    kept += values * gemm.gate  # what is summed
    resident = min(
        REGISTERS // (32 * warps * min(255, values + kept + 48)),
        (shared + 1024) // (min(stages, steps) * step_bytes + 1024),
        THREADS // (32 * warps),
    )
    each = cdiv(programs, processors)

    tensor = 2 * block_m * block_n * (block_k * 2 // gemm.size) / gemm.rate
    own = max(tensor, 117 * PACE)
    step = own if gemm.taps == 1 else 85 * PACE + max(tensor, 65 * PACE)
    share = gemm.source_steps(config) / max(1, gemm.steps(config))
    step = share * own + (1 - share) * step
    beside = gemm.residual or gemm.source > 0 or gemm.gate
    per_value = 32 if gemm.gate else 8 if beside else 3
    instructions = (300 if gemm.taps == 1 else 400) + 60 + values * per_value
    instructions += 200 if gemm.source else 0
    alone = FIRST_LOAD + beside * LOAD + (steps * step + instructions * PACE) / CLOCK
    busy = (steps * max(tensor, 117 * warps / 4) + instructions * warps / 4) / CLOCK

    moved, through = _traffic(config, gemm)
    if split > 1:
        sums = block_m * block_n * max(gemm.size, 4)
        alone += MERGE + 2 * split * sums / (L2 / processors) / 2
        through += 2 * programs * sums
    rounds = max(cdiv(each, max(1, resident)) * alone, each * busy)
    return max(rounds, through / L2, moved / MEMORY)


def _traffic(config: Config, gemm: Gemm) -> tuple[int, int]:
    """Bytes to and from memory, and through L2 without the sums of a split."""
    deep = min(config[2] * 2 // gemm.size, gemm.channels)  # beyond them a tile is not loaded
    loaded = (config[0] + min(config[1], gemm.filters)) * deep * gemm.size
    results = gemm.pixels * gemm.filters * gemm.groups * gemm.size
    results *= 1 + gemm.residual + gemm.gate
    pixels = cdiv(gemm.pixels, gemm.stride**2)
    read = (pixels + gemm.filters * gemm.taps) * gemm.channels * gemm.groups * gemm.size
    read += (gemm.pixels + gemm.filters) * gemm.source * gemm.size
    return read + results, gemm.tiles(config) * gemm.steps(config) * loaded + results


def registers_of(warps: int, at_once: int) -> int:
    """Registers per thread with which a multiprocessor runs `at_once` programs."""
    return min(255, REGISTERS // (32 * warps * at_once) // 8 * 8)


def tiles_of_program(boxes: int, columns: int, programs: int) -> int:
    """Tiles of each of up to `programs` programs, of one column of tiles each."""
    return cdiv(boxes, max(1, programs // columns))


@functools.lru_cache(1 << 16)
def with_moments(config: Config, gemm: Gemm, processors: int) -> float:
    """Estimated time of `conv_moments`, whose tile is GEMM_M, GEMM_N, GEMM_K of `config`, then
    warps, stages, and the programs that a multiprocessor runs at a time.

    A program walks its tiles, whose loads overlap with the tile before: steps · step + epilogue
    each. At its end it exchanges sums.
    """
    block_m, block_n, block_k, warps, _, at_once = config
    values = block_m * block_n // (32 * warps)
    boxes, columns = cdiv(gemm.pixels, block_m), cdiv(gemm.filters, block_n)
    each = tiles_of_program(boxes, columns, processors * at_once)
    steps = gemm.steps(config)
    instructions = 125 if gemm.taps == 1 else 160
    tensor = 2 * block_m * block_n * (block_k * 2 // gemm.size) / gemm.rate
    ends, after = 60 + 7.5 * values, 700 + 20 * values
    alone = each * (steps * max(tensor, instructions * PACE) + ends * PACE) + after * PACE
    busy = each * (steps * max(tensor, instructions * warps / 4) + ends * warps / 4) * at_once
    moved, through = _traffic(config, gemm)
    return max(FIRST_LOAD + max(alone, busy) / CLOCK, through / L2, moved / MEMORY)


def boxes_per_split(boxes: int, programs: int, processors: int) -> int:
    """Boxes of pixels that a program of `conv_wgrad` sums: two programs per multiprocessor run."""
    return cdiv(boxes, max(1, min(boxes, 2 * processors // programs)))


@functools.lru_cache(1 << 16)
def with_fold(config: Config, gemm: Gemm, moved: int, processors: int) -> float:
    """Estimated time of `conv_wgrad` and of the launch that sums its splits.

    Its tile is GEMM_M filters, GEMM_N channels and GEMM_K pixels of `config`, then warps and
    stages. gemm: the forward convolution. moved: bytes of x and dy.
    """
    block_m, block_n, block_k, warps, _ = config
    block_k = block_k * 2 // gemm.size
    programs = cdiv(gemm.filters, block_m) * cdiv(gemm.channels, block_n) * gemm.taps
    boxes = cdiv(gemm.pixels, block_k)
    steps = boxes_per_split(boxes, programs, processors)
    splits = cdiv(boxes, steps)
    each = cdiv(programs * splits, processors)
    tensor = 2 * block_m * block_n * block_k / gemm.rate
    instructions = 122 if gemm.taps == 1 else 178
    alone = steps * max(tensor, instructions * PACE) + 650 * PACE
    busy = steps * max(tensor, instructions * warps / 4) + 650 * warps / 4
    rounds = FIRST_LOAD + max(cdiv(each, 2) * alone, each * busy) / CLOCK
    loaded = min(block_m, gemm.filters) + min(block_n, gemm.channels)
    through = programs * boxes * loaded * block_k * gemm.size
    sums = 4 * splits * gemm.filters * gemm.taps * gemm.channels
    return max(rounds, (through + sums) / L2, moved / MEMORY) + GAP + max(sums / L2, SMALL)


# FLOP per microsecond and bytes per microsecond of cuDNN's convolutions
LIBRARY_RATES = {"fprop": 720e6, "dgrad": 720e6, "strided dgrad": 490e6, "wgrad": 620e6}
LIBRARY_MEMORY = {"fprop": 3.7e6, "dgrad": 3.7e6, "strided dgrad": 3e6, "wgrad": 3.4e6}


def by_library(moved: int, flops: int, columns: int, channels: int, kind: str = "fprop") -> float:
    """Estimated time of cuDNN's convolution in 16 bits, which moves `moved` bytes.

    columns: GEMM_N; for wgrad the smaller of filters and channels. kind: of `LIBRARY_RATES`. The
    rates are what an H200 reached (bench/results/nvidia-h200-layers.jsonl, "torch conv"): with 64
    columns 460 TFLOP/s, for a stem of 3 channels 34 forward and 54 backward. One image took 7 to
    10 us.
    """
    rate = LIBRARY_RATES[kind] if columns > 64 else 460e6
    if channels < FEW:
        rate = 34e6 if kind == "fprop" else 54e6
    return max(moved / LIBRARY_MEMORY[kind], flops / rate, 7.0)


def with_pass(gemm: Gemm, values: int, kind: str = "fprop") -> float:
    """Estimated time of `by_library`, and of a pass that moves `values` values per value of y."""
    pixels, filters = cdiv(gemm.pixels, gemm.stride**2) * gemm.groups, gemm.filters * gemm.groups
    y, x = gemm.pixels * filters * gemm.size, pixels * gemm.channels * gemm.size
    w = filters * gemm.taps * gemm.channels * gemm.size
    flops = 2 * pixels * gemm.filters * gemm.taps * gemm.channels
    more = GAP + max(values * y / MEMORY, SMALL) if values else 0.0
    return by_library(x + w + y, flops, filters, gemm.channels, kind) + more


class NativeTile(NamedTuple):
    """A tile of the native Hopper kernels: pixels, filters, and the instructions of a warp in a
    step of NATIVE_DEPTH channels and after the steps, as `python -m bench cutlass` reads them.
    """

    pixels: int
    filters: int
    step: int
    epilogue: int

    @property
    def together(self) -> bool:
        """Whether both warp groups compute the tile ("cooperative"), not one each ("pingpong")."""
        return self.pixels == 256

    @property
    def clustered(self) -> bool:
        """Whether two multiprocessors read its filters once."""
        return self.together or self.filters == 128


NATIVE_DEPTH = 64
NATIVE_TILES = (  # in the order of csrc/cuda/conv_tiles.h
    NativeTile(256, 128, 88, 1341), NativeTile(256, 64, 85, 723), NativeTile(128, 128, 65, 1317),
    NativeTile(128, 64, 68, 754), NativeTile(64, 64, 44, 533),
)  # fmt: skip


def native_tile(gemm: Gemm, processors: int) -> NativeTile:
    """The tile that the native kernels choose: the largest whose grid fills the GPU."""
    width = max(NATIVE_DEPTH, cdiv(gemm.filters, 64) * 64)
    for tile in NATIVE_TILES[:-1]:
        tiles = cdiv(gemm.pixels, tile.pixels) * cdiv(gemm.filters, tile.filters)
        if tile.filters <= width and tiles >= processors:
            return tile
    return NATIVE_TILES[-1]


def by_native(tile: NativeTile, gemm: Gemm, processors: int) -> float:
    """Estimated time of the native kernel with `tile`, in 16 bits.

    The kernel is persistent: a multiprocessor runs one program, of one warp group that loads and
    two that compute. A tile takes

        main = steps · max(tensor cores, instructions of a step)    epilogue = instructions after
        pingpong     max(main, (main + epilogue) / 2): two tiles at a time, one in each part
        cooperative  main + epilogue

    and the last tile of a multiprocessor main + epilogue in any case.
    """
    tiles = cdiv(gemm.pixels, tile.pixels) * cdiv(gemm.filters, tile.filters)
    tensor = 2 * tile.pixels * tile.filters * NATIVE_DEPTH / 4096
    steps = gemm.taps * cdiv(gemm.channels, NATIVE_DEPTH)
    main = steps * max(tensor, tile.step * PACE)
    alone = main + tile.epilogue * PACE
    each = alone if tile.together else max(main, alone / 2)
    rounds = FIRST_LOAD + ((cdiv(tiles, processors) - 1) * each + alone) / CLOCK
    results = gemm.pixels * gemm.filters * gemm.size * (1 + gemm.residual)
    read = (gemm.pixels + gemm.filters * gemm.taps) * gemm.channels * gemm.size
    columns = tile.filters / (2 if tile.clustered else 1)
    through = tiles * steps * (tile.pixels + columns) * NATIVE_DEPTH * gemm.size + results
    flops = 2 * gemm.pixels * gemm.filters * gemm.taps * gemm.channels
    return max(rounds, through / L2, (read + results) / MEMORY, flops / RATE)


def fastest(configs: Configs, gemm: Gemm, processors: int, shared: int) -> int:
    """Index of the configuration with the least estimated time, the first of equal ones."""
    times = [microseconds(config, gemm, processors, shared) for config in configs]
    return times.index(min(times))
