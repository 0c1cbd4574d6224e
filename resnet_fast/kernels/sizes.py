"""Grid and block sizes on the host, where Triton's functions of the same names are slow."""

from __future__ import annotations


def cdiv(size: int, part: int) -> int:
    """⌈size / part⌉."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size` and at least 1."""
    return 1 << max(size - 1, 0).bit_length()
