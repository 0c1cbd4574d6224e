"""Checks of plain values; every message names the argument, what was expected, what was given."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CONTROL = ("Cc", "Cs", "Zl", "Zp")  # categories of characters
BIDI = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # change the order


class _Brief(reprlib.Repr):
    """repr of a bounded part of a container; a value from a file may refer to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 20
        self.maxstring = self.maxlong = self.maxother = 1000  # longer than any that is shown

    def repr_instance(self, x: Any, level: int) -> str:
        inside = isinstance(x, (list, tuple, dict, set, frozenset))  # a subclass of one
        return f"{type(x).__name__}(…)" if inside else super().repr_instance(x, level)


_brief = _Brief()


def is_number(value: Any) -> bool:
    """Whether value is a finite real number (NumPy's included, bool excluded)."""
    real = isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf


def given(value: Any) -> str:
    """Text of a value for an error: the value if it is short, else its type.

    Its cost is bounded, because the value may come from a file.
    """
    try:
        text = _brief.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = ""
    short = 0 < len(text) <= 60 and not {"\n", "…"} & set(text)
    return text if short else f"a {type(value).__name__}"


def brief(text: str) -> str:
    """A name from a file for an error: printable, and at most 60 characters of it."""
    return printable(text if len(text) <= 60 else f"{text[:59]}…")


def printable(text: str) -> str:
    """text with its control characters as escapes, so that it cannot command a terminal."""
    return "".join(c.encode("unicode_escape").decode() if _commands(c) else c for c in text)


def _commands(character: str) -> bool:
    return character in BIDI or unicodedata.category(character) in CONTROL


def check_pair(name: str, value: Any, least: int) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise ValueError(f"{name}: expected two integers, got {given(value)}")
    if min(value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {given(value)}")


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """value or (value, value), as in PyTorch's convolutions and pools."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # fast path: inference runs this for every convolution
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * 2 if len(values) == 1 else values
    expected = "an integer or two integers"
    if len(values) != 2:
        raise ValueError(f"{name}: expected {expected}, got {given(value)}")
    return integer(values[0], name, expected), integer(values[1], name, expected)


def integer(
    value: Any,
    name: str,
    expected: str = "an integer",
    least: int | None = None,
    most: int | None = None,
) -> int:
    """value as an int from `least` to `most`; a bool is refused, as in PyTorch."""
    whole = value
    if not isinstance(value, (int, bool)):
        try:
            whole = operator.index(value)  # NumPy's integers too
        except TypeError:
            whole = True
    if isinstance(whole, bool) or (least is not None and whole < least):
        raise ValueError(f"{name}: expected {expected}, got {given(value)}")
    if most is not None and whole > most:
        raise ValueError(f"{name}: expected at most {most}, got {given(value)}")
    return whole


def check_flag(value: Any, name: str) -> None:
    """Check that value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {given(value)}")


def check_list(value: Any, name: str) -> None:
    """Check that value is a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list, got {given(value)}")


def check_callable(value: Any, name: str) -> None:
    """Check that value is callable or None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}: expected a callable or None, got {given(value)}")


def check_number(value: Any, name: str) -> None:
    """Check that value is a finite number."""
    if not is_number(value):
        raise ValueError(f"{name}: expected a finite number, got {given(value)}")


def check_tensor(value: Any, name: str) -> None:
    """Check that value is a dense tensor, or a stand-in such as a `torch.fx` proxy."""
    if not isinstance(value, Tensor):
        if not hasattr(value, "__torch_function__"):
            raise ValueError(f"{name}: expected a torch.Tensor, got {given(value)}")
    elif value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a strided (dense) tensor, got {value.layout}")


def check_tensors(**values: Any) -> None:
    """`check_tensor` of each value that is not None."""
    for name, value in values.items():
        if value is not None:
            check_tensor(value, name)
