"""Recorded calls: a chain on tensors of the same kind replays an earlier call.

Checks, the choice of implementation, plan and tile, and Triton's argument handling depend on the
chain and on dtypes, shapes, strides and alignment, not on values. On a GPU they take several times
as much host time as the kernel launches; on a CPU they are a tenth of a training step of
ResNet-50 at batch 1, in which other threads wait. So the second call for a kind of tensors is
recorded (`runtime.recording`); the first may be the only one. Later calls replay it: the same calls
and launches in the same order, with bit-identical results. CUDA graph capture works as without
replay; a profile shows the replay by name, and its launches.

Compilation, tracing and tuning take the normal path; so does a function that cannot be recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime import settings, tuning_tables
from ..runtime.recording import record
from ..spec.chain import Chain
from . import backends, ops

DEVICES = {"cpu", "cuda"}
MOST = 1024  # programs; a full table is cleared
PLAIN = (Tensor, nn.Parameter)
SETTINGS = [
    s.variable
    for s in (settings.TRITON_CONV, settings.CUDA_CONV, settings.TRACE, settings.AUTOTUNE)
]
UNKNOWN, SEEN = object(), object()
_programs: dict[Hashable, Any] = {}
"""Kind of call → its `Program`, None if it cannot be recorded, or SEEN after the first call."""
_facts: dict[Hashable, Any] = {}
"""Chain and kind of tensors → what is `known` of them."""


def run(
    function: Callable[..., Any],
    chain: Chain,
    fixed: tuple[Hashable, ...],
    tensors: Sequence[Tensor | None],
    kind: Hashable | None = None,
) -> Any:
    """function(chain, *fixed, *tensors), replayed if it was recorded.

    `function` may depend on `chain`, `fixed`, dtypes, shapes, strides and alignment, but not on
    values or other state that changes. The first of `tensors` is not None. kind: `kind_of(tensors)`
    if the caller has it. A chain that shares statistics with other processes is never replayed.
    """
    kind = kind or kind_of(tensors)
    if kind is None or chain.shared:
        return function(chain, *fixed, *tensors)
    key = (function, chain, *fixed, kind)
    program = _programs.get(key, UNKNOWN)  # one lookup: another thread may clear the table
    if program is SEEN:
        native, _ = backends.native_module()
        result, _programs[key] = record(
            function, (chain, *fixed), tensors, ops.IMPLEMENTATIONS, native
        )
        return result
    if program is UNKNOWN:
        program = None
        if not tuning_tables.searching():
            _remember(_programs, key, SEEN)
    if program is None:
        return function(chain, *fixed, *tensors)
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"resnet_fast::replay{function.__name__}"):
            return program(tensors)
    return program(tensors)


def known(chain: Chain, kind: Hashable | None, facts: Any = None) -> Any:
    """What the caller told last of calls of `chain` on tensors of this kind, or None.

    facts: what it tells now.
    """
    if kind is None or chain.shared:
        return facts
    if facts is not None:
        _remember(_facts, (chain, kind), facts)
    return _facts.get((chain, kind))


def forget() -> None:
    """Drop all recordings, because what the decisions depend on has changed."""
    _programs.clear()
    _facts.clear()


def _remember(table: dict[Hashable, Any], key: Hashable, value: Any) -> None:
    if len(table) >= MOST:
        table.clear()
    table[key] = value


def kind_of(tensors: Sequence[Tensor | None]) -> Hashable | None:
    """All that recorded steps depend on; None if the call must take the normal path."""
    device = tensors[0].device
    if device.type not in DEVICES or ops.traced() or tuning_tables.watched():
        return None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return None
    native, _ = backends.native_module()
    kinds = _kinds(tensors) if native is None else native.kinds(tensors)
    return kinds and (kinds, *map(os.environ.get, SETTINGS))


def _kinds(tensors: Sequence[Tensor | None]) -> Hashable | None:
    """`_C.kinds(tensors)` in Python."""
    device = tensors[0].device
    kinds = [device, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled(device.type)]
    for t in tensors:
        if t is not None and (type(t) not in PLAIN or t.device != device):
            return None
        kinds.append(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16))
    return tuple(kinds)
