"""Recorded calls: the second call of a chain on tensors of the same kind replays the first.

Checks, the choice of implementation, plan and tile, and Triton's argument handling depend on the
chain and on dtypes, shapes, strides and alignment, not on values. On a GPU they take several times
as much host time as the kernel launches. So the first call for a kind of tensors is recorded
(`runtime.recording`). Later calls replay it: the same launches in the same order, with
bit-identical results. CUDA graph capture works as without replay; a profile shows the replay by
name, and its launches.

Compilation, tracing and tuning take the normal path; so does a function that cannot be recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import settings, tuning_tables
from ..runtime.recording import Program, record
from ..spec.chain import Chain
from . import ops

DEVICES = {"cuda"}  # on a CPU, an op takes longer than all decisions
MOST = 1024  # programs; a full table is cleared
UNKNOWN = object()
PLAIN = (Tensor, nn.Parameter)
SETTINGS = [s.variable for s in (settings.TRITON_CONV, settings.CUDA_CONV, settings.TRACE)]
_programs: dict[Hashable, Program | None] = {}


def run(
    function: Callable[..., Any],
    chain: Chain,
    fixed: tuple[Hashable, ...],
    tensors: Sequence[Tensor | None],
) -> Any:
    """function(chain, *fixed, *tensors), replayed if it was recorded.

    `function` may depend on `chain`, `fixed`, dtypes, shapes, strides and alignment, but not on
    values or other state that changes. The first of `tensors` is not None. A chain that shares
    statistics with other processes is never replayed.
    """
    fixed = (chain, *fixed)
    key = None if chain.shared else _key(function, fixed, tensors)
    if key is None:
        return function(*fixed, *tensors)
    program = _programs.get(key, UNKNOWN)  # one lookup: another thread may clear the table
    if program is UNKNOWN:
        if len(_programs) >= MOST:
            _programs.clear()
        result, _programs[key] = record(function, fixed, tensors, ops.IMPLEMENTATIONS)
        return result
    if program is None:
        return function(*fixed, *tensors)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"resnet_fast::replay{function.__name__}"):
            return program(tensors)
    return program(tensors)


def forget() -> None:
    """Drop all recordings, because what the decisions depend on has changed."""
    _programs.clear()


def _key(
    function: Callable[..., Any], fixed: Sequence[Hashable], tensors: Sequence[Tensor | None]
) -> Hashable | None:
    """All that the recorded steps depend on; None if the call must take the normal path."""
    device = tensors[0].device
    if device.type not in DEVICES or ops.traced() or tuning_tables.unsettled():
        return None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return None
    autocast = torch.is_autocast_enabled(device.type)
    key = [function, *fixed, device.index, torch.backends.cudnn.allow_tf32, autocast]
    key += map(os.environ.get, SETTINGS)
    for t in tensors:
        if t is None:
            key.append(None)
            continue
        if type(t) not in PLAIN or t.device != device:
            return None
        key += (t.dtype, t.shape, t.stride(), t.data_ptr() % 16)
    return tuple(key)
