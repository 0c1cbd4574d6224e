"""Loss, top-1 and top-5 accuracy and confusion matrix of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec.values import given, integer
from .augment import centre_crop
from .batches import check_loader, checked
from .checks import (
    MOST,
    SPLITS,
    check_choice,
    check_device,
    check_logits,
    check_model,
    is_data,
)  # fmt: skip
from .distributed import total, world
from .preprocessing import Preprocessing
from .recipe import PRECISIONS

Loss = Callable[[Tensor, Tensor], Tensor]


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
    loss: Loss | None = None,
) -> Evaluation:
    """Evaluate `model` on one split of `data`, or on the batches of a `DataLoader`.

    The model runs in eval mode without gradients, in its own dtype and memory format; the modes of
    its modules are restored. With several processes each evaluates a share of the images (of a
    loader: its own batches), and every process must call this function.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes]; on `device`.
        data: from `load_data`, or an iterable of batches as in `fit`.
        device: device to run on.
        batch_size: images of `load_data` per forward pass and process.
        precision: "fp32", or autocast in "bf16" or "fp16".
        split: of `load_data`: "test", "train", or "all" for both.
        workers: processes that read the images of an imagefolder; 0 reads them in this one.
        loss: maps logits and targets to the mean loss of a batch; None is cross-entropy.

    Returns:
        The figures over the images of all processes.

    Raises:
        ValueError: an argument is invalid, the model is on another device, or its logits do not
            match the classes of the data; the message names the argument.
    """
    check_model(model)
    own = is_data(data)
    if not own:
        check_loader(data, "data")
    device = check_device(device)
    integer(batch_size, "batch_size", "an integer of at least 1", 1, MOST)
    integer(workers, "workers", "an integer of at least 0", 0, MOST)
    check_choice(precision, "precision", tuple(PRECISIONS))
    check_choice(split, "split", SPLITS)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, among five
    first = next(model.parameters(), sums)
    if first.device != sums.device:
        raise ValueError(f"model: expected parameters on {sums.device}, got {first.device}")
    confusion = None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for x, y in _inputs(model, data, split, batch_size, device, workers):
            with autocast(device, precision):
                logits = model(x)
            classes = data.num_classes if own else _columns(logits, confusion)
            if confusion is None:
                confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
            check_logits(logits, classes, y)
            logits, labels = at_least_fp32(logits), hard(y)
            top = logits.topk(min(5, logits.size(1))).indices
            right = top == labels.unsqueeze(1)
            mean = mean_loss(loss, logits, y)
            sums += torch.stack([mean * len(y), right[:, 0].sum(), right.sum()]).double()
            confusion += torch.bincount(labels * classes + top[:, 0], minlength=len(confusion))
    finally:
        for module, training in modes:
            module.training = training
    if confusion is None:
        confusion = torch.zeros((data.num_classes if own else 1) ** 2, dtype=torch.int64,
                                device=device)  # fmt: skip
    confusion = total(confusion)
    if not confusion.any() and (not own or data.count(split)):
        why = next(iter(getattr(data, "unreadable", {}).values()), "")
        raise ValueError(f"data: no image can be read; the first: {why}" if own else
                         "data: expected batches to test on, got none")  # fmt: skip
    found, right, five = (total(sums) / confusion.sum().clamp(min=1)).tolist()
    classes = math.isqrt(len(confusion))
    return Evaluation(found, right, five, confusion.view(classes, classes).cpu())


def _inputs(
    model: nn.Module, data: Any, split: str, batch_size: int, device: torch.device, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of `model` and targets, for each batch of this process."""
    if not is_data(data):
        for batch in data:
            x, y = checked(batch, "data", device)
            yield as_input(x, None, model), y
        return
    here = world()
    indices = torch.arange(here.rank, data.count(split), here.size)
    for x, y in data.batches(split, indices.split(batch_size), device, workers):
        if len(x):  # else no image of the batch can be read
            x = centre_crop(x, data.preprocessing.size)
            yield as_input(x, data.preprocessing, model), y


def _columns(logits: Any, confusion: Tensor | None) -> int:
    """Number of classes: as in the first batch."""
    if confusion is not None:
        return math.isqrt(len(confusion))
    return logits.size(1) if isinstance(logits, Tensor) and logits.dim() == 2 else 0


def hard(y: Tensor) -> Tensor:
    """Labels [N]: of probabilities [N, classes] the most probable."""
    return y.argmax(1) if y.is_floating_point() else y


def mean_loss(loss: Loss | None, logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`loss` of a batch, a tensor of no dimension; None is cross-entropy."""
    if loss is None:
        return F.cross_entropy(logits, y, label_smoothing=label_smoothing)
    value = loss(logits, y)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = list(value.shape) if isinstance(value, Tensor) else given(value)
        raise ValueError(f"loss: expected the mean over the batch, one number, got {got}")
    return value.reshape(())


def as_input(x: Tensor, preprocessing: Preprocessing | None, model: nn.Module) -> Tensor:
    """x, normalized by `preprocessing`, in the dtype and memory format of the first filters."""
    filters = next((p for p in model.parameters() if p.ndim == 4), None)
    x = x if preprocessing is None else preprocessing.normalize(x)
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
