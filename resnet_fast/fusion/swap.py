"""The classes that modules get when they are fused: subclasses of their own with another `forward`.

    block    its forward is one chain                      `FusedBlock`
    forward  chains among the calls of any other forward   `FusedForward`

Children stay what they are and are looked up at every call; other code may call them as ever. Where
one has since been changed, or what the forward read when it was traced, or the call is one that
fused ops do not follow, the original forward runs.
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
    """Mixin of the classes that `fuse` gives a module: its own class with another `forward`.

    Such a class exists once for each class of modules. Copies and pickles name that class, so they
    work wherever those of the plain module do.
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
    """What a fused module runs, and what must still hold: `plain`, its class's own forward, what
    that read (`notes`), and the names of the module's children.
    """

    plain: Callable[..., Any]
    notes: Notes
    children: tuple[str, ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether the forward of `module` is still the one that was traced."""
        same = type(module)._plain_class.forward is self.plain
        return same and tuple(module._modules) == self.children and self.notes.hold(module)

    def __deepcopy__(self, memo):
        return replace(self, notes=copy.deepcopy(self.notes, memo))

    def __reduce__(self):
        return Unread, ()

    def fits(self, call: fx.Node) -> bool:
        """Whether `call` of the module passes what the traced forward takes."""
        return len(call.args) == self.inputs and not call.kwargs


@dataclass(frozen=True)
class BlockPlan(Plan):
    """A forward that is `block`."""

    block: Block
    inputs = 1

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.block,)


class Own:
    """In the place of a plan: a module of this package, which has a switch of its own."""


class Unread:
    """In the place of a plan that a pickle leaves out; it is made anew at reading."""


@dataclass(frozen=True)
class ForwardPlan(Plan):
    """A forward of `inputs` tensors in which calls of `blocks` are one call each."""

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
    """A module with chains among the calls of its forward. Slices of a `Sequential` are plain."""

    def forward(self, *args, **kwargs):
        plan = self._fused_plan
        if plan is None or kwargs or len(args) != plan.inputs or plain_call(*args):
            return super().forward(*args, **kwargs)
        if not plan.holds(self):
            return super().forward(*args, **kwargs)
        return (plan.training if self.training else plan.evaluation)(self, *args)


def _unchanged(block: Block, module: nn.Module) -> bool:
    """Whether what `block` absorbs is of the same classes, and no more than that."""
    for name, cls, children in block.absorbed:
        child = below(module, name)
        if not is_unchanged(child, cls, children):
            return False
    return True


def is_unchanged(child: nn.Module | None, cls: type[nn.Module], children: int) -> bool:
    """Whether `child` is a layer of class `cls` with so many children, and no more than that."""
    same = type(child) is cls and len(child._modules) == children
    return same and refusal(child) is None


def _run(block: Block, module: nn.Module, x: Tensor) -> Tensor:
    residual = None
    if block.residual is not None:
        residual = _beside(below(module, block.residual), block.residual, x)
    parts = block.parts.each(lambda name: below(module, name))
    return run_fused(parts, x, residual, impl=module._fused_impl)


def _beside(child: nn.Module, name: str, x: Tensor) -> Tensor:
    """child(x) before the main path reads x, which must be as it was."""
    before = None if x.is_inference() else x._version
    residual = child(x)
    if before is not None and x._version != before:
        raise RuntimeError(
            f"{name} changes its input in place, which a fused block cannot follow; "
            "use resnet_fast.unfuse(model)"
        )
    return residual


def plan_block(module: nn.Module, forward: Forward, block: Block) -> BlockPlan:
    """The plan of a module whose forward is `block`."""
    notes = forward.notes.without([name for name, *_ in block.absorbed])
    return BlockPlan(type(module).forward, notes, tuple(module._modules), block)


def plan_forward(module: nn.Module, forward: Forward, impl: str) -> ForwardPlan | None:
    """The plan of a module with groups in its forward; None where there are none."""
    found = [match_groups(module, graph) for graph in forward]
    blocks = dict.fromkeys(group.block for groups in found for group in groups)
    if not blocks:
        return None
    inputs = sum(node.op == "placeholder" for node in forward.training.nodes)
    runs = (_rewritten(graph, groups, impl) for graph, groups in zip(forward, found, strict=True))
    children = tuple(module._modules)
    return ForwardPlan(type(module).forward, forward.notes, children, inputs, tuple(blocks), *runs)


def _plan_again(module: Swapped) -> Plan | None:
    """The plan of a module that was read from a pickle."""
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
    """forward(self, *inputs) that does what `graph` says, each of `groups` in one call."""
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
    """The function of x and the group's layers that runs them as one chain.

    A ReLU that is no module is None. Where the layers are no longer what they were, they are
    called, one after another.
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
    """Make `module` run `plan` under `impl`."""
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
    """Whether `module` runs `block` fused, as it is now."""
    if isinstance(block, Block):
        plan = module._fused_plan if isinstance(module, Swapped) else None
        return plan is not None and block in plan.blocks and plan.holds(module)
    return isinstance(module, Fused) or (isinstance(module, ResNet) and module.fused)


def restore(model: nn.Module) -> None:
    """Give every fused module of `model` its own class back, or raise and change none."""
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    for cls in map(type, swapped):
        if "_plain_class" not in vars(cls):
            raise TypeError(
                f"model: expected fused classes as they are, got {cls.__name__}, made of one"
            )
    for module in swapped:
        module.__class__ = type(module)._plain_class
        for name in ("_fused_plan", "_fused_impl"):
            vars(module).pop(name, None)


@functools.cache
def _subclass(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)  # tracers read the arguments of what it wraps
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    names = {"_fused_mixin": mixin, "_plain_class": cls, "forward": forward}
    names |= {"__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Fused{cls.__name__}", (mixin, cls), names)


def _new(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    fused = _subclass(mixin, cls)
    return fused.__new__(fused)
