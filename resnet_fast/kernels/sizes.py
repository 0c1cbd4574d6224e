"""Sizes of grids and blocks on the host, where Triton's functions of these names take long."""

from __future__ import annotations


def cdiv(size: int, part: int) -> int:
    """⌈size / part⌉."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is no less than `size`, 1 at least."""
    return 1 << max(size - 1, 0).bit_length()
