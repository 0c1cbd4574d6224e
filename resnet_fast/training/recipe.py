"""`Recipe`: the hyperparameters of training, and their schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..spec.dtypes import PRECISIONS
from ..spec.values import check_flag, given, integer, is_number
from .augment import AUGMENTATIONS
from .checks import MOST, check_choice, check_seed
from .transforms import Transform

OPTIMIZERS = ("sgd", "adamw", "lars", "muon")
SCHEDULES = ("cosine", "step", "constant")
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
        optimizer: "sgd", "adamw" (`torch.optim`; betas 0.9 and 0.999), "lars" (arXiv:1708.03888),
            or "muon" for the filters and AdamW for the rest (arXiv:2502.16982).
        lr: learning rate after the warm-up. The default is for "sgd".
        momentum: of "sgd", "lars" and "muon".
        nesterov: Nesterov momentum of "sgd"; "muon" always has it.
        weight_decay: added to the gradient by "sgd" and "lars", decoupled in "adamw" and "muon".
        decay_norms: apply weight decay to normalizations and biases too.
        schedule: "cosine" to 0 (arXiv:1608.03983), "step" (a factor of 0.1 at each milestone), or
            "constant".
        milestones: of the schedule "step", as shares of all epochs. The default is that of He et
            al. 2015 for CIFAR; for ImageNet it is 1/3 and 2/3.
        warmup: epochs in which the learning rate rises linearly to `lr` (arXiv:1706.02677).
        label_smoothing: as `nn.CrossEntropyLoss`, in training only.
        ema: decay of an exponential moving average of parameters and buffers, or None. The average
            is what is tested and saved.
        clip: maximum norm of all gradients together, or None.
        accumulate: parts of each process's batch, with one backward pass each before the optimizer
            step. Batch statistics are those of a part.
        augment: "none", "crop", "crop-flip", "resized-crop-flip", or "auto": the data set's own.
        randaugment: magnitude, 0 to 30, of two random operations per image (RandAugment,
            arXiv:1909.13719), or None.
        random_erasing: probability that a rectangle of an image is erased (arXiv:1708.04896).
        mixup: α of the Beta(α, α) by which two images and their labels are mixed
            (arXiv:1710.09412); 0 mixes none.
        cutmix: α of the Beta(α, α) that is the area of a rectangle from another image
            (arXiv:1905.04899); 0 cuts none. With mixup too, each batch takes one at random.
        freeze: modules that are not trained, by name, such as "layer1"; "stem" is conv1 and bn1.
            Their normalizations keep their running statistics and normalize by them.
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
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norms: bool = True
    schedule: str = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    warmup: float = 1.0
    label_smoothing: float = 0.0
    ema: float | None = None
    clip: float | None = None
    accumulate: int = 1
    augment: str = "auto"
    randaugment: int | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    freeze: tuple[str, ...] = ()
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
        for name in ("lr", "weight_decay", "warmup", "mixup", "cutmix"):
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
        shares = self.milestones
        rising = isinstance(shares, tuple) and all(is_number(v) and 0 <= v <= 1 for v in shares)
        _expect("milestones", shares, "rising shares of all epochs, from 0 to 1",
                rising and list(shares) == sorted(shares))  # fmt: skip
        named = isinstance(self.freeze, tuple) and all(isinstance(v, str) for v in self.freeze)
        _expect("freeze", self.freeze, "a tuple of names of modules", named)
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.precision, "precision", tuple(PRECISIONS))
        check_choice(self.augment, "augment", ("auto", *AUGMENTATIONS))
        Transform("none", self.randaugment, self.random_erasing)  # checks them
        for name in FLAGS:
            check_flag(getattr(self, name), name)
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov: expected the optimizer sgd, got {self.optimizer}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: expected a momentum above 0, got 0")
        if self.compile and self.checkpointing:
            raise ValueError("checkpointing: torch.compile recomputes by itself; use only one")

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
    "imagefolder": {
        "epochs": 90, "batch_size": 256, "weight_decay": 1e-4, "warmup": 0.0, "schedule": "step",
        "milestones": (1 / 3, 2 / 3),
    },
    "synthetic": {"epochs": 2, "batch_size": 100, "lr": 0.05},
}  # fmt: skip
"""Data set → attributes whose default differs from `Recipe`'s.

imagefolder: ImageNet's, as in PyTorch's ImageNet example and torchvision's reference training of
ResNets (SGD 0.1, 256 images, 90 epochs, a factor of 0.1 after 30 and 60).
"""

LATER = {"nesterov": False, "schedule": "cosine", "warmup": 5.0}
OF_OPTIMIZER: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05, **LATER},
    "lars": {"lr": 1.0, **LATER},
    "muon": {"lr": 1e-3, "weight_decay": 0.05, "momentum": 0.95, **LATER},
}
"""Optimizer → attributes whose default differs from the data set's."""

WARMUP_SHARE = 0.2


def recipe_for(data: str, **asked: Any) -> Recipe:
    """A recipe from `asked`; other attributes are those of OF_OPTIMIZER, PRESETS[data], `Recipe`.

    If `asked` has no warmup, it is at most WARMUP_SHARE of the epochs.
    """
    usual = {"epochs": Recipe.epochs, "warmup": Recipe.warmup, **PRESETS[data]}
    values = {**usual, **OF_OPTIMIZER.get(asked.get("optimizer", "sgd"), {}), **asked}
    if "warmup" not in asked:
        values["warmup"] = min(values["warmup"], round(WARMUP_SHARE * values["epochs"], 3))
    return Recipe(**values)


def schedule_of(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler of lr · `lr_factor` at every step, for epochs of `steps` steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_factor(recipe, i, steps))


def lr_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of `recipe.lr` at step number `step` (from 0), with `steps` steps per epoch.

    Warm-up of w steps: (step + 1) / w. Then, with t from 0 to 1 over the rest, cosine:
    (1 + cos πt) / 2; step: 0.1 to the number of milestones reached; constant: 1.
    """
    total, warmup = recipe.epochs * steps, round(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "cosine":
        return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
    if recipe.schedule == "step":
        return 0.1 ** sum(step >= share * total for share in recipe.milestones)
    return 1.0


def _expect(name: str, value: Any, what: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {what}, got {given(value)}")
