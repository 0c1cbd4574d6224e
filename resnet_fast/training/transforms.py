"""Augmentation by torchvision: of image files as they are read, and of batches.

Every image has a seed of its own (`seed_of`). Its random numbers do not depend on workers,
processes or the order of the images.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.files import reason
from ..runtime.optional import MissingPackage
from ..spec.values import given, integer, is_number
from .augment import AUGMENTATIONS
from .checks import check_choice

OPS = 2  # of RandAugment per image
MOST_MAGNITUDE = 30


def torchvision_v2() -> Any:
    """The module `torchvision.transforms.v2`, imported at first use.

    Raises:
        MissingPackage: torchvision is not installed, or was built for another torch.
    """
    try:
        return importlib.import_module("torchvision.transforms.v2")
    except Exception as error:  # one for another torch raises RuntimeError or AttributeError
        raise MissingPackage(
            "resized-crop-flip of image files, RandAugment, random erasing, MixUp and CutMix need "
            "a torchvision that matches torch (pip install torchvision); without it, use augment "
            f"crop-flip or none (--augment) and leave the others out: {reason(error)}"
        ) from None


def seed_of(*numbers: int) -> int:
    """A 64-bit seed from integers such as (seed, epoch, index): their BLAKE2b hash."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which the CPU's global generator starts at `seed`; it is restored afterwards.

    Generators of GPUs are not touched, which `torch.manual_seed` would seed too.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Transform:
    """Augmentation of one training image, in the order of torchvision's reference presets.

    Attributes:
        augment: crop and flip, of `augment.AUGMENTATIONS`. "resized-crop-flip" of an image file is
            torchvision's RandomResizedCrop of the whole image and RandomHorizontalFlip.
        randaugment: magnitude of RandAugment's two operations, 0 to 30 (Cubuk et al. 2019,
            arXiv:1909.13719); None is without.
        random_erasing: probability of erasing a box (Zhong et al. 2017, arXiv:1708.04896).

    Raises:
        ValueError: an attribute is invalid; the message names it.
    """

    augment: str
    randaugment: int | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.augment, "augment", AUGMENTATIONS)
        if self.randaugment is not None:
            expected = f"None or a magnitude of 0 to {MOST_MAGNITUDE}"
            integer(self.randaugment, "randaugment", expected, 0, MOST_MAGNITUDE)
        p = self.random_erasing
        if not (is_number(p) and 0 <= p <= 1):
            raise ValueError(f"random_erasing: expected a probability of 0 to 1, got {given(p)}")

    @property
    def of_files(self) -> bool:
        """Whether image files are augmented as they are read.

        If not, `augment.augment` and `augmented` do it to the batch on the device.
        """
        return self.augment == "resized-crop-flip"

    def box(self, image: Any, size: int) -> tuple[int, int, int, int]:
        """RandomResizedCrop's (left, top, right, bottom) of a PIL image, before its decoding."""
        found = _resized_crop(size).make_params([image])
        left, top = found["left"], found["top"]
        return left, top, left + found["width"], top + found["height"]

    def cropped(self, image: Any, mean: tuple[float, ...]) -> Tensor:
        """What follows the crop of a PIL image, L or RGB: a uint8 tensor [C,H,W].

        Args:
            image: the resized crop.
            mean: of the preprocessing, one per channel, for x in [0, 1]; erased pixels get it,
                which normalization makes 0.
        """
        return _after_crop(self, mean)(image)


@functools.cache
def _resized_crop(size: int) -> Any:
    return torchvision_v2().RandomResizedCrop(size, antialias=True)


@functools.cache
def _after_crop(transform: Transform, mean: tuple[float, ...]) -> Any:
    v2 = torchvision_v2()
    randaugment, erasing = _others(transform, _levels(mean))
    return v2.Compose([v2.RandomHorizontalFlip(), *randaugment, v2.PILToTensor(), *erasing])


@functools.cache
def _on_tensors(transform: Transform, value: tuple[float, ...]) -> Any:
    randaugment, erasing = _others(transform, value)
    return torchvision_v2().Compose([*randaugment, *erasing])


def _others(transform: Transform, value: tuple[float, ...]) -> tuple[list[Any], list[Any]]:
    """RandAugment and RandomErasing with `value`, each in a list that is empty without it."""
    v2, randaugment, erasing = torchvision_v2(), [], []
    if transform.randaugment is not None:
        bilinear = v2.InterpolationMode.BILINEAR
        randaugment = [v2.RandAugment(OPS, transform.randaugment, interpolation=bilinear)]
    if transform.random_erasing:
        erasing = [v2.RandomErasing(transform.random_erasing, value=value)]
    return randaugment, erasing


def _levels(mean: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(round(255 * m)) for m in mean)


def augmented(
    x: Tensor, transform: Transform, mean: tuple[float, ...], seeds: Sequence[int]
) -> Tensor:
    """RandAugment and random erasing of x [N,C,H,W], for each image from its own seed.

    Crop and flip of tensors are `augment.augment`, which comes first.

    Args:
        x: uint8, or floats in [0, 1]; 1 or 3 channels with RandAugment. It is not changed.
        transform: what to do; x is returned as it is if there is nothing.
        mean: of the preprocessing, the value of erased pixels.
        seeds: N integers, of `seed_of`.

    Raises:
        ValueError: the number of seeds or channels is wrong.
        MissingPackage: torchvision cannot be imported.
    """
    if len(seeds) != len(x):
        raise ValueError(f"seeds: expected {len(x)}, one per image of x, got {len(seeds)}")
    if (transform.randaugment is None and not transform.random_erasing) or not len(x):
        return x
    if transform.randaugment is not None and x.size(1) not in (1, 3):
        raise ValueError(f"randaugment: expected images of 1 or 3 channels, got {x.size(1)}")
    value = _levels(mean) if x.dtype == torch.uint8 else tuple(mean)
    torchvision_v2()
    apply, found = _on_tensors(transform, value), []
    for image, seed in zip(x, seeds, strict=True):
        with seeded(seed):
            found.append(apply(image))
    return torch.stack(found)


def mixed(
    x: Tensor, y: Tensor, classes: int, mixup: float, cutmix: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a batch by MixUp or CutMix, one of them at random if both are above 0.

    Each image is mixed with the one before it, in one proportion for the batch.

    Args:
        x: normalized images [N,C,H,W], floats on any device.
        y: labels [N], int64.
        classes: number of classes.
        mixup: alpha of MixUp's beta distribution (Zhang et al. 2017, arXiv:1710.09412); 0 is
            without.
        cutmix: that of CutMix (Yun et al. 2019, arXiv:1905.04899).
        seed: of the choice, the proportion and the box.

    Returns:
        x in its memory format, and y as probabilities [N, classes] in fp32. With mixup and cutmix
        of 0, both as they are.

    Raises:
        MissingPackage: torchvision cannot be imported.
    """
    if not mixup and not cutmix:
        return x, y
    v2 = torchvision_v2()
    last = x.is_contiguous(memory_format=torch.channels_last)
    with seeded(seed):
        one_of = [
            kind(alpha=alpha, num_classes=classes)
            for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
            if alpha
        ]
        x, y = v2.RandomChoice(one_of)(x, y)
    return x.contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    ), y
