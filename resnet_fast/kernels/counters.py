"""Arrival counters for the programs of a launch: zero before it and after it.

The kernel resets them, so an op that needs counters is still one launch. The launches of a stream
run in order and share a set. So do the launches that one capture makes on one stream, which stay in
order in every replay. No other launch shares a captured set, because the graph may be replayed at
any time and on any stream. The set is free again when the graph can no longer run.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import captures

SIZE = 1 << 18  # int32, 1 MiB per device: 1000 graphs and streams at a time
LINE = 32  # counters per cache line; each set starts on a line
OF_A_STREAM = 256


@dataclass
class Captured:
    """The sets of one capture, and the semaphore for the end of its graph; None if unknown.

    A stream whose set became too small also keeps its older sets.
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

    The kernel must leave them at zero. If a capture finds no free counters, for example because it
    is the first use on the device, the graph zeroes them itself: one more launch per replay.
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
    """The set of the capture that `stream` is in; None without free counters.

    If the driver cannot report the capture, each launch gets separate counters that are never
    freed.
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
    """Unused counters, from the smallest free piece that has enough.

    None if there is no such piece and no `refill`. The caller must hold `_lock`.
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
    """Return the sets of destroyed graphs to the free ones."""
    for number, own in list(_captured.items()):
        if own.ended is not None and captures.ended(own.ended):
            del _captured[number]
            for device, kept in own.taken:
                _free[device].append(kept)


def _zeros(device: torch.device, count: int) -> Tensor:
    """Zeros that every stream sees, in memory outside the pools of CUDA graphs.

    A separate thread allocates them: the memory pool of a graph that is being warmed up owns all
    allocations of its thread, and would free these with the graph.
    """

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
