"""Split-K: several programs share the GEMM_K of one output tile; the last one finishes the tile.

At batch 1 the 3x3 convolutions in layer4 of ResNet-50 have 49 pixels × 512 filters: 16 tiles of
64 × 32 on 132 multiprocessors, while GEMM_K is 4608. With `split` parts, `split` times as many
programs walk it. Each program stores the partial sums of its part, increments its tile's counter
and ends. The last to arrive adds all parts in a fixed order, so that a result has the same bits in
every run, and then runs the epilogue. No program waits for another, so they need not all be
resident at once.

Extra bytes moved: split · |y| sums, into L2 and out of it. Osama et al. 2023, "Stream-K",
arXiv:2301.03598, section 3 (fixed-split).
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..runtime import recording
from ..spec.dtypes import stats_dtype
from .config_select import Configs
from .conv_cost import Gemm, fastest
from .counters import counters
from .last_program import arrives_last

SPLITS = (2, 4, 8)
LEAST_STEPS = 4  # of GEMM_K per part: fewer do not fill the pipeline
WIDEST = 64  # filters of a split tile: a grid that is small with wider tiles has narrower ones


@triton.jit
def share(steps, part, SPLIT: tl.constexpr):
    """Range [begin, end) of the GEMM_K steps of `part`; the SPLIT parts differ by one at most."""
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
    """Store acc as the sums of `part` of the tile; returns whether all other parts are stored."""
    tl.store(sums + _places(acc, tile, part, SPLIT), acc)
    return arrives_last(counters, tile, SPLIT)


@triton.jit
def sum_of_parts(acc, sums, tile, SPLIT: tl.constexpr):
    """The tile's sums over all of GEMM_K, shaped like acc, for the program that `is_last`."""
    # Sums in flight at once: enough to hide the latency of L2, few enough for the registers.
    IN_FLIGHT: tl.constexpr = 16384
    MANY: tl.constexpr = IN_FLIGHT // (acc.shape[0] * acc.shape[1])
    AT_ONCE: tl.constexpr = MANY if MANY < SPLIT else SPLIT
    total = tl.zeros_like(acc)
    for first in tl.range(0, SPLIT, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            total += tl.load(sums + _places(acc, tile, first + i, SPLIT), cache_modifier=".cg")
    return total


def meeting_place(
    x: Tensor, tiles: int, block_m: int, block_n: int, split: int
) -> tuple[Tensor | None, Tensor | None]:
    """sums [tiles, split, block_m, block_n] and counters [tiles] of a launch; None unsplit."""
    if split == 1:
        return None, None
    sums = x.new_empty(tiles, split, block_m, block_n, dtype=stats_dtype(x))
    return sums, recording.step(counters, x, tiles)


@functools.lru_cache(4096)
def with_splits(
    configs: Configs, gemm: Gemm, processors: int, shared: int, splits: tuple[int, ...] = SPLITS
) -> tuple[Configs, int]:
    """`configs` with a split appended, unsplit ones first, and the index of the rule's choice.

    A tile is offered with `split` parts where half as many would leave multiprocessors idle and
    each part has `LEAST_STEPS`. The rule takes the one of least estimated time (`conv_cost`).
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
    return every, fastest(every, gemm, processors, shared)
