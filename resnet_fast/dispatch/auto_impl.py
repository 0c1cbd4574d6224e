"""The implementation that "auto" takes for an op on a GPU, by measurement.

If several implementations can run an op, the tuning tables of kind "impls"
(`runtime.tuning_tables`) say which was fastest on this GPU at these shapes:
{op: {key: {"impl": name, "us": {name: microseconds}}}}. The key lists every argument: dtype, shape
and memory order of a tensor, the value of anything else. For shapes not in a table, a fitted cost
model decides (`cost_model`). With too few measurements for that, estimates decide where there are
some (`kernels.estimates`): the first one of `backends.preference` runs unless its estimated time is
more than LEAST_GAIN times another's. With RESNET_FAST_AUTOTUNE=1, shapes not in a table are
measured once, outside CUDA graph capture, and the result is stored; `resnet-fast tune` does this
for a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import tuning_tables
from . import cost_model

# The largest error of Triton's estimates against 24 layers on an H200 (bench/estimate.py). Those of
# native kernels have not been compared with measurements.
LEAST_GAIN = 1.28
Estimates = Callable[[], Mapping[str, float]]  # microseconds by implementation
_chosen: dict[tuple[Any, ...], tuple[str, str]] = {}
_written: dict[tuple[str, str], bool] = {}


def pick(
    op: str,
    gpu: str,
    args: Sequence[Any],
    candidates: Mapping[str, Callable[..., Any]],
    estimates: Estimates | None = None,
) -> tuple[str, str]:
    """(name, reason) of the one of `candidates`, in order of preference, that runs op(*args).

    estimates: called for shapes that are not measured; None if there can be no estimate.
    """
    first = next(iter(candidates)), "first choice"
    known = tuning_tables.searching() or _is_written(op, gpu)
    if len(candidates) == 1 or not (known or estimates):
        return first
    place = (op, gpu, *map(_kind, args))
    chosen = _chosen.get(place)
    if chosen is None:
        key = signature(args)
        chosen = _look_up(op, gpu, key, candidates) if known else None
        if chosen is None and known:
            tuning_tables.missed("impls", gpu, op, key)
            if not tuning_tables.searching():
                chosen = _predict(op, gpu, args, candidates)
            elif tuning_tables.capturing():
                return first
            else:
                chosen = _measure(op, gpu, key, args, candidates)
        if chosen is None and estimates is not None:
            chosen = _estimate(estimates(), candidates)
        chosen = chosen or first
        _chosen[place] = chosen
    return chosen


def signature(args: Sequence[Any]) -> str:
    """The arguments of an op as a table key: all that its time depends on, without values."""
    return " ".join(map(_part, args))


def forget() -> None:
    """Forget all choices, because the tables have changed."""
    _chosen.clear()
    _written.clear()


def _kind(value: Any) -> Any:
    """What `_part` says of an argument, hashable, in less time."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.is_contiguous()
    return tuple(map(_kind, value)) if isinstance(value, list | tuple) else value


def _part(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_part, value))}]"
    if not isinstance(value, Tensor):
        return str(value)
    shape = "x".join(map(str, value.shape))
    order = "" if value.is_contiguous() else "/nhwc"
    return f"{str(value.dtype).removeprefix('torch.')}[{shape}]{order}"


def _is_written(op: str, gpu: str) -> bool:
    """Whether any table has entries for `op`; cached, so a GPU without tables looks only once."""
    written = _written.get((op, gpu))
    if written is None:
        written = _written[op, gpu] = any(tuning_tables.sections("impls", gpu, op))
    return written


def _look_up(
    op: str, gpu: str, key: str, candidates: Mapping[str, Any]
) -> tuple[str, str] | None:
    for section in tuning_tables.sections("impls", gpu, op):
        name = section.get(key, {}).get("impl")
        if name in candidates:
            return name, "tuning table"
    return None


def _predict(
    op: str, gpu: str, args: Sequence[Any], candidates: Mapping[str, Any]
) -> tuple[str, str] | None:
    """The choice of the cost model fitted to the first table with enough measurements."""
    dtype = _part(args[0]).partition("[")[0]
    for section in tuning_tables.sections("impls", gpu, op):
        if section:
            name = cost_model.fastest(section, dtype, cost_model.work(op, args), list(candidates))
            if name is not None:
                return name, "cost model"
    return None


def _estimate(
    times: Mapping[str, float], candidates: Mapping[str, Any]
) -> tuple[str, str] | None:
    """The choice by estimated times; None if they do not include all of `candidates`."""
    if not candidates.keys() <= times.keys():
        return None
    best, *others = candidates
    for name in others:
        if LEAST_GAIN * times[name] < times[best]:
            best = name
    return best, "estimate " + ", ".join(f"{times[name]:.0f} us by {name}" for name in candidates)


def _measure(
    op: str, gpu: str, key: str, args: Sequence[Any], candidates: Mapping[str, Any]
) -> tuple[str, str]:
    times = {name: _microseconds(run, args) for name, run in candidates.items()}
    best = min(times, key=times.__getitem__)
    us = {name: round(time, 3) for name, time in times.items() if time != float("inf")}
    if us:
        entry = {"impl": best, "us": us, **cost_model.work(op, args)._asdict()}
        tuning_tables.write(tuning_tables.user_table("impls", gpu), op, key, entry)
        _written[op, gpu] = True
    return best, "measured"


def _microseconds(run: Callable[..., Any], args: Sequence[Any]) -> float:
    """Median time of run(*args) in microseconds; inf if `run` does not support the arguments."""
    import triton.errors

    try:
        with torch.cuda.device_of(args[0]):
            return tuning_tables.microseconds(lambda: run(*args))
    except torch.OutOfMemoryError:  # temporary, not a property of this candidate
        raise
    except (RuntimeError, ValueError, triton.errors.TritonError):
        return float("inf")
