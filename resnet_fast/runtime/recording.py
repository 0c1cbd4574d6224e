"""A function of tensors as a list of recorded steps that can be replayed on other tensors.

`record` runs a function and records its device work: allocations, calls of PyTorch and kernel
launches. A tensor is identified by its place: an argument, or the result of an earlier step. The
steps can then be replayed with other arguments, without the function, its checks and its choice of
kernels. For small tensors these take the host longer than the launches take the device. The caller
must guarantee that the function would run the same steps (`dispatch.replay`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
MEMORY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
Step = Callable[[list[Any]], None]
"""Reads tensors from their places, and writes its results to their places."""


class _Place(int):
    """Index of a tensor in a program."""


class _Descriptor(NamedTuple):
    """A descriptor of the tensor at a place."""

    kind: type
    fields: dict[str, Any]
    place: _Place


class _Current(threading.local):
    recorder: _Recorder | None = None


_current = _Current()


class Program:
    """The steps of a recorded function, and the places of its results."""

    def __init__(self, steps: Sequence[tuple[Step, list[int]]], places: int, result: Any) -> None:
        self._steps, self._places, self._result = steps, places, result

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        """Return the results of the function for these arguments."""
        env = [*tensors, *(None,) * (self._places - len(tensors))]
        for step, last_used in self._steps:
            step(env)
            for place in last_used:
                env[place] = None
        return _filled(self._result, env)


def record(
    run: Callable[..., Any],
    fixed: Sequence[Any],
    tensors: Sequence[Tensor | None],
    inline: Mapping[Any, Callable],
) -> tuple[Any, Program | None]:
    """Return run(*fixed, *tensors), and its program or None if it cannot be recorded.

    It cannot be recorded if it reads a value, uses a tensor that is neither an argument nor the
    result of a step, or gets one tensor as two arguments. inline: ops to record as their own steps,
    with the function that runs each.
    """
    recorder = _Recorder(tensors, inline)
    _current.recorder = recorder
    try:
        with recorder:
            result = run(*fixed, *tensors)
    finally:
        _current.recorder = None
    return result, recorder.program(result)


def launched(start: Callable[[], Callable[..., None]], args: Sequence[Any]) -> None:
    """Run the launch start() on `args`. It returns a function of `args` that a program calls.

    args: numbers, tensors, and descriptors of tensors (objects with a tensor `base`).
    """
    if _current.recorder is None:
        start()
        return
    with _disable_current_modes():
        again = start()
    _current.recorder.add_launch(again, args)


def step(run: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run run(*args) as one step of a program, whatever tensors it allocates inside."""
    if _current.recorder is None:
        return run(*args)
    with _disable_current_modes():
        result = run(*args)
    return _current.recorder.add_call(run, args, result)


class _Recorder(TorchDispatchMode):
    def __init__(self, tensors: Sequence[Tensor | None], inline: Mapping[Any, Callable]) -> None:
        super().__init__()
        self._inline = inline
        self._place = WeakIdKeyDictionary({t: i for i, t in enumerate(tensors) if t is not None})
        self._places = len(tensors)
        self._steps: list[tuple[Step, list[int]]] = []  # with the places of its operands
        self._fits = len(self._place) == sum(t is not None for t in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._inline:
            with self:
                return self._inline[func](*args, **kwargs)
        result = func(*args, **kwargs)
        if func in MEMORY:
            return self._add_memory(result)
        return self.add_call(func, args, result, kwargs)

    def add_launch(self, start: Callable[..., None], args: Sequence[Any]) -> None:
        operands = self._placed(list(args))
        fill = _filling(operands)

        def step(env: list[Any]) -> None:
            start(*fill(env))

        self._steps.append((step, _places(operands)))

    def _add_memory(self, t: Tensor) -> Tensor:
        place, size, stride = self._put(t), t.size(), t.stride()
        options = {"dtype": t.dtype, "device": t.device}

        def step(env: list[Any]) -> None:
            env[place] = torch.empty_strided(size, stride, **options)

        self._steps.append((step, [place]))
        return t

    def add_call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        result: Any,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record func(*args, **kwargs), whose result is `result`; return `result`."""
        operands, options = self._placed((list(args), dict(kwargs or {})))
        several = isinstance(result, (tuple, list))
        results = list(result) if several else [result]
        if _places(options) or not all(isinstance(t, Tensor) or t is None for t in results):
            self._fits = False  # a tensor is a keyword argument, or a value is read
            return result
        same = isinstance(result, Tensor) and result in self._place
        if same and not _mutates(func):
            return result  # an unchanged operand
        places = [None if t is None else self._put(t) for t in results]
        used = [place for place in places if place is not None]
        fill = _filling(operands)

        def step(env: list[Any]) -> None:
            given = func(*fill(env), **options)
            for place, t in zip(places, given if several else (given,), strict=True):
                if place is not None:
                    env[place] = t

        self._steps.append((step, [*_places(operands), *used]))
        return result

    def _put(self, t: Tensor) -> int:
        """The place of a result: a new one, unless the result is an operand."""
        if t not in self._place:
            self._place[t] = self._places
            self._places += 1
        return self._place[t]

    def _placed(self, value: Any) -> Any:
        """`value` with places instead of tensors."""
        if isinstance(value, Tensor):
            place = self._place.get(value)
            self._fits = self._fits and place is not None
            return _Place(place or 0)
        if isinstance(getattr(value, "base", None), Tensor):
            fields = {name: v for name, v in vars(value).items() if name != "base"}
            return _Descriptor(type(value), fields, self._placed(value.base))
        return _mapped(self._placed, value)

    def program(self, result: Any) -> Program | None:
        result = self._placed(result)
        if not self._fits:
            return None
        seen, steps = set(_places(result)), []
        for step, places in reversed(self._steps):
            last_used = set(places) - seen
            seen |= last_used
            steps.append((step, sorted(last_used)))
        return Program(steps[::-1], self._places, result)


def _mutates(func: Callable[..., Any]) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is None or schema.is_mutable


def _mapped(f: Callable[[Any], Any], value: Any) -> Any:
    """`value` with f applied to the items of its tuples, lists and dictionaries."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(f, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(f, value))
    if isinstance(value, dict):
        return {key: f(v) for key, v in value.items()}
    return value


def _filled(value: Any, env: list[Any]) -> Any:
    """`value` with tensors instead of places."""
    if type(value) is _Place:
        return env[value]
    if type(value) is _Descriptor:
        descriptor = object.__new__(value.kind)  # its fields were checked when recorded
        vars(descriptor).update(value.fields, base=env[value.place])
        return descriptor
    return _mapped(lambda v: _filled(v, env), value)


def _filling(operands: list[Any]) -> Callable[[list[Any]], list[Any]]:
    """A function that returns `_filled` of these operands, quickly."""
    tensors = [(i, v) for i, v in enumerate(operands) if type(v) is _Place]
    others = [(i, v) for i, v in enumerate(operands) if type(v) is not _Place and _places(v)]

    def fill(env: list[Any]) -> list[Any]:
        values = operands.copy()
        for i, place in tensors:
            values[i] = env[place]
        for i, value in others:
            values[i] = _filled(value, env)
        return values

    return fill


def _places(value: Any) -> list[int]:
    if type(value) is _Place:
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [p for v in value for p in _places(v)] if isinstance(value, (tuple, list)) else []
