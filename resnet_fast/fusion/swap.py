"""The class of a fused module: a subclass of the module's own class with another `forward`.

It runs the calls of the module's forward, and one fused call for each region (`match`). Children do
not change and are looked up at every call, so other code may still call them. The original forward
runs if anything that the traced forward read has changed. The calls of a region run one by one if
one of its layers has changed, or if fused ops do not support the call (`dispatch.guard`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from ..dispatch.guard import transformed, watched
from ..dispatch.packed_filters import Rechecked
from ..models import ResNet
from ..models.copies import copy_modules
from ..modules import PLAIN, Fused
from .arguments import Signature, tensors_of
from .dataflow import Forward, Forwards, Mismatch
from .match import Region, regions_of
from .opening import Opened, Opening, Traced, crossed
from .rewrite import Function, rewritten
from .sandbox import below

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
            cls = type(self)
            self.__class__ = cls._plain_class
            try:
                signature = self._fused_plan.signature
                self._fused_plan = _plan_again(self, self._fused_impl, signature)
            finally:
                self.__class__ = cls

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: the plain module, in a tree of its own."""
        plain = copy_modules(self)
        restore(plain)
        return plain

    def forward(self, *args, **kwargs):
        plan = self._fused_plan
        given = None if plan is None or kwargs else plan.given(args)
        if given is None or not plan.holds(self):
            return super().forward(*args, **kwargs)
        run = plan.forward(self)
        return super().forward(*args, **kwargs) if run is None else run(self, *given)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"impl={self._fused_impl!r}")))


@dataclass(frozen=True)
class Plan:
    """What a fused module runs, and what must be unchanged for that.

    traced: the module, and the children that are open in its forward, by path. signature: its
    arguments. functions: the forward for each set of modes, made when it is needed.
    """

    traced: dict[str, Traced]
    signature: Signature | None
    impl: str
    regions: frozenset[Region]
    functions: dict[tuple[bool, ...], Function] = field(default_factory=dict)

    def given(self, args: tuple[Any, ...]) -> Sequence[Any] | None:
        """What the functions take of `args`; None if a plain call must run."""
        found = args if self.signature is None else tensors_of(self.signature, args)
        if found is None or watched():
            return None
        return None if any(isinstance(t, Tensor) and transformed(t) for t in found) else found

    def holds(self, module: nn.Module) -> bool:
        """Whether all forwards, and what they read, are unchanged since tracing."""
        return all([traced.holds(module) for traced in self.traced.values()])

    def forward(self, module: nn.Module) -> Function | None:
        """The function that runs the forward of `module` in the modes that it has now.

        None for new modes while a compiler looks on.
        """
        modes = {path: below(module, path).training for path in self.traced}
        key = tuple(modes.values())
        if key not in self.functions:
            if torch.compiler.is_compiling():
                return None
            opened = Opened.of(self.traced, modes)
            regions, _ = regions_of(module, opened.graph)
            self.functions[key] = rewritten(opened.graph, regions, self.impl)
        return self.functions[key]

    def __deepcopy__(self, memo):
        traced = {
            path: replace(one, notes=copy.deepcopy(one.notes, memo))
            for path, one in self.traced.items()
        }
        return replace(self, traced=traced)

    def __reduce__(self):
        return Unread, (self.signature,)


class Own:
    """Stands for the plan of a module of resnet_fast, which has its own fused forward."""


@dataclass(frozen=True)
class Unread:
    """Stands in a pickle for the plan, which is computed again when the pickle is loaded."""

    signature: Signature | None


class Matched(NamedTuple):
    """A plan, and for each mode of the module: its graph, the regions in it, and why some calls are
    in none.
    """

    plan: Plan
    graphs: dict[bool, tuple[Opened, list[Region], dict[fx.Node, str]]]


def match(
    module: nn.Module,
    forward: Forward,
    impl: str,
    find: Callable[[nn.Module], Forward | None],
) -> Matched:
    """The regions in the forward of `module`. find: the forward of a child that may be opened."""
    traced = Opening(module, forward, find).traced
    while True:
        graphs = {}
        for mode in (True, False):
            opened = Opened.of(traced, dict.fromkeys(traced, mode))
            graphs[mode] = opened, *regions_of(module, opened.graph)
        entered = {"", *(path for path, one in traced.items() if one.is_identity)}
        for opened, regions, _ in graphs.values():
            entered |= crossed(opened, [region.calls for region in regions])
        if entered == traced.keys():
            break
        traced = {path: one for path, one in traced.items() if path in entered}
    everything = frozenset(region for _, regions, _ in graphs.values() for region in regions)
    named = {name for region in everything for name in region.layers}
    traced = {path: one.without(named) for path, one in traced.items()}
    plan = Plan(traced, forward.signature, impl, everything)
    for mode, (opened, regions, _) in graphs.items():
        plan.functions[(mode,) * len(traced)] = rewritten(opened.graph, regions, impl)
    return Matched(plan, graphs)


def _plan_again(
    module: nn.Module, impl: str, signature: Signature | None = None
) -> Plan | None:
    """The plan of a module that was loaded from a pickle."""
    forwards = Forwards()
    try:
        forward = forwards.of(module, signature)
    except Mismatch:
        return None
    return match(module, forward, impl, forwards.inside).plan


class SwappedGraph(Swapped):
    """Mixin for a `GraphModule`, which compiles, copies and pickles itself by its class."""

    def __deepcopy__(self, memo):
        with self._plain():
            copied = copy.deepcopy(self, memo)
        return _again(copied, self._fused_impl)

    def __reduce_ex__(self, protocol):
        with self._plain():
            made = self.__reduce_ex__(protocol)
        return _rebuilt, (made, self._fused_impl)

    def recompile(self):
        """Compile the plain forward from the graph, as after each change of it, and fuse it."""
        with self._plain():
            return self.recompile()

    @contextlib.contextmanager
    def _plain(self):
        """As the plain module, then as a fused one; with a new plan if it has been recompiled."""
        fused, plain = type(self), self._plain_class
        held = {name: vars(self).pop(name) for name in ("_fused_plan", "_fused_impl")}
        self.__class__, before = plain, plain.forward
        try:
            yield
            if plain.forward is not before:
                held["_fused_plan"] = _plan_again(self, held["_fused_impl"])
        finally:
            self.__class__ = fused
            vars(self).update(held)


def _rebuilt(made: tuple[Any, ...], impl: str) -> nn.Module:
    """A `GraphModule` from its pickle, fused."""
    make, args, *_ = made
    return _again(make(*args), impl)


def _again(module: nn.Module, impl: str) -> nn.Module:
    """`module`, fused."""
    plan = _plan_again(module, impl)
    if plan is not None:
        apply(module, plan, impl)
    return module


def apply(module: nn.Module, plan: Own | Plan, impl: str) -> None:
    """Make `module` run `plan` with `impl`."""
    if isinstance(plan, Plan):
        mixin = SwappedGraph if isinstance(module, fx.GraphModule) else Swapped
        module.__class__ = _subclass(mixin, type(module))
        module._fused_plan, module._fused_impl = plan, impl
        return
    module.impl = impl
    module.__class__ = FUSED.get(type(module), type(module))
    if isinstance(module, ResNet):
        module.switch(True)


def runs(module: nn.Module, region: Own | Region) -> bool:
    """Whether `module` currently runs `region` fused."""
    if isinstance(region, Region):
        plan = module._fused_plan if isinstance(module, Swapped) else None
        return plan is not None and region in plan.regions and plan.holds(module)
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


_subclasses: WeakValueDictionary[Any, type[nn.Module]] = WeakValueDictionary()


def _subclass(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a fused module of class `cls`: one for each, as long as a module has it."""
    made: Any = _subclasses.get((mixin, id(cls)))
    if made is not None and made._plain_class is cls:
        return made

    @functools.wraps(cls.forward)  # tracers read the arguments of the wrapped function
    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    names = {"_fused_mixin": mixin, "_plain_class": cls, "forward": forward}
    names |= {"__module__": __name__, "__doc__": cls.__doc__}
    made = type(f"Fused{cls.__name__}", (mixin, cls), names)
    _subclasses[mixin, id(cls)] = made
    return made


def _new(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    fused = _subclass(mixin, cls)
    return fused.__new__(fused)
