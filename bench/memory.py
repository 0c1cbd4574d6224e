"""Peak of live tensor memory during one step, counted from before the model was built.

So parameters, buffers, gradients, activations, workspaces and whatever a provider keeps packed
are in it; the input batch, the same for all, is not.

CPU: every allocation and release that passes PyTorch's CPU allocator (`torch.profiler` with
`profile_memory`), integrated in order of time; oneDNN's reorders and scratchpads come through the
same allocator. It is exact and repeatable where the process's resident size is neither: glibc
keeps freed pages and the compiler's own memory would be counted. CUDA: the caching allocator's
own peak, over the steps that follow the first one (which compiles and tunes), or what it still
holds after them where that is more: the pool of a CUDA graph, whose tensors are not counted.
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
    """The step that `build` makes, and its peak memory in MiB after WARM_UPS steps."""
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
    """Most bytes live from `start` to `end`; changes are (time, address, bytes, < 0 a release).

    What is released without having been allocated among `changes` was not ours to count.
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
