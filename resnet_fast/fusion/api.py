"""`fuse`, `unfuse` and `explain`: a model built elsewhere, run by this package, and back.

Fusing gives a module a subclass of its own class with another `forward`. Nothing else changes: the
object, its children, parameters, buffers, state-dict keys and hooks stay, and unfusing gives the
class back. `resnet_fast.fusion` says what is recognized, and how it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..dispatch import backends
from ..dispatch.guard import watched
from ..models import ResNet
from ..models.copies import copy_modules
from ..modules import PLAIN, Fused
from ..spec.checks import check_impl
from .survey import survey
from .swap import Swapped, apply, restore, runs

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, impl: str = "auto", inplace: bool = False) -> Model:
    """`model` with all that `explain` lists as fusible run by this package; the same mathematics.

    Recognized by dataflow, whatever the classes are called: residual blocks (basic, bottleneck,
    ResNeXt, wide, pre-activation; shortcut identity, projection or any child called on x), and in
    all other forwards chains of Conv2d, BatchNorm2d or SyncBatchNorm, ReLU and MaxPool2d. Modules
    and models of this package are switched to their fused forward. Fusing again starts anew.

    A fused forward computes what the original would, or the original runs. The original runs where
    a child has hooks or more than its class, where anything has changed that the forward read when
    it was fused, under global module hooks, `torch.func`, forward-mode AD, `torch.fx` and
    `torch.jit`. A forward with side effects, or that decides by more than its arguments,
    attributes and mode, is left alone; `explain` says so.

    Args:
        model: any module. In fp32, fp64, bf16 or fp16, on any device, in either mode.
        impl: "auto", "reference", "native" or "triton", for every fused module.
        inplace: False returns a copy of the module tree that shares parameters and buffers with
            `model` (training one trains both; `copy.deepcopy` it to part them, and move it to
            another device or dtype before fusing, since `.to` replaces buffers in one tree only).
            True changes `model` itself and returns it; optimizers go on as they were.

    Returns:
        The fused model, with the same state-dict keys and train/eval flags.

    Raises:
        TypeError: `model` is not an nn.Module, or cannot be copied.
        ValueError: an unknown `impl`. One that cannot run here raises RuntimeError when called.
    """
    check_impl(impl)
    model = _prepare(model, inplace)
    restore(model)
    for module, plan in survey(model, impl).plans:
        apply(module, plan, impl)
    return model


def unfuse(model: Model, *, inplace: bool = False) -> Model:
    """`model` in plain PyTorch: what `fuse` changed is undone, our own modules run unfused.

    `inplace` and the returned model are as for `fuse`. Raises TypeError for a subclass of one of
    our fused modules, whose plain twin is unknown.
    """
    model = _prepare(model, inplace)
    for path, module in model.named_modules():
        if isinstance(module, Fused) and type(module) not in PLAIN:
            raise TypeError(f"{path}: {type(module).__name__} has no plain twin to go back to")
    restore(model)
    for module in model.modules():
        if isinstance(module, ResNet):
            module.switch(False)
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def explain(model: nn.Module) -> Report:
    """What of `model` is fused, what `fuse(model)` would fuse, what it leaves alone and why.

    `print(explain(model))` shows a table; `.rows` holds it as data, `.impls` what "auto" picks.
    `model` is not changed: forwards run on copies, with fake tensors.
    """
    modules = list(_checked(model).modules())
    swapped: dict[Any, Any] = {m: type(m) for m in modules if isinstance(m, Swapped)}
    for module in swapped:
        module.__class__ = module._plain_class
    try:
        found = survey(model).rows
    finally:
        for module, cls in swapped.items():
            module.__class__ = cls
    rows = []
    for path, what, why, holder, plan in found:
        if plan is not None and watched():
            plan, why = None, "hooks of all modules are set, and a fused forward calls no children"
        state = "left alone" if plan is None else "fused" if runs(holder, plan) else "fusible"
        rows.append(Line(path or "(model)", what, state, why))
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    where = first.device.type, first.dtype
    ops = {"inference": "conv_bn_act", "training": "bn_act"}
    impls = {mode: backends.chosen(op, "auto", *where) for mode, op in ops.items()}
    return Report(rows, impls, f"{str(first.dtype).removeprefix('torch.')} on {first.device.type}")


class Line(NamedTuple):
    """A row of a `Report`; state is "fused", "fusible" or "left alone", `why` says why alone."""

    path: str
    what: str
    state: str
    why: str


@dataclass(frozen=True)
class Report:
    """What `explain` returns: `rows`, and `impls`, what "auto" picks for `where`."""

    rows: list[Line]
    impls: dict[str, str]
    where: str

    def __str__(self) -> str:
        table = [tuple(name.replace("state", "is") for name in Line._fields), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        states = [row.state for row in self.rows]
        counts = (f"{states.count(s)} {s}" for s in ("fused", "fusible", "left alone"))
        picks = ", ".join(f"{impl} for {mode}" for mode, impl in self.impls.items())
        return "\n".join([*lines, ", ".join(counts), f'impl="auto" picks {picks} ({self.where})'])


def _checked(model: Model) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return model


def _prepare(model: Model, inplace: bool) -> Model:
    """`model`, or a copy of its modules around the same tensors."""
    _checked(model)
    if inplace:
        return model
    try:
        return copy_modules(model)
    except TypeError as error:
        raise TypeError(f"model: cannot be copied ({error}); use inplace=True") from error
