"""Loss, top-1 and top-5 accuracy and confusion matrix of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.values import integer
from .augment import centre_crop
from .checks import (
    MOST,
    SPLITS,
    check_choice,
    check_data,
    check_device,
    check_logits,
    check_model,
)  # fmt: skip
from .distributed import total, world
from .preprocessing import Preprocessing
from .recipe import PRECISIONS


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on one split, over all its images that can be read.

    Attributes:
        loss: mean cross-entropy, without label smoothing.
        accuracy: top-1 accuracy, from 0 to 1.
        top5: top-5 accuracy, from 0 to 1; always 1 with at most five classes.
        confusion: [K,K] int64 on the CPU, number of images by label (row) and prediction (column).
    """

    loss: float
    accuracy: float
    top5: float
    confusion: Tensor

    def recall(self) -> list[float]:
        """Per class, the share of its images predicted correctly; NaN if it has no images."""
        return (self.confusion.diag() / self.confusion.sum(1)).tolist()

    def precision(self) -> list[float]:
        """Per class, the share of its predictions that are correct; NaN if never predicted."""
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
    """Evaluate `model` on one split of `data`.

    The model runs in eval mode without gradients, in its own dtype and memory format; its mode is
    restored. With several processes each evaluates a share of the images, and every process must
    call this function.

    Args:
        model: maps images [N, data.channels, data.size, data.size] to logits
            [N, data.num_classes]; on `device`.
        data: from `load_data`.
        device: device to run on.
        batch_size: images per forward pass and process.
        precision: "fp32", or autocast in "bf16" or "fp16".
        split: "test", "train", or "all" for both.
        workers: processes that read the images of an imagefolder; 0 reads them in this one.

    Returns:
        The figures over the images of all processes.

    Raises:
        ValueError: an argument is invalid, the model is on another device, or its logits do not
            match the classes of the data; the message names the argument.
    """
    check_model(model)
    check_data(data)
    device, here = check_device(device), world()
    integer(batch_size, "batch_size", "an integer of at least 1", 1, MOST)
    integer(workers, "workers", "an integer of at least 0", 0, MOST)
    check_choice(precision, "precision", tuple(PRECISIONS))
    check_choice(split, "split", SPLITS)
    classes = data.num_classes
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, among five
    first = next(model.parameters(), sums)
    if first.device != sums.device:
        raise ValueError(f"model: expected parameters on {sums.device}, got {first.device}")
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    indices = torch.arange(here.rank, data.count(split), here.size)
    mode = model.training
    model.eval()
    try:
        for x, y in data.batches(split, indices.split(batch_size), device, workers):
            if not len(x):
                continue  # no image of the batch can be read
            x = as_input(centre_crop(x, data.preprocessing.size), data.preprocessing, model)
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
    confusion = total(confusion)
    if data.count(split) and not confusion.any():
        why = next(iter(getattr(data, "unreadable", {}).values()), "")
        raise ValueError(f"data: no image can be read; the first: {why}")
    loss, right, five = (total(sums) / confusion.sum().clamp(min=1)).tolist()
    return Evaluation(loss, right, five, confusion.view(classes, classes).cpu())


def as_input(x: Tensor, preprocessing: Preprocessing, model: nn.Module) -> Tensor:
    """x normalized, in the dtype and memory format of the model's first filters."""
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    x = preprocessing.normalize(x)
    if filters is None:
        return x
    last = filters.is_contiguous(memory_format=torch.channels_last)
    fmt = torch.channels_last if last else torch.contiguous_format
    return x.to(filters.dtype).contiguous(memory_format=fmt)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if x is: the dtype of the loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast in `precision`; disabled for fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
