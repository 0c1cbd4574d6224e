"""A function of tensors as a list of recorded steps that can be replayed on other tensors.

`record` runs a function and records its device work: allocations, calls of PyTorch and kernel
launches. A tensor is identified by its place: an argument, or the result of an earlier step. The
steps can then be replayed with other arguments, without the function, its checks and its choice of
kernels. For small tensors these take the host longer than the launches take the device. If every
step calls an operator, the native extension replays them without Python in between. The caller must
guarantee that the function would run the same steps (`dispatch.replay`).
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
MEMORY = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
Step = Callable[[list[Any]], None]
"""Reads tensors from their places, and writes its results to their places."""
Reader = Callable[[list[Any]], Any]
"""Reads tensors from their places, and returns them in a structure."""


class _Current(threading.local):
    recorder: _Recorder | None = None


_current = _Current()


class Program:
    """The steps of a recorded function, and how its results are read.

    An environment has the arguments, then a slot for each other place: a result of a step, or a
    constant operand, so that `itemgetter` reads all operands of a step at once.
    """

    def __init__(
        self, steps: Sequence[tuple[Step, list[int]]], slots: list[Any], result: Reader
    ) -> None:
        self._steps, self._slots, self._result = steps, slots, result

    def __call__(self, tensors: Sequence[Tensor | None]) -> Any:
        """Return the results of the function for these arguments."""
        env = [*tensors, *self._slots]
        for step, last_used in self._steps:
            step(env)
            for place in last_used:
                env[place] = None
        return self._result(env)


def record(
    run: Callable[..., Any],
    fixed: Sequence[Any],
    tensors: Sequence[Tensor | None],
    inline: Mapping[Any, Callable],
    native: Any = None,
) -> tuple[Any, Program | None]:
    """Return run(*fixed, *tensors), and its program or None if it cannot be recorded.

    It cannot be recorded if it reads a value, uses a tensor that is neither an argument nor the
    result of a step, or gets one tensor as two arguments. inline: ops to record as their own steps,
    with the function that runs each. native: the extension (csrc/program.cpp), or None.
    """
    recorder = _Recorder(tensors, inline, native)
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


class _Recorded(NamedTuple):
    """A step; the places that it reads or writes; whether it runs even if no later step reads
    them; and the arguments of `native.Program.add`, but the last, if it calls an operator.
    """

    run: Step
    used: list[int]
    needed: bool
    call: tuple[Any, ...] | None


class _Recorder(TorchDispatchMode):
    def __init__(
        self, tensors: Sequence[Tensor | None], inline: Mapping[Any, Callable], native: Any
    ) -> None:
        super().__init__()
        self._inline, self._native = inline, native
        self._place = WeakIdKeyDictionary({t: i for i, t in enumerate(tensors) if t is not None})
        self._arguments, self._slots = len(tensors), []
        self._steps: list[_Recorded] = []
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
        operands, read = self._reader(tuple(args))

        def step(env: list[Any]) -> None:
            start(*read(env))

        self._steps.append(_Recorded(step, operands, True, None))

    def _add_memory(self, t: Tensor) -> Tensor:
        place, sizes = self._put(t), (t.size(), t.stride())
        options = {"dtype": t.dtype, "device": t.device}
        make = functools.partial(torch.empty_strided, *sizes, **options)

        def step(env: list[Any]) -> None:
            env[place] = make()

        call = self._call(aten.empty_strided.default, sizes, options, [place])
        self._steps.append(_Recorded(step, [place], False, call))
        return t

    def add_call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        result: Any,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Record func(*args, **kwargs), whose result is `result`; return `result`."""
        (operands, read), options = self._reader(tuple(args)), dict(kwargs or {})
        several = isinstance(result, (tuple, list))
        results = list(result) if several else [result]
        named, _ = self._reader(options)
        if named or not all(isinstance(t, Tensor) or t is None for t in results):
            self._fits = False  # a tensor is a keyword argument, or a value is read
            return result
        same = isinstance(result, Tensor) and result in self._place
        if same and not _mutates(func):
            return result  # an unchanged operand
        places = [None if t is None else self._put(t) for t in results]
        used = [place for place in places if place is not None]

        def step(env: list[Any]) -> None:
            given = func(*read(env), **options)
            for place, t in zip(places, given if several else (given,), strict=True):
                if place is not None:
                    env[place] = t

        call = self._call(func, args, options, places)
        self._steps.append(_Recorded(step, [*operands, *used], True, call))
        return result

    def _call(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        options: Mapping[str, Any],
        results: Sequence[int | None],
    ) -> tuple[Any, ...] | None:
        if self._native is None or not isinstance(func, OpOverload):
            return None

        def operand(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._native.Place(self._place.get(value, 0))  # `_reader` refuses strangers
            return list(map(operand, value)) if isinstance(value, (tuple, list)) else value

        schema = func._schema
        return schema.name, schema.overload_name, tuple(map(operand, args)), options, results

    def _put(self, t: Tensor) -> int:
        """The place of a result: a new one, unless the result is an operand."""
        if t not in self._place:
            self._place[t] = self._slot()
        return self._place[t]

    def _slot(self, constant: Any = None) -> int:
        """A new place, which holds `constant` when a program starts."""
        self._slots.append(constant)
        return self._arguments + len(self._slots) - 1

    def _reader(self, value: Any) -> tuple[list[int], Reader]:
        """The places that the reader of `value` uses, and that reader.

        value: tensors, descriptors of tensors, constants, and tuples, lists and dictionaries of
        these.
        """
        if isinstance(value, Tensor):
            place = self._place.get(value)
            self._fits = self._fits and place is not None
            return [place or 0], operator.itemgetter(place or 0)
        if isinstance(getattr(value, "base", None), Tensor):
            return self._described(value)
        if isinstance(value, dict):
            names, (places, read) = tuple(value), self._reader(tuple(value.values()))
            return places, lambda env: dict(zip(names, read(env), strict=True))
        if isinstance(value, (tuple, list)):
            return self._several(value)
        return [], lambda env: value

    def _described(self, value: Any) -> tuple[list[int], Reader]:
        kind, fields = type(value), {name: v for name, v in vars(value).items() if name != "base"}
        places, base = self._reader(value.base)

        def read(env: list[Any]) -> Any:
            descriptor = object.__new__(kind)  # its fields were checked when recorded
            vars(descriptor).update(fields, base=base(env))
            return descriptor

        return places, read

    def _several(self, values: Sequence[Any]) -> tuple[list[int], Reader]:
        """Every item is read from a place, by one call; constants and parts are put there."""
        make = getattr(type(values), "_make", type(values))
        places, from_places, parts = [], [], []
        for value in values:
            used, read = self._reader(value)
            places += used
            if isinstance(value, Tensor):
                from_places += used
                continue
            slot = self._slot(None if used else read([]))
            from_places.append(slot)
            if used:
                parts.append((slot, read))
                places.append(slot)
        if not places:
            fixed = make(values)
            return [], lambda env: fixed
        get = operator.itemgetter(*from_places)

        def read_all(env: list[Any]) -> Any:
            for slot, read in parts:
                env[slot] = read(env)
            found = get(env)
            return make(found if len(from_places) > 1 else (found,))

        return places, read_all

    def program(self, result: Any) -> Program | None:
        """The steps, without memory that no other uses; None if they do not fit other tensors."""
        places, read = self._reader(result)
        if not self._fits:
            return None
        seen, steps = set(places), []
        for step in reversed(self._steps):
            if step.needed or not seen.isdisjoint(step.used):
                steps.append((step, sorted(set(step.used) - seen)))
                seen |= set(step.used)
        steps.reverse()
        if self._native is not None and all(step.call is not None for step, _ in steps):
            return Program([(self._at_once(steps, places), [])], self._slots, read)
        return Program([(step.run, last_used) for step, last_used in steps], self._slots, read)

    def _at_once(self, steps: Sequence[tuple[_Recorded, list[int]]], places: list[int]) -> Step:
        """All steps as one, in the native extension; `places`: those of the results."""
        count, wanted = self._arguments, sorted(set(places))
        program = self._native.Program(count + len(self._slots))
        for step, last_used in steps:
            program.add(*step.call, last_used)

        def step(env: list[Any]) -> None:
            for place, t in zip(wanted, program(env[:count], wanted), strict=True):
                env[place] = t

        return step


def _mutates(func: Callable[..., Any]) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is None or schema.is_mutable
