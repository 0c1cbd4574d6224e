"""Checks of the arguments of `fit` and `evaluate`: every message names the argument."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.values import given, integer

MOST_SEED = 2**63
MOST = 10**6  # of epochs, images of a batch, processes
SPLITS = ("train", "test", "all")
DATA = ("classes", "num_classes", "preprocessing", "count", "batches")


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Whether value is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {given(value)}")


def check_seed(value: Any) -> None:
    """Whether value is a seed for PyTorch's generators: a signed 64-bit integer."""
    if not -MOST_SEED <= integer(value, "seed") < MOST_SEED:
        raise ValueError(f"seed: expected a signed 64-bit integer, got {given(value)}")


def check_path(value: Any, name: str) -> None:
    """Whether value is a path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name}: expected a path, got {given(value)}")


def check_device(device: str | torch.device) -> torch.device:
    """`device`, on which this process can create tensors."""
    try:
        if isinstance(device, bool):
            raise TypeError("a bool is not a device")
        where = torch.device(device)
        here = torch.empty(0, device=where).device
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {given(device)} cannot be used here: {why}") from None
    if here.type == "meta":
        raise ValueError("device: expected one that stores values, got 'meta'")
    return where


def check_model(model: nn.Module) -> None:
    """Whether model is a module whose parameters have values."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected an nn.Module, got {given(model)}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: {name} is on the meta device; expected one with values")


def is_data(data: Any) -> bool:
    """Whether data is a data set of `load_data`, by its attributes."""
    return all(hasattr(data, name) for name in DATA)


def check_logits(logits: Any, classes: int, y: Tensor) -> None:
    """Whether a model's output has one column per class, and the targets y are among them."""
    shape = list(logits.shape) if isinstance(logits, Tensor) else given(logits)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(1) != classes:
        raise ValueError(
            f"model: expected logits [N, {classes or 'classes'}], one column per class of the "
            f"data, got {shape}"
        )
    if y.dim() == 2 and y.size(1) != classes:
        raise ValueError(f"data: expected targets of {classes} classes, got {y.size(1)}")
    if y.dim() == 1 and y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"data: expected targets from 0 to {classes - 1}, one per column of the logits, got "
            f"{int(y.min())} to {int(y.max())}"
        )
