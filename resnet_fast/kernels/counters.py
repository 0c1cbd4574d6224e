"""Counters at which programs of a launch meet: zero before it, and left at zero by the kernel.

Nothing has to zero them between launches, so an op that needs some is still one launch. Launches of
a stream come one after another and share a set. So do the launches that one capture makes on one
stream: they stay in order in every replay. No other launch shares a captured set, as its graph may
be replayed at any time, on any stream. The set comes back when the graph can run no more.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import captures

SIZE = 1 << 18  # int32, a mebibyte a device: 1000 graphs and streams at a time
LINE = 32  # a cache line of them: what is given out starts on one
OF_A_STREAM = 256


@dataclass
class Captured:
    """The sets of one capture, and the semaphore that tells its graph's end; None: it is unknown.

    A stream that asked for more counters than it had has an older set too.
    """

    ended: int | None
    of_stream: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict)
    taken: list[tuple[torch.device, Tensor]] = field(default_factory=list)


_lock = threading.Lock()
_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[int, Captured] = {}  # by the id of the capture


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
            stream = torch.cuda.current_stream().cuda_stream
            if torch.cuda.is_current_stream_capturing():
                own = _of_capture(x.device, stream, count)
                return x.new_zeros(count, dtype=torch.int32) if own is None else own
    kept = _of_stream.get((x.device, stream))
    if kept is None or kept.numel() < count:
        with _lock:
            kept = _take(x.device, max(count, OF_A_STREAM), refill=True)
        _of_stream[x.device, stream] = kept
    return kept


def _of_capture(device: torch.device, stream: int, count: int) -> Tensor | None:
    """The set of the capture that `stream` is in; None where there are no free counters.

    Where the driver does not tell the capture, each launch gets counters of its own for good.
    """
    capture = captures.current(stream)
    with _lock:
        if capture is None:
            return _take(device, count, refill=False)
        own = _captured.get(capture.id)
        kept = None if own is None else own.of_stream.get((device, stream))
        if kept is None or kept.numel() < count:
            kept = _take(device, max(count, OF_A_STREAM), refill=False)
            if kept is None:
                return None
            if own is None:
                own = _captured[capture.id] = Captured(captures.watch(capture))
            own.of_stream[device, stream] = kept
            own.taken.append((device, kept))
        return kept


def _take(device: torch.device, count: int, refill: bool) -> Tensor | None:
    """Counters that no other launch uses; None where there are none and no `refill`.

    From the smallest free piece that has enough. `_lock` is held.
    """
    _return_ended()
    count = -(-count // LINE) * LINE
    free = _free.setdefault(device, [])
    fitting = [i for i, piece in enumerate(free) if piece.numel() >= count]
    if fitting:
        piece = free.pop(min(fitting, key=lambda i: free[i].numel()))
    elif refill:
        piece = _zeros(device, max(count, SIZE))
    else:
        return None
    if piece.numel() > count:
        free.append(piece[count:])
    return piece[:count]


def _return_ended() -> None:
    """Put the sets of graphs that are gone back among the free ones."""
    for number, own in list(_captured.items()):
        if own.ended is not None and captures.ended(own.ended):
            del _captured[number]
            for device, kept in own.taken:
                _free[device].append(kept)


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
