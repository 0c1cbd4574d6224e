"""Tile operations that kernels share: widening, sums, ReLU and its gradient, bit masks, offsets.

Helpers must not read globals. Otherwise, in Triton up to 3.6, a kernel's cache key depends on
whether the helper had a key before. Another compilation order then misses the cache.
"""

import triton
import triton.language as tl


@triton.jit
def widen(x):
    """x in the accumulation dtype: fp32, or fp64 for double."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def relu(y):
    """y where y > 0 or NaN, else 0."""
    return tl.where(y <= 0, 0.0, y)


@triton.jit
def sum_rows(x):
    """[M, C] → [1, C], in two steps so that no chain of additions is longer than max(M/8, 8)."""
    folded = tl.sum(x.reshape(x.shape[0] // 8, 8, x.shape[1]), 0)
    return tl.sum(folded, 0, keep_dims=True)


@triton.jit
def store_moments(partial, place, places, c, channels, n, pivot, sums, squares):
    """partial[0..3, place, c] = n, mean, rest and m2 of n values v.

    sums = Σ(v − pivot), squares = Σ(v − pivot)². rest is the rounding error of the mean. partial is
    [4, places, channels]; the others are [1, C].
    """
    off = sums / n
    m2 = squares - n * off * off
    mean = pivot + off
    is_channel = c < channels
    at = partial + (tl.full((), 0, tl.int64) + place) * channels + c
    plane = (tl.full((), 0, tl.int64) + places) * channels
    tl.store(at, n, is_channel)
    tl.store(at + plane, mean, is_channel)
    tl.store(at + 2 * plane, (pivot - mean) + off, is_channel)
    tl.store(at + 3 * plane, tl.where(m2 < 0, 0.0, m2), is_channel)


@triton.jit
def pack_bits(on):
    """Booleans [R, I] → uint8 [R, I / 8]: element i is bit i % 8 of byte i // 8."""
    bits = on.to(tl.int32).reshape(on.shape[0], on.shape[1] // 8, 8)
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(mask):
    """uint8 [R, B] → booleans [R, 8·B], the inverse of `pack_bits`."""
    bits = (mask.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return bits.reshape(mask.shape[0], mask.shape[1] * 8) != 0


@triton.jit
def element_offsets(m0, lane, c, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of (pixel m0 + lane of all images, channel c): int64, [M, 1] and [1, C] → [M, C].

    One 64-bit scalar carries the size; within a tile 32 bits suffice.
    """
    if CHANNELS_LAST:
        return m0 * channels + (lane * channels + c)
    else:
        n, p = m0 // pixels, (m0 % pixels).to(tl.int32) + lane
        return n * channels * pixels + ((p // pixels * channels + c) * pixels + p % pixels)


@triton.jit
def coefficients_at(row0, r, i, rows, inner, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """Offsets of coefficients at rows row0 + r and elements i, and which exist.

    Vectors [C] in NHWC, [1, I]; in NCHW, row modulo `channels`, [R, 1]. Matrices [N,C]: in NCHW
    `channels` is N·C; in NHWC `pixels` is H·W, otherwise None, and the offsets are [R, I].
    """
    if CHANNELS_LAST:
        if pixels is not None:
            image = row0 // pixels + ((row0 % pixels).to(tl.int32) + r) // pixels
            exists = (row0 + r < rows)[:, None] & (i < inner)[None, :]
            return image[:, None] * channels + i[None, :], exists
        else:
            return i[None, :], (i < inner)[None, :]
    else:
        return ((row0 + r) % channels)[:, None], (row0 + r < rows)[:, None]


@triton.jit
def mask_bits(
    mask, m0, lane, c0, count, channels, pixels, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """Bits of a ReLU mask at pixels m0 + lane [M, 1], channels from c0: booleans [M, BLOCK_C].

    In NHWC the tile's bytes are loaded once and unpacked; in NCHW a lane reads its pixel's byte.
    """
    if CHANNELS_LAST:
        width = tl.cdiv(channels, 8)
        byte = c0 // 8 + tl.arange(0, BLOCK_C // 8)[None, :]
        inside = (m0 + lane < count) & (byte < width)
        return unpack_bits(tl.load(mask + (m0 * width + (lane * width + byte)), inside, 0))
    else:
        c = c0 + tl.arange(0, BLOCK_C)[None, :]
        width = tl.cdiv(pixels, 8)
        n, p = m0 // pixels, (m0 % pixels).to(tl.int32) + lane
        at = (p // pixels * channels + c) * width + p % pixels // 8
        inside = (m0 + lane < count) & (c < channels)
        bits = tl.load(mask + (n * channels * width + at), inside, 0).to(tl.int32)
        return (bits >> (p % pixels % 8)) & 1 != 0


@triton.jit
def row_bits(mask, row, inside, first, inner, WIDTH: tl.constexpr):
    """Bits of a ReLU mask at rows [M, 1] (int64), elements from `first`: booleans [M, WIDTH]."""
    width = tl.cdiv(inner, 8)
    byte = first // 8 + tl.arange(0, WIDTH // 8)[None, :]
    return unpack_bits(tl.load(mask + (row * width + byte), inside & (byte < width), 0))


@triton.jit
def relu_gate(g, x, scale, shift, c, is_channel):
    """g where scale·x + shift > 0 (or NaN), else 0: ReLU's gradient, its input recomputed."""
    a = tl.load(scale + c, is_channel, 0.0)
    return tl.where(tl.fma(x, a, tl.load(shift + c, is_channel, 0.0)) <= 0, 0.0, g)
