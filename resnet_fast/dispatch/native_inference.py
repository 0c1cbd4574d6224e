"""Inference of several chains, one after another, in a single native call.

`native.infer_chains` (csrc/infer_chains.h) runs a block, or a ResNet up to its pooling, without
Python and without the dispatcher between the convolutions. It adds a shortcut in place where
nothing else reads that tensor. The results are bit-identical. Calls that it does not support
(gradients, batch statistics, tracing, another implementation, tensors that do not fit) run op by
op in `functional.run_chain`, which also gives better errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..runtime import trace
from ..spec.dtypes import autocast
from ..spec.layers import Parts, promotes, windows_of
from ..spec.layout import call_format
from ..spec.values import pair
from . import backends
from .guard import plain_call
from .ops import traced
from .packed_filters import drop_with
from .snapshot import Snapshot

SHORTCUTS = ("none", "identity", "projection", "zero_pad")  # csrc/infer_chains.h numbers them
NO_NORM = (None,) * 4


class Program(NamedTuple):
    """The arguments of `native.infer_chains` for some chains, the first of which is `first`."""

    first: Parts
    tensors: list[Tensor | None]
    words: list[int]
    eps: list[float]

    @classmethod
    def of(cls, chains: Sequence[Parts]) -> Program | None:
        """The program of `chains`, or None if they are unsupported."""
        program = cls(chains[0], [], [], [])
        for parts in chains:
            if not _write(parts, program.words, program.tensors, program.eps):
                return None
        return program

    def run(self, x: Tensor, impl: str, call: Callable[[Tensor], Tensor]) -> Tensor | None:
        """call(x), with x as the chains read it, or None if unsupported."""
        cast = autocast(x)
        if cast is not x and promotes(self.first, x):
            return None
        x = cast
        if not _native(x, impl, self.tensors):
            return None
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, *self.tensors)
        ):
            return None
        x = x.contiguous(memory_format=call_format(x, self.tensors[0]))
        try:
            y = call(x)
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # the op-by-op path raises an error that names the argument
        if not x.is_cuda:
            drop_with(self.tensors)
        return y

    def call(self, x: Tensor) -> Tensor:
        """y by the op."""
        return backends.native_ops().infer_chains(x, *self[1:])

    def before(self, steps: Sequence[Step]) -> Callable[[Tensor], Tensor]:
        """`call`, then `steps`, with all arguments but x already converted."""
        native, _ = backends.native_module()
        all_steps = (("resnet_fast_native::infer_chains", self[1:]), *steps)
        program = native.Program(len(all_steps) + 1)
        for i, (op, operands) in enumerate(all_steps):
            program.add(op, "", (native.Place(i), *operands), {}, [i + 1], [i])
        return lambda x: program([x], [len(all_steps)])[0]


Step = tuple[str, Sequence[Any]]
"""An operator of one tensor, and its other arguments."""
Everything = tuple[Sequence[nn.Module], Sequence[Step]]
Recorded = tuple[Program, Callable[[Tensor], Tensor], Snapshot]
MOST = 64
_recorded: WeakKeyDictionary[nn.Module, Recorded] = WeakKeyDictionary()


def infer(
    chains: Sequence[Parts],
    x: Tensor,
    impl: str,
    everything: Callable[[], Everything] | None = None,
) -> Tensor | None:
    """y of `chains` on x [N,C,H,W], each on the result of the one before, or None if unsupported.

    Unsupported: gradients, batch statistics, autocast that mixes dtypes, compilation, tracing, a
    dispatch mode, RESNET_FAST_TRACE, and an `impl` that is not native for x.

    everything: the modules whose state decides what a net computes, itself first, and its steps
    after the chains; or no modules. On a CPU, `infer_again` of the net then runs chains and steps
    without reading the modules.
    """
    program = Program.of(chains) if _takes(x) else None
    y = None if program is None else program.run(x, impl, program.call)
    if program is not None and y is not None and everything is not None and not x.is_cuda:
        modules, steps = everything()
        snapshot = Snapshot.of(modules) if modules else None
        if snapshot is not None:
            if len(_recorded) >= MOST:  # a net that a hook of its tensors refers to is never freed
                _recorded.clear()
            _recorded[modules[0]] = program, program.before(steps), snapshot
    return y


def infer_again(module: nn.Module, x: Tensor, impl: str) -> Tensor | None:
    """The result of what `infer` recorded for `module`; None if there is nothing, or a change."""
    recorded = None if torch.compiler.is_compiling() else _recorded.get(module)
    if recorded is None or plain_call(x) or not _takes(x):
        return None
    program, call, snapshot = recorded
    if not x.is_cuda and snapshot.same(module):
        return program.run(x, impl, call)
    _recorded.pop(module, None)
    return None


def _takes(x: Tensor) -> bool:
    return type(x) is Tensor and x.dim() == 4 and not traced() and not trace.on()


def _native(x: Tensor, impl: str, tensors: list[Tensor | None]) -> bool:
    """Whether `impl` is native for x. On a GPU, channels must also fit CUTLASS (`backends.eights`);
    for others the op-by-op path raises the error (`backends.unsuited`).
    """
    try:
        chosen = backends.chosen("conv_bn_act", impl, x.device.type, x.dtype)
    except RuntimeError:
        return False
    if chosen != "native" or not hasattr(backends.native_ops(), "infer_chains"):
        return False
    filters = (t for t in tensors if t is not None and t.dim() == 4)
    return x.device.type != "cuda" or all(map(backends.eights, filters))


def _write(
    parts: Parts, program: list[int], tensors: list[Tensor | None], eps: list[float]
) -> bool:
    """Append a chain in the order of csrc/infer_chains.h; False if it is unsupported.

    Tensors are read from the module's dictionaries, because attribute access would cost as much as
    the rest. A tensor stored elsewhere (a parametrized filter) takes the op-by-op path.
    """
    n = len(parts.convs)
    pool, convs, norms = parts.pool, parts.convs, (*parts.norms, parts.projection_norm)
    trains = any([norm is not None and norm.training for norm in norms])
    bare = None in parts.norms[1:-1]  # the native call applies a ReLU between convolutions
    if n == 0 or trains or bare or parts.shortcut not in SHORTCUTS:
        return False
    if parts.projection is not None:
        convs = (*convs, parts.projection)
    pads = parts.stride if parts.shortcut == "zero_pad" else 0
    program += (n, SHORTCUTS.index(parts.shortcut), parts.relu, pool is not None, pads)
    for conv in convs:
        held = conv._parameters
        weight, bias = held.get("weight"), held.get("bias")
        if weight is None or "bias" not in held:
            return False
        program += pair(conv.stride, "stride")
        program += pair(conv.padding, "padding")
        program += pair(conv.dilation, "dilation")
        program.append(conv.groups)
        tensors += (weight, bias)
    for norm in norms:
        if norm is None:
            tensors += NO_NORM
            eps.append(0.0)
            continue
        running = norm._buffers
        mean, var = running.get("running_mean"), running.get("running_var")
        if mean is None or var is None:
            return False
        held = norm._parameters
        if norm.affine and ("weight" not in held or "bias" not in held):
            return False
        tensors += (held.get("weight"), held.get("bias"), mean, var)
        eps.append(norm.eps)
    if pool is not None:
        windows = windows_of(pool)
        program += (*windows.kernel, *windows.stride, *windows.padding)
    return True
