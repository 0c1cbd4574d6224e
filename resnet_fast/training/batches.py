"""Batches that a `DataLoader`, or any other iterable, makes: (images, targets)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from ..spec.values import given

EXPECTED = (
    "batches (images, targets): images [N, C, H, W] in floating point, normalized; targets [N] in "
    "integers, or [N, classes] probabilities"
)


def check_loader(loader: Any, name: str, again: bool = False) -> None:
    """Whether `loader` can be iterated, and `again` in every epoch."""
    if not isinstance(loader, Iterable) or isinstance(loader, (str, bytes, dict, Tensor)):
        raise ValueError(
            f"{name}: expected a data set of load_data, or an iterable of {EXPECTED}; got "
            f"{given(loader)}"
        )
    if again and isinstance(loader, Iterator):
        raise ValueError(
            f"{name}: expected an iterable that starts again in every epoch, got an iterator "
            f"({given(loader)}); pass the object that makes it"
        )


def length(loader: Any) -> int | None:
    """Number of batches, if `loader` tells it: some say so only when asked."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset without a length
        return None


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to a loader, its sampler or its data set, where they have `set_epoch`."""
    for one in (loader, *(getattr(loader, part, None) for part in
                          ("sampler", "batch_sampler", "dataset"))):  # fmt: skip
        if callable(getattr(one, "set_epoch", None)):
            one.set_epoch(epoch)


def checked(batch: Any, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and targets of a batch on `device`; ValueError if they are none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(f"{name}: expected {EXPECTED}; got {given(batch)}")
    x, y = batch
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or not len(x):
        got = f"{list(x.shape)} in {x.dtype}" if isinstance(x, Tensor) else given(x)
        raise ValueError(f"{name}: expected {EXPECTED}; got images {got}")
    if not isinstance(y, Tensor):
        raise ValueError(f"{name}: expected {EXPECTED}; got targets {given(y)}")
    dims = 2 if y.is_floating_point() else 1
    if y.dim() != dims or len(y) != len(x) or y.dtype == torch.bool:
        got = f"{list(y.shape)} in {y.dtype} for {len(x)} images"
        raise ValueError(f"{name}: expected {EXPECTED}; got targets {got}")
    y = y if dims == 2 else y.long()
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)
