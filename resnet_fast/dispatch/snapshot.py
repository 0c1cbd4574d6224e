"""The state of modules, to tell whether it has changed since.

Before a fused call, `guard` checks each module for hooks and overridden methods, and the call reads
options, children and tensors from it. In Python that takes as long as several convolutions of
ResNet-50 at batch 1. The native extension compares all of it with an earlier state in a fraction of
that time.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import nn

from . import backends

METHODS = ("forward", "__call__", "_conv_forward", "__iter__", "parts")  # of the classes in `guard`
BOOKKEEPING = frozenset(vars(nn.Module()))
HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and value == {})
HELD = ("_parameters", "_buffers")
IMMUTABLE = (bool, int, float, str, type(None))


class Snapshot:
    """All that decides how modules compute, except the values of tensors: attributes, children,
    tensors (the objects), classes and their methods. There must be no hooks.

    The first module is not kept alive, so that a snapshot can be stored under it.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        native, _ = backends.native_module()
        self._states = states = [vars(module) for module in modules]
        held = [state[name] for name in HELD for state in states]
        tensors = [t for module in modules for t in _tensors(module)]
        dicts = [*states, *held, *[state["_modules"] for state in states]]
        hooks = [state[name] for name in HOOKS for state in states if name in state]
        self._contents = native.Contents(dicts, hooks, [*modules[1:], *tensors])
        self._class, self._others = type(modules[0]), modules[1:]
        self._classes = tuple({type(module) for module in modules})
        self._methods = self._read_methods()

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Snapshot | None:
        """A snapshot, or None if a change of `modules` could escape it.

        Their classes must be those of PyTorch and resnet_fast, whose calls depend only on what a
        snapshot holds, and their attributes must not be values that change in place, such as lists.
        Hooks, and attributes of tensors, could also keep the first module alive.
        """
        for module in modules:
            if any(map(vars(module).get, HOOKS)) or any(map(_marked, _tensors(module))):
                return None
            if type(module).__module__.split(".")[0] not in ("torch", "resnet_fast"):
                return None
            if not all(_fixed(v) for name, v in vars(module).items() if name not in BOOKKEEPING):
                return None
        return cls(modules)

    def same(self, first: nn.Module) -> bool:
        """Whether nothing has changed; `first` is the first module."""
        return (
            type(first) is self._class
            and all(map(is_, map(vars, (first, *self._others)), self._states))
            and self._contents.same()
            and self._read_methods() == self._methods
        )

    def _read_methods(self) -> list[Any]:
        return [getattr(cls, name, None) for cls in self._classes for name in METHODS]


def _tensors(module: nn.Module) -> list[Any]:
    return [t for name in HELD for t in vars(module)[name].values()]


def _marked(t: Any) -> bool:
    """Whether a tensor has hooks or attributes."""
    return t is not None and bool(vars(t) or t._backward_hooks)


def _fixed(value: Any) -> bool:
    return type(value) in IMMUTABLE or (type(value) is tuple and all(map(_fixed, value)))
