"""`Recipe`: the hyperparameters of training, and their optimizer and schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..spec.dtypes import PRECISIONS
from ..spec.values import check_flag, given, integer, is_number
from .augment import AUGMENTATIONS
from .checks import MOST, check_choice, check_seed

SCHEDULES = ("cosine", "step", "constant")
MILESTONES = (0.5, 0.75)
FLAGS = (
    "nesterov", "decay_norms", "channels_last", "compile", "checkpointing", "sync_bn",
    "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training: with model and data they determine the result.

    Attributes:
        epochs: passes over the training images. Images are shuffled in each; the incomplete last
            batch is left out.
        batch_size: images per optimizer step, over all processes and all parts of `accumulate`.
        lr: learning rate after the warm-up.
        momentum: as `torch.optim.SGD`.
        nesterov: as `torch.optim.SGD`.
        weight_decay: as `torch.optim.SGD`.
        decay_norms: apply weight decay to normalizations and biases too.
        schedule: "cosine" to 0 (arXiv:1608.03983), "step" (a factor of 0.1 after 1/2 and after 3/4
            of all epochs, as He et al. 2015), or "constant".
        warmup: epochs in which the learning rate rises linearly to `lr` (arXiv:1706.02677).
        label_smoothing: as `nn.CrossEntropyLoss`, in training only.
        ema: decay of an exponential moving average of parameters and buffers, or None. The average
            is what is tested and saved.
        clip: maximum norm of all gradients together, or None.
        accumulate: parts of each process's batch, with one backward pass each before the optimizer
            step. Batch statistics are those of a part.
        augment: "none", "crop", "crop-flip", "resized-crop-flip", or "auto": the data set's own.
        precision: "fp32", or autocast in "bf16" or "fp16" (with a gradient scaler).
        channels_last: channels_last memory format for model and images.
        compile: run the model with `torch.compile`.
        checkpointing: activation checkpointing: store only the inputs of residual blocks, and run
            the blocks again in the backward pass.
        sync_bn: batch statistics over all processes.
        deterministic: raise an error for nondeterministic operations
            (`torch.use_deterministic_algorithms`).
        seed: of image order and augmentation.

    Raises:
        ValueError: an attribute is invalid; the message names it.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    schedule: str = "cosine"
    warmup: float = 1.0
    label_smoothing: float = 0.0
    ema: float | None = None
    clip: float | None = None
    accumulate: int = 1
    augment: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    checkpointing: bool = False
    sync_bn: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            integer(getattr(self, name), name, "an integer of at least 1", 1, MOST)
        check_seed(self.seed)
        for name in ("lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            _expect(name, value, "a number of at least 0", is_number(value) and value >= 0)
        for name in ("momentum", "label_smoothing", "ema"):
            value = getattr(self, name)
            allowed = value is None and name == "ema"
            _expect(name, value, "a number from 0 to less than 1",
                    allowed or (is_number(value) and 0 <= value < 1))  # fmt: skip
        _expect("clip", self.clip, "a number above 0 or None",
                self.clip is None or (is_number(self.clip) and self.clip > 0))  # fmt: skip
        _expect("warmup", self.warmup, f"at most epochs ({self.epochs})",
                self.warmup <= self.epochs)  # fmt: skip
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.precision, "precision", tuple(PRECISIONS))
        check_choice(self.augment, "augment", ("auto", *AUGMENTATIONS))
        for name in FLAGS:
            check_flag(getattr(self, name), name)
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected a momentum above 0, got 0")
        if self.compile and self.checkpointing:
            raise ValueError("checkpointing: torch.compile recomputes by itself; use only one")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size {self.batch_size}, got "
                f"{self.accumulate}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of autocast."""
        return PRECISIONS[self.precision]

    def as_dict(self) -> dict[str, Any]:
        """The attributes as plain values; `Recipe(**values)` recreates the recipe."""
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 10, "batch_size": 32, "lr": 0.05, "nesterov": True, "warmup": 2.0},
    "cifar10": {},
    "imagefolder": {"epochs": 90, "batch_size": 256, "weight_decay": 1e-4, "warmup": 5.0},
    "synthetic": {"epochs": 2, "batch_size": 100, "lr": 0.05},
}
"""Data set → attributes whose default differs from `Recipe`'s."""

WARMUP_SHARE = 0.2


def recipe_for(data: str, **asked: Any) -> Recipe:
    """A recipe from `asked`; other attributes are those of PRESETS[data], then `Recipe`'s own.

    If `asked` has no warmup, it is at most WARMUP_SHARE of the epochs.
    """
    values = {"epochs": Recipe.epochs, "warmup": Recipe.warmup, **PRESETS[data], **asked}
    if "warmup" not in asked:
        values["warmup"] = min(values["warmup"], round(WARMUP_SHARE * values["epochs"], 3))
    return Recipe(**values)


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with momentum; without `decay_norms`, normalizations and biases have no weight decay."""
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if not recipe.decay_norms:
        parameters = groups[0]["params"]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.SGD(
        groups, recipe.lr, recipe.momentum,
        weight_decay=recipe.weight_decay, nesterov=recipe.nesterov,
    )  # fmt: skip


def schedule_of(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler of lr · `lr_factor` at every step, for epochs of `steps` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(recipe, i, steps))


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of `recipe.lr` at step number `step` (from 0), with `steps` steps per epoch.

    Warm-up of w steps: (step + 1) / w. Then, with t from 0 to 1 over the rest, cosine:
    (1 + cos πt) / 2; step: 1, then 0.1 from 1/2 of all epochs and 0.01 from 3/4; constant: 1.
    """
    total, warmup = recipe.epochs * steps, round(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
    if recipe.schedule == "step":
        return 0.1 ** sum(step >= share * total for share in MILESTONES)
    return 1.0


def _expect(name: str, value: Any, what: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {what}, got {given(value)}")
