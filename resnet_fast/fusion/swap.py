"""The classes of fused modules: subclasses of each module's own class with another `forward`.

    block    its forward is one chain                      `FusedBlock`
    forward  chains among the calls of any other forward   `FusedForward`

Children do not change and are looked up at every call, so other code may still call them. The
original forward runs if a child, or anything else that the traced forward read, has changed. It
also runs if fused ops do not support the call (`dispatch.guard`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..dispatch.guard import plain_call, refusal
from ..dispatch.packed_filters import Rechecked
from ..models import ResNet
from ..models.copies import copy_modules
from ..modules import PLAIN, Fused, run_fused
from .dataflow import Forward, Mismatch, sequence, trace
from .match import Block, Group, match_block, match_groups
from .sandbox import Notes, below

FUSED = {plain: fused for fused, plain in PLAIN.items()}


class Swapped(Rechecked):
    """Mixin of the classes that `fuse` gives to modules.

    There is one such class for each class of modules. Copies and pickles store the plain class, so
    they work wherever those of the plain module work.
    """

    _fused_mixin: type[Swapped]
    _plain_class: type[nn.Module]
    _fused_plan: Any = None
    _fused_impl = "auto"

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _new, (self._fused_mixin, self._plain_class), *state

    def __setstate__(self, state):
        super().__setstate__(state)
        if isinstance(self._fused_plan, Unread):
            self._fused_plan = _plan_again(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: the plain module, in a tree of its own."""
        plain = copy_modules(self)
        restore(plain)
        return plain

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"impl={self._fused_impl!r}")))


@dataclass(frozen=True)
class Plan:
    """What a fused module runs, and what must be unchanged for that: `plain`, the forward of its
    class; `notes`, what that forward read; `children`, the names of the module's children.
    """

    plain: Callable[..., Any]
    notes: Notes
    children: tuple[str, ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether the forward of `module`, and what it reads, is unchanged since tracing."""
        same = type(module)._plain_class.forward is self.plain
        return same and tuple(module._modules) == self.children and self.notes.hold(module)

    def __deepcopy__(self, memo):
        return replace(self, notes=copy.deepcopy(self.notes, memo))

    def __reduce__(self):
        return Unread, ()

    def fits(self, call: fx.Node) -> bool:
        """Whether `call` passes the arguments that the traced forward takes."""
        return len(call.args) == self.inputs and not call.kwargs


@dataclass(frozen=True)
class BlockPlan(Plan):
    """The plan of a forward that is one `block`."""

    block: Block
    inputs = 1

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)


class Own:
    """Stands for the plan of a module of resnet_fast, which has its own fused forward."""


class Unread:
    """Stands in a pickle for the plan, which is computed again when the pickle is loaded."""


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """The plan of a forward with `inputs` tensors in which each of `blocks` is one call."""

    inputs: int
    blocks: tuple[Block, ...]
    training: Callable[..., Any] = field(compare=False)
    evaluation: Callable[..., Any] = field(compare=False)


class FusedBlock(Swapped):
    """A module whose forward is one chain."""

    def forward(self, *args, **kwargs):
        plan = self._fused_plan
        if plan is None or kwargs or len(args) != 1 or plain_call(*args):
            return super().forward(*args, **kwargs)
        x = args[0]
        if not plan.holds(self) or not _unchanged(plan.block, self) or x.dim() != 4:
            return super().forward(*args, **kwargs)
        return _run(plan.block, self, x)


class FusedForward(Swapped):
    """A module with chains among its forward's calls. Slices of a fused `Sequential` are plain."""

    def forward(self, *args, **kwargs):
        plan = self._fused_plan
        if plan is None or kwargs or len(args) != plan.inputs or plain_call(*args):
            return super().forward(*args, **kwargs)
        if not plan.holds(self):
            return super().forward(*args, **kwargs)
        return (plan.training if self.training else plan.evaluation)(self, *args)


def _unchanged(block: Block, module: nn.Module) -> bool:
    """Whether all modules that `block` absorbs are unchanged."""
    for name, cls, children in block.absorbed:
        child = below(module, name)
        if not is_unchanged(child, cls, children):
            return False
    return True


def is_unchanged(child: nn.Module | None, cls: type[nn.Module], children: int) -> bool:
    """Whether `child` is a fusible layer of class `cls` with `children` children."""
    same = type(child) is cls and len(child._modules) == children
    return same and refusal(child) is None


def _run(block: Block, module: nn.Module, x: Tensor) -> Tensor:
    residual = None
    if block.residual is not None:
        residual = _beside(below(module, block.residual), block.residual, x)
    parts = block.parts.each(lambda name: below(module, name))
    return run_fused(parts, x, residual, impl=module._fused_impl)


def _beside(child: nn.Module, name: str, x: Tensor) -> Tensor:
    """child(x), computed before the main path reads x; the child must not change x."""
    before = None if x.is_inference() else x._version
    residual = child(x)
    if before is not None and x._version != before:
        raise RuntimeError(
            f"{name} changes its input in place, which a fused block does not support; "
            "use resnet_fast.unfuse(model)"
        )
    return residual


def plan_block(module: nn.Module, forward: Forward, block: Block) -> BlockPlan:
    """The plan of a module whose forward is `block`."""
    notes = forward.notes.without([name for name, *_ in block.absorbed])
    return BlockPlan(type(module).forward, notes, tuple(module._modules), block)


def plan_forward(module: nn.Module, forward: Forward, impl: str) -> ForwardPlan | None:
    """The plan of a module with groups in its forward; None if there are no groups."""
    found = [match_groups(module, graph) for graph in forward]
    blocks = dict.fromkeys(group.block for groups in found for group in groups)
    if not blocks:
        return None
    inputs = sum(node.op == "placeholder" for node in forward.training.nodes)
    runs = (_rewritten(graph, groups, impl) for graph, groups in zip(forward, found, strict=True))
    children = tuple(module._modules)
    return ForwardPlan(type(module).forward, forward.notes, children, inputs, tuple(blocks), *runs)


def _plan_again(module: Swapped) -> Plan | None:
    """The plan of a module that was loaded from a pickle."""
    cls, fake = type(module), FakeTensorMode(allow_non_fake_inputs=True)
    module.__class__ = cls._plain_class
    try:
        forward = sequence(module) or trace(module, fake)
        if cls._fused_mixin is FusedBlock:
            return plan_block(module, forward, match_block(module, forward))
        return plan_forward(module, forward, module._fused_impl)
    except Mismatch:
        return None
    finally:
        module.__class__ = cls


def _rewritten(graph: fx.Graph, groups: list[Group], impl: str) -> Callable[..., Any]:
    """A function forward(self, *inputs) that runs `graph`, with one call for each of `groups`."""
    ends = {group.calls[-1]: group for group in groups}
    inner = {call for group in groups for call in group.calls}
    new, values = fx.Graph(), {}
    for node in graph.nodes:
        if node in ends:
            calls = ends[node].calls
            layers = [new.get_attr(c.target) if c.op == "call_module" else None for c in calls]
            values[node] = new.call_function(
                _fused_calls(ends[node], impl), (values[calls[0].args[0]], *layers)
            )
        elif node not in inner:
            values[node] = new.node_copy(node, values.__getitem__)
    code = new.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"]


def _fused_calls(group: Group, impl: str) -> Callable[..., Tensor]:
    """A function of x and the group's layers that runs them as one chain.

    A ReLU function is passed as None. If a layer has changed, the layers are called one by one.
    """
    names = [call.target if call.op == "call_module" else "" for call in group.calls]
    places = group.block.parts.each(names.index)
    absorbed = {name: (cls, children) for name, cls, children in group.block.absorbed}

    def fused_calls(x: Tensor, *layers: nn.Module | None) -> Tensor:
        same = x.dim() == 4 and not plain_call(x)
        for name, layer in zip(names, layers, strict=True):
            if name and same:
                cls, children = absorbed[name]
                same = is_unchanged(layer, cls, children)
        if same:
            return run_fused(places.each(lambda place: layers[place]), x, impl=impl)
        for name, layer in zip(names, layers, strict=True):
            x = layer(x) if name else F.relu(x)
        return x

    return fused_calls


def apply(module: nn.Module, plan: Own | Plan, impl: str) -> None:
    """Make `module` run `plan` with `impl`."""
    if isinstance(plan, Plan):
        mixin = FusedBlock if isinstance(plan, BlockPlan) else FusedForward
        module.__class__ = _subclass(mixin, type(module))
        module._fused_plan, module._fused_impl = plan, impl
        return
    module.impl = impl
    module.__class__ = FUSED.get(type(module), type(module))
    if isinstance(module, ResNet):
        module.switch(True)


def runs(module: nn.Module, block: Own | Block) -> bool:
    """Whether `module` currently runs `block` fused."""
    if isinstance(block, Block):
        plan = module._fused_plan if isinstance(module, Swapped) else None
        return plan is not None and block in plan.blocks and plan.holds(module)
    return isinstance(module, Fused) or (isinstance(module, ResNet) and module.fused)


def restore(model: nn.Module) -> None:
    """Restore the class of every fused module of `model`. Changes nothing if it raises."""
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    for cls in map(type, swapped):
        if "_plain_class" not in vars(cls):
            raise TypeError(
                f"model: expected classes made by fuse, got {cls.__name__}, derived from one "
                "(by a parametrization, for example); remove what derived it"
            )
    for module in swapped:
        module.__class__ = type(module)._plain_class
        for name in ("_fused_plan", "_fused_impl"):
            vars(module).pop(name, None)


@functools.cache
def _subclass(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)  # tracers read the arguments of the wrapped function
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    names = {"_fused_mixin": mixin, "_plain_class": cls, "forward": forward}
    names |= {"__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (mixin, cls), names)


def _new(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    fused = _subclass(mixin, cls)
    return fused.__new__(fused)
