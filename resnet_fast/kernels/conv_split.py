"""Split-K: the programs of one output tile share GEMM_K, the last to arrive finishes the tile.

One image leaves layer4 of ResNet-50 with 49 pixels × 512 filters, 16 tiles of 64 × 32 on 132
multiprocessors, while GEMM_K is 4608 long. In `split` parts it is walked by `split` times as many
programs. Each stores the sums of its part, counts itself at its tile's counter and ends; the one
that finds all others there adds the sums in the order of the parts, whichever is its own, so that
a result has the same bits every time, and does what an unsplit program would do from there on.
Nobody waits, so none must be resident for another to end.

Bytes moved besides: split · |y| sums, into L2 and out of it. Osama et al. 2023, "Stream-K",
arXiv:2301.03598, section 3 (fixed-split).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..runtime import recording
from ..spec.dtypes import stats_dtype
from .conv_plan import Configs
from .counters import counters
from .sizes import cdiv

SPLITS = (2, 4, 8)
LEAST_STEPS = 4  # of GEMM_K that a part has: fewer do not fill the pipeline
WIDEST = 64  # filters of a tile that is split: a grid of wider ones that is small has narrower ones

# What the rule estimates by. Bytes a microsecond: what one multiprocessor takes from L2 (64 a
# clock), what memory gives. Microseconds: sums, counter and sums again on their way through L2.
PROCESSOR_BANDWIDTH, MEMORY_BANDWIDTH = 1.1e5, 4.3e6
MEETING = 2.0
WORTH = 1.25  # times as fast as unsplit by the estimate: less is not taken unmeasured


@triton.jit
def share(steps, part, SPLIT: tl.constexpr):
    """First and last + 1 of the steps of GEMM_K that `part` of SPLIT has: they differ by one."""
    if SPLIT == 1:
        return 0, steps
    else:
        return part * steps // SPLIT, (part + 1) * steps // SPLIT


@triton.jit
def _places(acc, tile, part, SPLIT: tl.constexpr):
    """Offsets of a tile [M, N] in sums [tiles, SPLIT, M, N]."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    first = (tile.to(tl.int64) * SPLIT + part) * (M * N)
    return first + (tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])


@triton.jit
def is_last(acc, sums, counters, tile, part, SPLIT: tl.constexpr):
    """Store acc as the tile's sums of `part`; whether those of all other parts are there now.

    One thread counts for all. The barrier puts the stores of the others before its release; a
    second one, by which Triton hands them the count, puts their loads after its acquire.
    """
    tl.store(sums + _places(acc, tile, part, SPLIT), acc)
    tl.debug_barrier()
    return tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@triton.jit
def sum_of_parts(acc, sums, counters, tile, SPLIT: tl.constexpr):
    """The tile's sums over all of GEMM_K, in the form of acc; its counter is zero again.

    From L2 (.cg), which all multiprocessors share: L1 may hold what was there before.
    """
    # Sums on their way at once: enough to hide L2, and they fit the program's registers.
    IN_FLIGHT: tl.constexpr = 16384
    MANY: tl.constexpr = IN_FLIGHT // (acc.shape[0] * acc.shape[1])
    AT_ONCE: tl.constexpr = MANY if MANY < SPLIT else SPLIT
    total = tl.zeros_like(acc)
    for first in tl.range(0, SPLIT, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(sums + _places(acc, tile, first + i, SPLIT), cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return total


def meeting_place(
    x: Tensor, tiles: int, block_m: int, block_n: int, split: int
) -> tuple[Tensor | None, Tensor | None]:
    """sums [tiles, split, block_m, block_n] and counters [tiles] of a launch; None unsplit."""
    if split == 1:
        return None, None
    sums = x.new_empty(tiles, split, block_m, block_n, dtype=stats_dtype(x))
    return sums, recording.step(counters, x, tiles)


class Gemm(NamedTuple):
    """A convolution as a split sees it; filters and channels of a group, `size` bytes an element.

    GEMM_M = pixels, GEMM_N = filters, GEMM_K = taps · channels.
    """

    pixels: int
    filters: int
    taps: int
    channels: int
    groups: int
    size: int

    def tiles(self, config: tuple[int, ...]) -> int:
        """Of the output."""
        columns = cdiv(self.filters, config[1]) * self.groups
        return cdiv(self.pixels, config[0]) * columns

    def steps(self, config: tuple[int, ...]) -> int:
        """Of GEMM_K, of which a configuration has its length in 2-byte elements."""
        return self.taps * cdiv(self.channels, config[2] * 2 // self.size)


@functools.lru_cache(4096)
def with_splits(
    configs: Configs, rule: int, gemm: Gemm, processors: int, splits: tuple[int, ...] = SPLITS
) -> tuple[Configs, int]:
    """`configs` with a split as their last number, 1 first, and which of them the rule takes.

    configs[rule] is the tile that it takes unsplit. A tile is offered in parts where half as many
    would leave multiprocessors idle and each has `LEAST_STEPS`. The rule takes those of a grid that
    leaves half the GPU idle, if it estimates them to be faster by `WORTH`. On an H200 these are
    the 3x3 convolutions of ResNet-50's layer4 at batch 1 (8 parts) and 2 (4 parts): 4.2 µs each in
    place of 8.0, by an estimate that no GPU has confirmed; `RESNET_FAST_AUTOTUNE` measures all.
    """

    def offered(tile: tuple[int, ...], split: int) -> bool:
        idle = gemm.tiles(tile) * split < 2 * processors
        return idle and tile[1] <= WIDEST and gemm.steps(tile) >= LEAST_STEPS * split

    every = tuple(
        (*tile, split)
        for split in (1, *splits)
        for tile in configs
        if split == 1 or offered(tile, split)
    )
    if 2 * gemm.tiles(configs[rule]) >= processors:
        return every, rule
    times = {
        config: microseconds(config, gemm, processors)
        for config in every
        if config[:-1] == configs[rule]
    }
    best = min(times, key=times.__getitem__)
    worth = WORTH * times[best] <= times[every[rule]]
    return every, every.index(best) if worth else rule


def microseconds(config: tuple[int, ...], gemm: Gemm, processors: int) -> float:
    """An estimate: waves · steps / split · bytes of a step, and what the meeting costs.

    A program takes its tiles of both operands through L2, all of them together at least the filters
    from memory. In parts all sums are stored and loaded besides, and the last program of a tile
    takes `split` tiles of them through one multiprocessor.
    """
    block_m, block_n, block_k, *_, split = config
    tiles = gemm.tiles(config)
    steps = cdiv(tiles * split, processors) * cdiv(gemm.steps(config), split)
    filters = gemm.filters * gemm.groups * gemm.taps * gemm.channels * gemm.size
    time = steps * (block_m + block_n) * block_k * 2 / PROCESSOR_BANDWIDTH
    time = max(time, filters / MEMORY_BANDWIDTH)
    if split == 1:
        return time
    sums = split * block_m * block_n * max(gemm.size, 4)
    return time + MEETING + sums / PROCESSOR_BANDWIDTH + 2 * tiles * sums / MEMORY_BANDWIDTH
