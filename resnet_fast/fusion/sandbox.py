"""A copy of a module on which its forward may run: its reads are noted, its changes detected.

The copy has fake tensors, and copies of every object that the forward can name. So the original
does not change, and no branch can depend on a random tensor. State that copy and original share
(generators, variables of Python modules, closures and classes) is restored. `Notes.hold` checks
later whether everything that was read is unchanged.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import pickle
import random
import sys
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import UninitializedTensorMixin
from torch.utils._python_dispatch import TorchDispatchMode

from ..models.copies import copy_modules

SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
CONTAINERS = (list, tuple, dict, set, frozenset)
LAYERS = frozenset(getattr(nn, name).__module__ for name in nn.modules.__all__) - {
    nn.Module.__module__
}
"""The Python modules of PyTorch's layers, whose code a forward may call by `super`."""
HELD = frozenset(vars(nn.Module()))  # attributes of every module
ABSENT = object()  # the value of a missing variable


def internal(name: str) -> bool:
    """Whether the Python module `name` belongs to PyTorch or resnet_fast."""
    return name == "torch" or name.startswith(("torch.", "resnet_fast."))


class Change(Exception):
    """A side effect of a forward."""


class _Object:
    """A value compared by identity and by its attributes of simple types; bound methods are equal
    if function and module are the same.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        held = {} if callable(value) else getattr(value, "__dict__", {})
        self.simple = {name: one for name, one in held.items() if isinstance(one, SIMPLE)}

    def __eq__(self, other):
        if not isinstance(other, _Object):
            return False
        bound = isinstance(self.value, types.MethodType)
        same = self.value is other.value or (bound and self.value == other.value)
        return same and self.simple == other.simple


@dataclass(frozen=True)
class Notes:
    """What a forward read: `children` as (path of the module, name, class of the child), other
    `values` as (path, name, the form that `_kept` gives).
    """

    children: tuple[tuple[str, str, type[nn.Module]], ...] = ()
    values: tuple[tuple[str, str, Any], ...] = ()

    @classmethod
    def of(cls, module: nn.Module, reads: set[tuple[str, str]]) -> Notes:
        """Notes of what `module` has at `reads`."""
        children, values = [], []
        for path, name in sorted(reads):
            value = _look(module.get_submodule(path), name)
            if isinstance(value, nn.Module):
                children.append((path, name, _plain_class(value)))
            else:
                values.append((path, name, _kept(value)))
        return cls(tuple(children), tuple(values))

    def without(self, names: Collection[str]) -> Notes:
        """These notes without the children `names`."""
        children = (read for read in self.children if read[0] != "" or read[1] not in names)
        return Notes(tuple(children), self.values)

    def hold(self, module: nn.Module) -> bool:
        """Whether `module` would read the same now."""
        for path, name, cls in self.children:
            holder = below(module, path)
            if holder is None or _plain_class(holder._modules.get(name)) is not cls:
                return False
        for path, name, value in self.values:
            holder = below(module, path)
            if holder is None or _kept(_look(holder, name)) != value:
                return False
        return True


def _plain_class(module: nn.Module | None) -> type:
    """The class of `module`, fused or not."""
    cls = type(module)
    return getattr(cls, "_plain_class", cls)


def below(module: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` under `module`, or None; faster than `get_submodule`."""
    for name in path.split(".") if path else ():
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _look(module: nn.Module, name: str) -> Any:
    """The attribute `name`, looked up without calling a property or `__getattr__`.

    Of parameters as a whole: which require a gradient.
    """
    if name in ("parameters", "named_parameters"):
        return tuple(parameter.requires_grad for parameter in module.parameters())
    held = module.__dict__
    for place in (held, held["_modules"], held["_parameters"], held["_buffers"]):
        if name in place:
            return place[name]
    return getattr(type(module), name, ABSENT)


def _kept(value: Any) -> Any:
    """A form of `value` to compare later: simple values, contents of containers, module classes.

    Of a tensor it keeps shape, dtype, device and requires_grad, which a graph records as constants.
    Any other object is compared by identity.
    """
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, nn.Module):
        return _plain_class(value)
    if isinstance(value, UninitializedTensorMixin):
        return UninitializedTensorMixin
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.requires_grad
    if isinstance(value, dict):
        return dict, tuple((_kept(key), _kept(one)) for key, one in value.items())
    if isinstance(value, CONTAINERS):
        return type(value), tuple(map(_kept, value))
    return _Object(value)


@contextlib.contextmanager
def sandbox(module: nn.Module, fake: FakeTensorMode) -> Iterator[tuple[nn.Module, set]]:
    """A copy of `module` to run its forward on, and the set of (path, name) that it reads.

    Raises:
        Change: the forward changes state, prints or draws random numbers.
        TypeError: `module` holds an object that cannot be copied.
    """
    reads: set[tuple[str, str]] = set()
    functions = functions_of(module)
    named = HELD.union(*(_names(function.__code__) for function in functions))
    others = [
        value
        for one in module.modules()
        for name, value in vars(one).items()
        if name not in named and not isinstance(value, (Tensor, nn.Module))
    ]
    copied = copy_modules(module, functools.partial(_faked, fake), others)
    for path, one in copied.named_modules():
        if not isinstance(one, (torch.jit.ScriptModule, fx.GraphModule)):
            vars(one)["_noted"] = path, reads
            one.__class__ = _noting(type(one))
    shared = _Shared(type(module), functions)
    before, generators = _state(copied, named), _generators()
    printed, writes = io.StringIO(), _Writes()
    try:
        with fake, writes, contextlib.redirect_stdout(printed):
            yield copied, reads
    finally:
        changed = shared.put_back() + _forgotten(copied)
        drawn = _drawn(generators, _generators())
        for put_back, state in generators.items():
            put_back(state)
    after = _state(copied, named)
    changed += [name for name in after | before if after.get(name) != before.get(name)]
    if changed:
        raise Change(f"it changes {min(changed)}")
    if writes.seen:
        raise Change("it writes to a tensor in place")
    if drawn:
        raise Change("it draws random numbers in Python")
    if printed.getvalue():
        raise Change("it prints to stdout")


def functions_of(module: nn.Module) -> set[types.FunctionType]:
    """The functions outside PyTorch that the forward of `module` can access by name."""
    found: set[types.FunctionType] = set()
    todo = [type(module).forward]
    while todo:
        function = inspect.unwrap(getattr(todo[-1], "__func__", todo[-1]))
        todo.pop()
        if not isinstance(function, types.FunctionType) or function in found:
            continue
        if internal(function.__module__ or ""):
            continue
        found.add(function)
        todo += [_variable(cell, "cell_contents") for cell in function.__closure__ or ()]
        for name in _names(function.__code__):
            todo += [place.get(name) for place in (function.__globals__, vars(module))]
            todo.append(getattr(type(module), name, None))
    return found


def _faked(fake: FakeTensorMode, t: Tensor) -> Tensor:
    if isinstance(t, UninitializedTensorMixin):
        return t
    return fake.from_tensor(t if t.is_leaf else t.detach())


class _Writes(TorchDispatchMode):
    """Detects writes to tensors, including those that bypass the version counter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = self.seen or func._schema.is_mutable
        return func(*args, **(kwargs or {}))


_notings: WeakValueDictionary[int, Any] = WeakValueDictionary()


def _noting(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` that notes which attributes code of layers or outside PyTorch reads."""
    made = _notings.get(id(cls))
    if made is not None and made._plain_class is cls:
        return made

    def __getattribute__(self, name):
        if not name.startswith("__") and name not in ("_noted", "training"):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller in LAYERS or not internal(caller):
                path, reads = self.__dict__["_noted"]
                reads.add((path, name))
        elif name == "__dict__" and not internal(sys._getframe(1).f_globals.get("__name__", "")):
            raise Change("it reads the __dict__ of a module")
        return super(noting, self).__getattribute__(name)

    names = {"__getattribute__": __getattribute__, "_plain_class": cls, "_own": frozenset()}
    names |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    noting = type(cls.__name__, (cls,), names)
    noting._own = frozenset(vars(noting))
    _notings[id(cls)] = noting
    return noting


def _forgotten(copied: nn.Module) -> list[str]:
    """Delete the attributes that the forward set on classes of the copy; their names."""
    names = []
    for cls in {type(module) for module in copied.modules()}:
        for name in vars(cls).keys() - getattr(cls, "_own", vars(cls).keys()):
            delattr(cls, name)
            names.append(name)
    return names


def _state(copied: nn.Module, named: frozenset[str]) -> dict[str, Any]:
    """The attributes of every module by dotted name; the contents of those in `named`."""
    state, seen = {}, {}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            if name not in ("_noted", "training"):
                inside = _contents(value, seen, True) if name in named else id(value)
                state[f"{path}.{name}".removeprefix(".")] = inside
    return state


def _contents(value: Any, seen: dict[int, Any], objects: bool = False) -> Any:
    """A fingerprint of `value` that an in-place change alters; seen: values already visited.

    objects: also look into objects of any class, not only into containers.
    """
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, UninitializedTensorMixin):
        return id(value)
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, (nn.Module, types.FunctionType, type)) or id(value) in seen:
        return id(value)
    seen[id(value)] = value
    inside = functools.partial(_contents, seen=seen, objects=objects)
    if isinstance(value, dict):
        return tuple((inside(key), inside(one)) for key, one in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(map(inside, value))
    if isinstance(value, CONTAINERS):
        return tuple(map(inside, value))
    if not objects:
        return id(value)
    with contextlib.suppress(Exception):
        return pickle.dumps(value)
    return id(value), inside(getattr(value, "__dict__", None))


class _Shared:
    """Variables outside a module that its class and `functions` can access by name."""

    def __init__(self, cls: type, functions: set[types.FunctionType]) -> None:
        self.places: dict[tuple[int, str], tuple[Any, str, Any, Any, Any]] = {}
        for base in cls.__mro__:
            if base is not object and not internal(base.__module__):
                for name in [name for name in vars(base) if not name.startswith("__")]:
                    self.add(base, name)
        for function in functions:
            for name in _names(function.__code__):
                self.add(function.__globals__, name)
            for cell in function.__closure__ or ():
                self.add(cell, "cell_contents")

    def add(self, where: Any, name: str) -> None:
        value = _variable(where, name)
        if value is ABSENT or isinstance(value, (*SIMPLE, list, dict, set)):
            kept = value.copy() if isinstance(value, (list, dict, set)) else None
            self.places[id(where), name] = where, name, value, kept, _contents(value, {})

    def put_back(self) -> list[str]:
        """Restore changed variables; their names."""
        changed = []
        for where, name, value, kept, contents in self.places.values():
            now = _variable(where, name)
            if now is value and _contents(now, {}) == contents:
                continue
            changed.append("a variable of a closure" if name == "cell_contents" else name)
            if isinstance(kept, (dict, set)):
                value.clear()
                value.update(kept)
            elif isinstance(kept, list):
                value[:] = kept
            if now is not value:
                _assign(where, name, value)
        return changed


def _names(code: types.CodeType) -> set[str]:
    """Names that `code` and the functions in it look up."""
    inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _variable(where: Any, name: str) -> Any:
    try:
        return where.get(name, ABSENT) if isinstance(where, dict) else getattr(where, name, ABSENT)
    except ValueError:  # an empty cell
        return ABSENT


def _assign(where: Any, name: str, value: Any) -> None:
    if isinstance(where, dict):
        where.pop(name) if value is ABSENT else where.update({name: value})
    else:
        setattr(where, name, value)


def _generators() -> dict[Any, Any]:
    """The states of the global random generators, by the function that sets each state."""
    states = {random.setstate: random.getstate(), torch.set_rng_state: torch.get_rng_state()}
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        states[numpy.set_state] = numpy.get_state()
    return states


def _drawn(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    """Whether a generator has advanced."""
    return any(
        not torch.equal(state, after[by]) if isinstance(state, Tensor)
        else pickle.dumps(state) != pickle.dumps(after[by])
        for by, state in before.items()
    )  # fmt: skip
