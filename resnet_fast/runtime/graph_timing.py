"""What a call takes the GPU, by CUDA graphs: without the host, which is slower than most launches.

In a model a layer finds little of its tensors in the L2 cache, as other layers ran in between. The
same call again and again finds all that fits, up to 50 MiB, and looks faster than it is. So
`cold_ms` writes a buffer of twice the cache before every call:

    time of a call = (graph of k × (write, call) − graph of k × (write)) / k

The write is subtracted with its launch, so what is left is the call and its launches, as they are
in a graph. It leaves the cache full of lines that are not in memory yet. The next call or the next
write puts them there, so the difference has a call's own bytes, once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_CALLS = 100  # in a graph: its results may share memory, its nodes do not
GRAPH_MS = 10.0  # so long is a replay, or the most calls
LEAST_MS = 1e-6  # noise may be larger than a launch; a time is positive

Run = Callable[[], object]


def captured(run: Run, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of run(), `calls` times, after its first replay, a slow one. run() has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return graph


def elapsed_ms(run: Run) -> float:
    """Milliseconds of the current stream from before run() until what it started is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cold_ms(run: Run, rounds: int) -> list[float]:
    """Milliseconds of run() with nothing of it in L2, `rounds` times; the graphs take turns.

    On the current GPU, not while a graph is captured. Memory: the buffer, and twice what run()
    allocates, as a graph frees and reuses what a call leaves.
    """
    buffer = scratch()

    def write() -> None:
        buffer.fill_(1)  # by a kernel: a copy engine may go past the cache

    def both() -> None:
        write()
        run()

    both()
    calls = calls_for(min(elapsed_ms(both) for _ in range(3)))
    whole, writes = captured(both, calls), captured(write, calls)
    return differences(
        lambda: elapsed_ms(whole.replay), lambda: elapsed_ms(writes.replay), calls, rounds
    )


def differences(
    whole: Callable[[], float], part: Callable[[], float], calls: int, rounds: int
) -> list[float]:
    """(whole() − part()) / calls of every round, at least LEAST_MS.

    Both are milliseconds; they take turns in being first, so that a clock that changes cancels.
    """
    found = []
    for turn in range(rounds):
        if turn % 2 == 0:
            long, short = whole(), part()
        else:
            short, long = part(), whole()
        found.append(max((long - short) / calls, LEAST_MS))
    return found


def calls_for(ms: float) -> int:
    """Calls of `ms` in a graph of GRAPH_MS, one to MOST_CALLS."""
    return max(1, min(MOST_CALLS, int(GRAPH_MS / max(ms, LEAST_MS))))


def scratch() -> Tensor:
    """Memory of twice the current GPU's L2 cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * cache // 4, dtype=torch.int32, device="cuda")
