"""Peak of live tensor memory during one step, counted from before the model is built.

It includes parameters, buffers, gradients, activations, workspaces and a provider's packed filters.
It does not include the input batch, which is the same for all.

CPU: the running sum of all allocations and releases in PyTorch's CPU allocator (`torch.profiler`
with `profile_memory`); oneDNN's reorders and scratchpads use the same allocator. Unlike the
process's resident size it is exact and repeatable: glibc keeps freed pages, and the resident size
includes the compiler's memory. CUDA: the larger of two figures for the steps after the first (which
compiles and tunes): the caching allocator's peak, and the memory it still holds afterwards. The
second includes the pool of a CUDA graph, whose tensors are not counted in the first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

MIB = 2**20
WARM_UPS = 2
_MARK = "bench::peak_step"


def peak_of(
    build: Callable[[], Callable[[int], object]], device: torch.device
) -> tuple[Callable[[int], object], float]:
    """The step that `build` returns, and its peak memory in MiB after WARM_UPS steps."""
    measure = _peak_cuda if device.type == "cuda" else _peak_cpu
    return measure(build)


def _peak_cpu(build):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build()
        for i in range(WARM_UPS):
            step(i)
        gc.collect()
        with record_function(_MARK):
            step(WARM_UPS)
    changes, marks = [], []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name == _MARK:
            marks.append((event.start_time_ns, event.end_time_ns))
    return step, integrate(changes, *marks[0]) / MIB


def integrate(changes: Iterable[tuple[int, int, int]], start: int, end: int) -> int:
    """Maximum of live bytes from `start` to `end`. changes: (time, address, bytes; < 0 a release).

    Releases without an allocation in `changes` are ignored.
    """
    live: dict[int, int] = {}
    total = peak = 0
    for time, address, change in sorted(changes, key=lambda c: c[0]):
        if time > end:
            break
        if time >= start:
            peak = max(peak, total)
        if change > 0:
            live[address] = change
            total += change
        else:
            total -= live.pop(address, 0)
    return max(peak, total)


def _peak_cuda(build):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    step = build()
    step(0)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for i in range(1, WARM_UPS + 1):  # the second step of a CUDA-graph provider records its graph
        step(i)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    return step, max(peak, torch.cuda.memory_reserved() - reserved) / MIB
