"""Interleaved timing: every provider once per round, in rotated order, on rotated inputs.

A temporary slowdown of the machine affects all providers of a round, and no provider always runs
after the same one. Warm-up is not timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

MIN_ROUNDS = 7
PAUSE_S = 0.02  # on a CPU, between two providers: longer than the pools' threads wait for work
MIN_SAMPLE_MS = 20.0  # shorter steps are repeated until one sample lasts this long

Step = Callable[[int], object]
"""Runs one step on input i, taken modulo the number of inputs."""


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """`names` with the first `turn` of them (modulo their number) moved to the end."""
    turn %= max(len(names), 1)
    return [*names[turn:], *names[:turn]]


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits for the work of `device`; on the CPU it does nothing."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def warm_up(step: Step, sync: Callable[[], None], times: int = 3) -> float:
    """Run `step` `times` times as a warm-up; returns the fastest time, in ms."""
    return min(_sample(step, range(i, i + 1), sync, time.perf_counter) for i in range(times))


def interleave(
    steps: Mapping[str, Step],
    *,
    rounds: int | None = None,
    seconds: float = 20.0,
    repeats: int = 1,
    sync: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Milliseconds per step of each provider, one value per round; equal indices share a round.

    Runs `rounds` rounds, or with None as many as fit in `seconds`, at least MIN_ROUNDS. A value is
    the mean of `repeats` consecutive steps. Before each, all threads have `pause` seconds to sleep:
    after a step, those of a pool wait for work in a loop, on cores that the next provider needs.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = clock()
    done = 0
    while steps and (
        done < rounds if rounds is not None else done < MIN_ROUNDS or clock() - start < seconds
    ):
        inputs = range(done * repeats, (done + 1) * repeats)
        for name in rotated(list(steps), done):
            time.sleep(pause)
            times[name].append(_sample(steps[name], inputs, sync, clock))
        done += 1
    return times


def _sample(
    step: Step, inputs: range, sync: Callable[[], None], clock: Callable[[], float]
) -> float:
    sync()
    start = clock()
    for i in inputs:
        step(i)
    sync()
    return (clock() - start) * 1e3 / len(inputs)


def repeats_for(fastest_ms: float) -> int:
    """Steps per sample, equal for all providers, so that a sample lasts at least MIN_SAMPLE_MS."""
    return max(1, math.ceil(MIN_SAMPLE_MS / max(fastest_ms, 1e-3)))


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile, linearly interpolated."""
    q = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.quantile(torch.tensor(times, dtype=torch.float64), q).tolist()
    return p20, p50, p80


def speedup(baseline: Sequence[float], times: Sequence[float]) -> float:
    """Median of the per-round ratios baseline / times: drift between rounds cancels."""
    return statistics.median(b / t for b, t in zip(baseline, times, strict=True))
