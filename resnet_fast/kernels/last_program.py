"""Reductions that end in the launch that began them: the last program to arrive merges.

Each program stores its partial result, increments a counter of `counters` and ends. The last of
them merges what all have stored, in a fixed order, so that a result has the same bits in every run.
No program waits for another. That saves a launch, and merges with one program instead of many, so
it is for partial results of few places: at most as many as programs run at a time.
"""

import triton
import triton.language as tl

from .bn_finalize import store_finalized
from .tile_math import sum_rows


@triton.jit
def arrives_last(counters, place, programs):
    """Whether this program is the last of `programs` at counters[place]; the last one resets it.

    What the others stored before is then visible by loads from L2 (.cg), which all multiprocessors
    share: L1 may hold stale values. One thread increments the counter for its program. The barrier
    orders the stores of the other threads before the release. Triton broadcasts the count with a
    second barrier, which orders their loads after the acquire.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == programs - 1
    tl.store(counters + place, 0, last)
    return last


@triton.jit
def merge_moments(
    partial, places, c0, channels, values, AT_ONCE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and m2 [1, C] of `values` values, from partial [4, places, channels] of `store_moments`.

    With p the mean of the means of the first BLOCK_S places, d = (mean_s − p) + rest_s, D = Σ n·d
    and Q = Σ (m2_s + n·d²): mean = p + D/values, m2 = Q − D²/values. One pass, because a single
    program waits for each load, with AT_ONCE · BLOCK_S places in flight. The first places have n₀
    of the values, equal parts, so the subtraction multiplies the relative error of Q by
    1 + values/n₀ at most, as in `conv_moments_kernel`.
    """
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    is_channel = c < channels
    wide: tl.constexpr = partial.dtype.element_ty
    plane = (tl.full((), 0, tl.int64) + places) * channels
    means, rests, spreads = partial + plane, partial + 2 * plane, partial + 3 * plane
    s = tl.arange(0, BLOCK_S)[:, None]
    inside = (s < places) & is_channel
    first = tl.load(means + (s * channels + c), inside, 0.0, cache_modifier=".cg")
    pivot = sum_rows(first) / tl.minimum(places, BLOCK_S)
    drift = tl.zeros((BLOCK_S, BLOCK_C), wide)
    squares = tl.zeros((BLOCK_S, BLOCK_C), wide)
    for s0 in range(0, places, AT_ONCE * BLOCK_S):
        n, mean, rest, m2 = (), (), (), ()
        for i in tl.static_range(AT_ONCE):
            s = s0 + i * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
            inside, at = (s < places) & is_channel, s * channels + c
            n += (tl.load(partial + s * channels + c0, s < places, 0.0, cache_modifier=".cg"),)
            mean += (tl.load(means + at, inside, 0.0, cache_modifier=".cg"),)
            rest += (tl.load(rests + at, inside, 0.0, cache_modifier=".cg"),)
            m2 += (tl.load(spreads + at, inside, 0.0, cache_modifier=".cg"),)
        for i in tl.static_range(AT_ONCE):
            d = mean[i] - pivot + rest[i]
            drift += n[i] * d
            squares += m2[i] + n[i] * d * d
    off = sum_rows(drift) / values
    m2 = sum_rows(squares - drift * off)
    return pivot + off, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def finish_moments(
    partial, places, out_mean, out_m2, scale, shift, rstd, weight, bias, c0, channels, values,
    EPS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store mean and m2 of `merge_moments`, and with scale what `store_finalized` makes of them."""
    mean, m2 = merge_moments(partial, places, c0, channels, values, AT_ONCE, BLOCK_S, BLOCK_C)
    c = c0 + tl.arange(0, BLOCK_C)[None, :]
    is_channel = c < channels
    tl.store(out_mean + c, mean, is_channel)
    tl.store(out_m2 + c, m2, is_channel)
    if scale is not None:
        store_finalized(
            scale, shift, rstd, mean, m2, weight, bias, c, is_channel, values, EPS
        )  # fmt: skip
