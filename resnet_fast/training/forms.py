"""Compare values from a file with values of this process, which bound the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec.values import given
from .torch_file import CheckpointError

MOST_INT = 2**63


def is_dense(value: Any) -> bool:
    """Whether value is a tensor of plain numbers in memory: not sparse, nested, quantized, meta."""
    if not isinstance(value, Tensor) or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return value.layout is torch.strided


def equal(there: Any, here: Any) -> bool:
    """Whether a value of a file equals the plain value `here`, types included."""
    if type(there) is not type(here):
        return False
    if isinstance(here, dict):
        return there.keys() == here.keys() and all(equal(there[key], here[key]) for key in here)
    if isinstance(here, (list, tuple)):
        return len(there) == len(here) and all(map(equal, there, here))
    return bool(there == here)


def check_like(value: Any, like: Any, where: str) -> None:
    """Whether a value of a file has the form of `like`: types, keys, lengths, shapes and dtypes.

    Raises:
        CheckpointError: it differs; the message begins with `where`.
    """
    if isinstance(like, Tensor):
        expected = f"{list(like.shape)} in {like.dtype}"
        if not is_dense(value) or (value.shape, value.dtype) != (like.shape, like.dtype):
            if is_dense(value):
                got = f"{list(value.shape)} in {value.dtype}"
            else:
                got = "one that is not dense" if isinstance(value, Tensor) else given(value)
            raise CheckpointError(f"{where}: expected a tensor {expected}, got {got}")
    elif isinstance(like, dict):
        check_keys(value, like, where)
        for key in like:
            check_like(value[key], like[key], f"{where}: {key}")
    elif isinstance(like, (list, tuple)):
        check_list(value, len(like), where)
        for part, wanted in zip(value, like, strict=True):
            check_like(part, wanted, where)
    elif isinstance(like, bool) or like is None or isinstance(like, str):
        if type(value) is not type(like):
            raise CheckpointError(f"{where}: expected a value like {like!r}, got {given(value)}")
    else:
        check_number(value, where, whole=isinstance(like, int))


def check_keys(value: Any, keys: Any, where: str) -> None:
    """Whether value is a dict of these keys."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a dict, got {given(value)}")
    odd = [key for key in keys if key not in value] or [key for key in value if key not in keys]
    if odd:
        what = "has no" if odd[0] not in value else "has an unknown"
        raise CheckpointError(f"{where}: {what} {given(odd[0])}")


def check_list(value: Any, count: int, where: str) -> None:
    """Whether value is a list or tuple of `count` values."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else given(value)
        raise CheckpointError(f"{where}: expected a list of {count} values, got {got}")


def check_number(
    value: Any, where: str, whole: bool = False, least: int = -MOST_INT, most: int = MOST_INT
) -> None:
    """Whether value is a number, `whole` an integer from `least` to `most`."""
    if type(value) not in ((int,) if whole else (int, float)):
        kind = "an integer" if whole else "a number"
        raise CheckpointError(f"{where}: expected {kind}, got {given(value)}")
    if type(value) is int and not least <= value <= most:
        raise CheckpointError(f"{where}: expected {least} to {most}, got {given(value)}")
