"""`fuse`, `unfuse` and `explain`: run any PyTorch model by resnet_fast, and undo it.

`fuse` gives a module a subclass of its own class with another `forward`. Nothing else changes: the
object, its children, parameters, buffers, state-dict keys and hooks stay. `unfuse` restores the
class. The other files of `resnet_fast.fusion` recognize and run what can be fused.
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
from .counts import COUNTED
from .survey import Count, survey
from .swap import Swapped, apply, restore, runs

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, impl: str = "auto", inplace: bool = False) -> Model:
    """Fuse everything in `model` that `explain` lists as fusible. The mathematics stay the same.

    `fuse` reads the dataflow of each forward, not class names. It recognizes

    - chains of convolutions, norms, ReLUs and a max-pool, across units and norms with forwards of
      their own; a norm is what computes BatchNorm, frozen or not;
    - additions after them, with or without a ReLU, and their shortcut: the input, a projection, or
      any other value;
    - squeeze-and-excitation between a norm and an addition.

    Modules and models of resnet_fast are switched to their fused forward. On a fused model, `fuse`
    first undoes the earlier fusion.

    Layers that run as one call are called one by one if one of them has hooks, parametrizations or
    an overridden forward. A fused module runs its original forward

    - if anything has changed that the forward read when it was fused;
    - under global module hooks, `torch.func`, forward-mode AD, `torch.fx` and `torch.jit`.

    A forward is left alone if it has side effects, or if it depends on more than its arguments,
    attributes and mode. `explain` gives the reason.

    Args:
        model: Any module, in fp32, fp64, bf16 or fp16, on any device, in train or eval mode.
        impl: "auto", "reference", "native" or "triton", for every fused module.
        inplace: If False, return a copy of the module tree that shares parameters and buffers
            with `model`: training one trains both. Use `copy.deepcopy` for separate parameters.
            Move `model` to its device and dtype before fusing, because `.to` replaces buffers in
            one tree only. If True, change `model` itself and return it; optimizers stay valid.

    Returns:
        The fused model, with the same state-dict keys and train/eval flags.

    Raises:
        TypeError: `model` is not an nn.Module, or cannot be copied.
        ValueError: `impl` is unknown. An `impl` that cannot run on this machine raises
            RuntimeError when the model is called.
    """
    check_impl(impl)
    model = _prepare(model, inplace)
    restore(model)
    for module, plan in survey(model, impl).plans:
        apply(module, plan, impl)
    return model


def unfuse(model: Model, *, inplace: bool = False) -> Model:
    """Turn `model` back into plain PyTorch: undo `fuse`, and run resnet_fast's modules unfused.

    Args:
        model: Any module, fused or not.
        inplace: As for `fuse`.

    Returns:
        The plain model, with the same state-dict keys and train/eval flags.

    Raises:
        TypeError: `model` is not an nn.Module, cannot be copied, or holds a subclass of a fused
            class, whose plain class is unknown.
    """
    model = _prepare(model, inplace)
    for path, module in model.named_modules():
        if isinstance(module, Fused) and type(module) not in PLAIN:
            raise TypeError(
                f"{path}: {type(module).__name__} is a subclass of a fused class and cannot be "
                "unfused; derive it from the plain class in resnet_fast.blocks"
            )
    restore(model)
    for module in model.modules():
        if isinstance(module, ResNet):
            module.switch(False)
        module.__class__ = PLAIN.get(type(module), type(module))
    return model


def explain(model: nn.Module) -> Report:
    """List what in `model` is fused, what `fuse` would fuse, and what it leaves alone and why.

    `explain` does not change `model`: forwards run on copies, with fake tensors.

    Args:
        model: Any module, fused or not.

    Returns:
        A `Report`: `print` shows it as a table, `.rows` holds the table as data, and `.impls` the
        implementations that "auto" picks.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    modules = list(_checked(model).modules())
    swapped: dict[Any, Any] = {m: type(m) for m in modules if isinstance(m, Swapped)}
    for module in swapped:
        module.__class__ = module._plain_class
    try:
        found = survey(model)
    finally:
        for module, cls in swapped.items():
            module.__class__ = cls
    rows = []
    for path, what, why, holder, plan in found.rows:
        if plan is not None and watched():
            plan, why = None, "global module hooks are set, or nn.Module.__call__ is replaced"
        state = "left alone" if plan is None else "fused" if runs(holder, plan) else "fusible"
        rows.append(Line(path or "(model)", what, state, why))
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    where = first.device.type, first.dtype
    ops = {"inference": "conv_bn_act", "training": "bn_act"}
    impls = {mode: backends.chosen(op, "auto", *where) for mode, op in ops.items()}
    name = f"{str(first.dtype).removeprefix('torch.')} on {first.device.type}"
    return Report(rows, impls, name, _shares(found.counts))


def _shares(counts: list[Count]) -> dict[str, dict[str, Share]]:
    seen = watched()
    running: dict[tuple[nn.Module, Any], bool] = {}
    tallies = {
        mode: {kind: [0, 0, 0] for kind in COUNTED} for mode in ("evaluation", "training")
    }
    for training, kind, holder, plan in counts:
        tally = tallies["training" if training else "evaluation"][kind]
        tally[2] += 1
        if plan is not None and not seen:
            if (holder, plan) not in running:
                running[holder, plan] = runs(holder, plan)
            tally[0] += running[holder, plan]
            tally[1] += 1
    return {m: {kind: Share(*t) for kind, t in kinds.items()} for m, kinds in tallies.items()}


class Share(NamedTuple):
    """How many of `all` calls of a kind run fused, and how many could after `fuse`."""

    fused: int
    fusible: int
    all: int


class Line(NamedTuple):
    """A row of a `Report`.

    Attributes:
        path: Name of the module in the model, or "(model)".
        what: Its class, or the layers that run as one chain.
        state: "fused", "fusible" or "left alone".
        why: Why the module is left alone, or when its fused forward runs; "" otherwise.
    """

    path: str
    what: str
    state: str
    why: str


@dataclass(frozen=True)
class Report:
    """The result of `explain`; `print` shows it as a table.

    Attributes:
        rows: One `Line` per block, chain or layer, in the order of the model.
        impls: The implementation that "auto" picks, for "inference" and for "training".
        where: The dtype and device to which `impls` applies, such as "float32 on cpu".
        shares: For "evaluation" and "training", a `Share` of all "convolutions", "norms",
            "activations" and "additions" that the forwards call.
    """

    rows: list[Line]
    impls: dict[str, str]
    where: str
    shares: dict[str, dict[str, Share]]

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to fuse: the model has no Conv2d, BatchNorm2d or SyncBatchNorm"
        table = [tuple(name.replace("state", "is") for name in Line._fields), *self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        states = [row.state for row in self.rows]
        counts = (f"{states.count(s)} {s}" for s in ("fused", "fusible", "left alone"))
        picks = ", ".join(f"{impl} for {mode}" for mode, impl in self.impls.items())
        auto = f'impl="auto" picks {picks} ({self.where})'
        return "\n".join([*lines, ", ".join(counts), auto, self.summary()])

    def summary(self) -> str:
        """One line: how many convolutions, norms, activations and additions run fused, of all."""
        fused = any(share.fused for shares in self.shares.values() for share in shares.values())
        said = {}
        for mode, shares in self.shares.items():
            said[mode] = ", ".join(
                f"{share.fused if fused else share.fusible} of {share.all} {kind}"
                for kind, share in shares.items()
                if share.all
            )
        line = f"{'runs fused' if fused else 'fuse would run'}: {said['evaluation']}"
        same = said["training"] == said["evaluation"]
        return line if same else f"{line}; in training {said['training']}"


def _checked(model: Model) -> Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    return model


def _prepare(model: Model, inplace: bool) -> Model:
    """`model`, or a copy of its module tree that shares its tensors."""
    _checked(model)
    if inplace:
        return model
    try:
        return copy_modules(model)
    except TypeError as error:
        raise TypeError(f"model: cannot be copied ({error}); use inplace=True") from error
