"""Checks of plain values: every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether value is a finite real number, one of NumPy's too; a bool is not a number here."""
    real = isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)
    return real and -math.inf < value < math.inf


def given(value: Any) -> str:
    """How an error shows a wrong value: the value where it is short, else its type."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def check_pair(name: str, value: Any, least: int) -> None:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise ValueError(f"{name}: expected two integers, got {given(value)}")
    if min(value) < least:
        raise ValueError(f"{name}: expected at least {least}, got {given(value)}")


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """value or (value, value), as PyTorch's convolutions and pools take it."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value  # at once: a net in inference asks for every convolution
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * 2 if len(values) == 1 else values
    expected = "an integer or two of them"
    if len(values) != 2:
        raise ValueError(f"{name}: expected {expected}, got {given(value)}")
    return integer(values[0], name, expected), integer(values[1], name, expected)


def integer(value: Any, name: str, expected: str = "an integer", least: int | None = None) -> int:
    """value as an int, no less than `least`; a bool is not an integer, as in PyTorch."""
    whole = value
    if not isinstance(value, (int, bool)):
        try:
            whole = operator.index(value)  # NumPy's integers too
        except TypeError:
            whole = True
    if isinstance(whole, bool) or (least is not None and whole < least):
        raise ValueError(f"{name}: expected {expected}, got {given(value)}")
    return whole


def check_flag(value: Any, name: str) -> None:
    """Whether value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {given(value)}")


def check_list(value: Any, name: str) -> None:
    """Whether value is a list or a tuple."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list, got {given(value)}")


def check_callable(value: Any, name: str) -> None:
    """Whether value is None or can be called."""
    if value is not None and not callable(value):
        raise ValueError(f"{name}: expected a callable or None, got {given(value)}")


def check_number(value: Any, name: str) -> None:
    """Whether value is a finite number."""
    if not is_number(value):
        raise ValueError(f"{name}: expected a finite number, got {given(value)}")


def check_tensor(value: Any, name: str) -> None:
    """Whether value is a dense tensor, or stands for a tensor as the proxies of `torch.fx` do."""
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
