"""GPU time of a call, measured with CUDA graphs to exclude the host, which most launches wait for.

In a model, the L2 cache has little of a layer's tensors, because other layers ran in between. A
repeated call finds up to 50 MiB of them there and looks too fast. Therefore `cold_ms` writes a
buffer of twice the cache size before every call:

    time of a call = (graph of k × (write, call) − graph of k × (write)) / k

The difference removes the write and its launch, and leaves the call and its launches in a graph.
A write leaves dirty lines in the cache. Either the call or the next write flushes them, so the
difference contains the traffic of the call once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_CALLS = 100  # per graph: results may share memory, nodes do not
GRAPH_MS = 10.0  # length of a replay, unless MOST_CALLS is reached
LEAST_MS = 1e-6  # noise may exceed a launch; times stay positive

Run = Callable[[], object]


def captured(run: Run, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls of run(), replayed once (the first is slow). Call run() before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return graph


def elapsed_ms(run: Run) -> float:
    """Milliseconds on the current stream for all work that run() starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cold_ms(run: Run, rounds: int) -> list[float]:
    """Milliseconds of run() with a cold L2 cache, `rounds` times; the graphs take turns.

    On the current GPU, not during graph capture. Memory: the buffer, and twice what run()
    allocates, since a graph frees and reuses the memory of a call.
    """
    buffer = scratch()

    def write() -> None:
        buffer.fill_(1)  # by a kernel: a copy engine may bypass the cache

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

    Both return milliseconds. They take turns in being first, so a drift of the clock cancels.
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
    """Number of calls of `ms` in a graph of GRAPH_MS, from 1 to MOST_CALLS."""
    return max(1, min(MOST_CALLS, int(GRAPH_MS / max(ms, LEAST_MS))))


def scratch() -> Tensor:
    """Memory of twice the current GPU's L2 cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.empty(2 * cache // 4, dtype=torch.int32, device="cuda")
