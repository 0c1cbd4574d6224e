"""How good a model is: loss, top-1, top-5, and which class is taken for which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.values import integer
from .checks import check_choice, check_data, check_device, check_logits, check_model
from .distributed import total, world
from .preprocessing import Preprocessing
from .recipe import PRECISIONS


@dataclass(frozen=True)
class Evaluation:
    """Means over the images of a split.

    Attributes:
        loss: cross-entropy, without smoothing.
        accuracy, top5: shares of images whose label is the first, or among the first five.
        confusion: [K,K], images by label (row) and prediction (column).
    """

    loss: float
    accuracy: float
    top5: float
    confusion: Tensor

    def recall(self) -> list[float]:
        """The share of each class's images that were read right; NaN for a class without any."""
        return (self.confusion.diag() / self.confusion.sum(1)).tolist()

    def precision(self) -> list[float]:
        """The share of right ones among the images read as each class; NaN where there are none."""
        return (self.confusion.diag() / self.confusion.sum(0)).tolist()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    precision: str = "fp32",
    split: str = "test",
    workers: int = 0,
) -> Evaluation:
    """`model` on `split` of `data` (`load_data`), shared out among the processes.

    The model runs in eval mode, in its own dtype and memory format, and is left in the mode it
    was in. `precision` is that of autocast.

    Raises:
        ValueError: naming the argument; so for a model that lies on another device, or has not one
            logit a class of the data.
    """
    check_model(model)
    check_data(data)
    device, here = check_device(device), world()
    integer(batch_size, "batch_size", "an integer of at least 1", 1)
    integer(workers, "workers", "an integer of at least 0", 0)
    check_choice(precision, "precision", tuple(PRECISIONS))
    check_choice(split, "split", ("train", "test"))
    classes = data.num_classes
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, among five
    first = next(model.parameters(), sums)
    if first.device != sums.device:
        raise ValueError(f"model: lies on {first.device}, expected device {sums.device}")
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    indices = torch.arange(here.rank, data.count(split), here.size)
    mode = model.training
    model.eval()
    try:
        for x, y in data.batches(split, indices.split(batch_size), device, workers):
            x = as_input(x, data.preprocessing, model)
            with autocast(device, precision):
                logits = model(x)
            check_logits(logits, classes)
            logits = at_least_fp32(logits)
            first = logits.topk(min(5, logits.size(1))).indices
            right = first == y.unsqueeze(1)
            sums += torch.stack([
                F.cross_entropy(logits, y, reduction="sum"), right[:, 0].sum(), right.sum()
            ]).double()  # fmt: skip
            confusion += torch.bincount(y * classes + first[:, 0], minlength=classes * classes)
    finally:
        model.train(mode)
    loss, right, five = (total(sums) / max(data.count(split), 1)).tolist()
    return Evaluation(loss, right, five, total(confusion).view(classes, classes).cpu())


def as_input(x: Tensor, preprocessing: Preprocessing, model: nn.Module) -> Tensor:
    """x normalized, in the dtype and memory format of the model's filters."""
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    x = preprocessing.normalize(x)
    if filters is None:
        return x
    last = filters.is_contiguous(memory_format=torch.channels_last)
    fmt = torch.channels_last if last else torch.contiguous_format
    return x.to(filters.dtype).contiguous(memory_format=fmt)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 where it is: the dtype of a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast in `precision`; for fp32 none."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
