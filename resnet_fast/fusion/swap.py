"""The classes that modules get when they are fused: subclasses of their own with another `forward`.

    block  its forward is one chain                       `FusedBlock`
    steps  chains among the children of a `Sequential`    `FusedSequential`
    run    conv → norm → relu → pool in any other         `RunConv`, `RunNorm`, `RunReLU`,
           forward                                        `RunPool`

Children that run inside a fused forward are looked up by name at every call. Where one has since
been replaced by another class, or been given hooks, the original forward runs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..blocks import Parts
from ..models import ResNet
from ..modules import PLAIN, Fused, hooked, run_fused
from .match import Block, Steps
from .survey import Own, Run

FUSED = {plain: fused for fused, plain in PLAIN.items()}


class Swapped:
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

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"impl={self._fused_impl!r}")))


class FusedBlock(Swapped):
    """A module whose forward is one chain."""

    def forward(self, *args, **kwargs):
        plan = self._fused_plan
        if len(args) != 1 or kwargs or plan is None or not _holds(plan, self, args[0]):
            return super().forward(*args, **kwargs)
        return _run(plan, self, args[0])


class FusedSequential(Swapped):
    """A `Sequential` that runs chains of its children as one. Its slices are plain."""

    def forward(self, input):
        plan = self._fused_plan
        if plan is None or plan.names != tuple(self._modules):
            return super().forward(input)
        for names, block in plan.groups:
            if block is not None and _holds(block, self, input):
                input = _run(block, self, input)
            else:
                for name in names:
                    input = self._modules[name](input)
        return input


class Unfinished(NamedTuple):
    """What a module of a run hands to the next one instead of its result: the work so far.

    The last module of the run does it all. Whoever else gets this object cannot use it.
    """

    x: Tensor
    conv: nn.Conv2d | None
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None
    relu: bool = False

    def finish(self, impl: str, pool: nn.MaxPool2d | None = None) -> Tensor:
        """pool(relu(norm(conv(x)))), or without what is missing."""
        if self.conv is None:
            parts = Parts((), (self.norm,), self.relu, "none", pool=pool)
        else:
            parts = Parts((self.conv,), (None, self.norm), self.relu, "none", pool=pool)
        return run_fused(parts, self.x, impl=impl)

    def __getattr__(self, name):
        raise AttributeError(
            f"{name!r} of a convolution or normalization that is fused with the modules called "
            "after it in the model: one of those has been replaced, or this one was called alone; "
            "use resnet_fast.unfuse(model), or resnet_fast.fuse(model) again"
        )


class RunConv(Swapped):
    """The convolution of a run; with hooks of its own it runs alone."""

    def forward(self, input):
        return super().forward(input) if hooked(self) else Unfinished(input, self, None)


class RunNorm(Swapped):
    """The normalization of a run: its end, unless the plan is True and a `RunReLU` follows."""

    def forward(self, input):
        handed = isinstance(input, Unfinished)
        hands_on = self._fused_plan and not hooked(self)
        if not handed and not (hands_on and input.dim() == 4):  # a SyncBatchNorm takes others too
            return super().forward(input)
        work = Unfinished(input.x, input.conv, self) if handed else Unfinished(input, None, self)
        return work if hands_on else work.finish(self._fused_impl)


class RunReLU(Swapped):
    """The ReLU of a run: its end, unless the plan is True and a `RunPool` follows."""

    def forward(self, input):
        if not isinstance(input, Unfinished):
            return super().forward(input)
        # Not by _replace, which the compiler of torch 2.6 does not trace.
        work = Unfinished(input.x, input.conv, input.norm, relu=True)
        return work if self._fused_plan and not hooked(self) else work.finish(self._fused_impl)


class RunPool(Swapped):
    """The max-pool that ends a run."""

    def forward(self, input):
        if isinstance(input, Unfinished):
            return input.finish(self._fused_impl, self)
        return super().forward(input)


def _child(module: nn.Module, name: str) -> nn.Module:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _holds(block: Block, module: nn.Module, x: Tensor) -> bool:
    """Whether x is [N,C,H,W], and what `block` absorbs still of the same classes, without hooks."""
    if x.dim() != 4:  # a SyncBatchNorm takes others too
        return False
    for name, cls in block.absorbed:
        child = _child(module, name)
        if type(child) is not cls or hooked(child):
            return False
    return True


def _run(block: Block, module: nn.Module, x: Tensor) -> Tensor:
    def get(name: str | None) -> Any:
        return None if name is None else _child(module, name)

    residual, shortcut = None, block.shortcut
    if shortcut == "residual":
        residual, shortcut = get(block.residual)(x), "none"
    convs, norms = tuple(map(get, block.convs)), tuple(map(get, block.norms))
    ends = get(block.projection), get(block.projection_norm)
    parts = Parts(convs, norms, block.relu, shortcut, *ends, get(block.pool))
    return run_fused(parts, x, residual, impl=module._fused_impl)


def apply(module: nn.Module, plan: Own | Block | Steps | Run, impl: str) -> None:
    """Make `module` run `plan` under `impl`."""
    if isinstance(plan, Block):
        _swap(module, FusedBlock, plan, impl)
    elif isinstance(plan, Steps):
        _swap(module, FusedSequential, plan, impl)
    elif isinstance(plan, Run):
        if plan.conv is not None:
            _swap(plan.conv, RunConv, None, impl)
        _swap(plan.norm, RunNorm, plan.relu is not None, impl)
        if plan.relu is not None and not isinstance(plan.relu, RunReLU):
            _swap(plan.relu, RunReLU, plan.pool is not None, impl)
        if plan.pool is not None and not isinstance(plan.pool, RunPool):
            _swap(plan.pool, RunPool, None, impl)
    else:
        module.impl = impl
        module.__class__ = FUSED.get(type(module), type(module))
        if isinstance(module, ResNet):
            module.switch(True)


def runs(holder: nn.Module, plan: Own | Block | Run | None) -> bool:
    """Whether `holder` runs `plan`, one chain of it if it is a `Sequential`, as it is now."""
    if isinstance(holder, FusedBlock):
        return plan == holder._fused_plan
    if isinstance(holder, FusedSequential):
        steps = holder._fused_plan or Steps((), ())
        chains = [block for _, block in steps.groups if block is not None]
        return steps.names == tuple(holder._modules) and plan in chains
    if isinstance(plan, Run):
        return all(isinstance(module, Swapped) for module in plan if module is not None)
    return isinstance(holder, Fused) or (isinstance(holder, ResNet) and holder.fused)


def restore(module: nn.Module) -> None:
    """Give a fused module its own class back."""
    if not isinstance(module, Swapped):
        return
    cls = type(module)
    if "_plain_class" not in vars(cls):
        raise TypeError(
            f"model: expected fused classes as they are, got {cls.__name__}, made of one"
        )
    module.__class__ = cls._plain_class
    for name in ("_fused_plan", "_fused_impl"):
        vars(module).pop(name, None)


def _swap(module: nn.Module, mixin: type[Swapped], plan: Any, impl: str) -> None:
    module.__class__ = _subclass(mixin, type(module))
    module._fused_plan, module._fused_impl = plan, impl


@functools.cache
def _subclass(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    names = {"_fused_mixin": mixin, "_plain_class": cls, "__module__": __name__}
    return type(f"Fused{cls.__name__}", (mixin, cls), names | {"__doc__": cls.__doc__})


def _new(mixin: type[Swapped], cls: type[nn.Module]) -> nn.Module:
    fused = _subclass(mixin, cls)
    return fused.__new__(fused)
