"""Counters at which programs of a launch meet: zero before it, and left at zero by the kernel.

Nothing has to zero them between launches, so an op that needs some is still one launch. Launches of
a stream come one after another and share theirs. A launch that is being captured gets counters
of its own for good: its graph may be replayed at any time, on any stream, beside any other launch.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

SIZE = 1 << 18  # int32, a mebibyte a device: 3000 captured launches of 64 tiles, and more streams
LINE = 32  # a cache line of them: what is given out starts on one
OF_A_STREAM = 256

_lock = threading.Lock()
_free: dict[torch.device, Tensor] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}


def counters(x: Tensor, count: int) -> Tensor:
    """`count` or more int32 on x's device, zero when a launch on its current stream begins.

    The kernel must leave them at zero. In a capture that nothing preceded on the device, or that
    finds no free ones, the captured work zeroes them itself: one launch more in every replay.
    """
    if x.device.type == "meta":
        return x.new_empty(count, dtype=torch.int32)
    stream = 0
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            if torch.cuda.is_current_stream_capturing():
                own = _take(x.device, count, refill=False)
                return x.new_zeros(count, dtype=torch.int32) if own is None else own
            stream = torch.cuda.current_stream().cuda_stream
    kept = _of_stream.get((x.device, stream))
    if kept is None or kept.numel() < count:
        kept = _take(x.device, max(count, OF_A_STREAM), refill=True)
        _of_stream[x.device, stream] = kept
    return kept


def _take(device: torch.device, count: int, refill: bool) -> Tensor | None:
    """Counters that are nobody else's from now on; None where there are none and no `refill`."""
    count = -(-count // LINE) * LINE
    with _lock:
        free = _free.get(device)
        if free is None or free.numel() < count:
            if not refill:
                return None
            free = _zeros(device, max(count, SIZE))
        _free[device] = free[count:]
        return free[:count]


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros that every stream sees, in memory that belongs to no CUDA graph.

    Made in a thread of their own: the pool of a graph that is being warmed up takes all that its
    thread allocates, and with the graph it would take these.
    """

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
