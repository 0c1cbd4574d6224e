"""Data sets by name: `load_data("digits" | "cifar10" | "imagefolder" | "synthetic", path)`.

Nothing is downloaded. Small sets are tensors in memory; imagefolder reads files during training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.optional import imported
from ..spec.values import check_tensor, given, integer
from .augment import AUGMENTATIONS
from .checks import SPLITS, check_choice, check_path, check_seed
from .cifar import read_cifar10
from .imagefolder import ON_BAD_IMAGE, ImageFolder
from .preprocessing import MOST_SIZE, Inputs, Preprocessing
from .transforms import Transform

DATA = ("digits", "cifar10", "imagefolder", "synthetic")
TEST_SHARE = 0.2
SYNTHETIC = {"classes": 10, "train": 2000, "test": 500}


@dataclass(frozen=True)
class Data(Inputs):
    """Labelled images in memory.

    Attributes:
        name: one of DATA.
        classes: class names, in the order of their labels.
        preprocessing: from images to inputs; train_x and test_x are not yet normalized.
        augmentation: the default for these images, of `augment.AUGMENTATIONS`.
        train_x: training images [N,C,H,W], uint8, or floats in [0, 1].
        train_y: their labels [N], int64, from 0.
        test_x: test images, as train_x.
        test_y: their labels, as train_y.

    Raises:
        ValueError: an attribute is invalid, or x and y do not match; the message names it.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    augmentation: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def __post_init__(self) -> None:
        named = isinstance(self.classes, (tuple, list))
        if not named or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes: expected a tuple of names, got {given(self.classes)}")
        _check_preprocessing(self.preprocessing)
        check_choice(self.augmentation, "augmentation", AUGMENTATIONS)
        for split in ("train", "test"):
            x, y = self._split(split)
            check_tensor(x, f"{split}_x")
            check_tensor(y, f"{split}_y")
            if x.dim() != 4:
                raise ValueError(f"{split}_x: expected [N, C, H, W], got shape {tuple(x.shape)}")
            if y.shape != x.shape[:1] or y.dtype != torch.int64:
                raise ValueError(
                    f"{split}_y: expected {len(x)} labels in int64, one per image, got "
                    f"{tuple(y.shape)} in {str(y.dtype).removeprefix('torch.')}"
                )
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.num_classes:
                raise ValueError(
                    f"{split}_y: expected labels 0 to {self.num_classes - 1}, one per entry of "
                    f"classes, got {int(y.min())} to {int(y.max())}"
                )

    def seen_by(self, preprocessing: Preprocessing) -> Data:
        """The same images with another preprocessing, that of a trained model."""
        return replace(self, preprocessing=preprocessing)

    def count(self, split: str) -> int:
        """Number of images in `split`: "train", "test", or "all" for both."""
        return len(self._split(split)[1])

    def batches(
        self, split: str, chosen: Sequence[Tensor], device: torch.device, workers: int = 0, *,
        transform: Transform | None = None, seed: int = 0, epoch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Yield (x, y) on `device` for each batch of indices in `chosen`.

        The other arguments are those of an ImageFolder and are not used: `augment.augment` and
        `transforms.augmented` augment x on the device.
        """
        x, y = (t.to(device) for t in self._split(split))
        for indices in chosen:
            indices = indices.to(device)
            yield x[indices], y[indices]

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        check_choice(split, "split", SPLITS)
        if split == "all":
            parts = (self.train_x, self.test_x), (self.train_y, self.test_y)
            return torch.cat(parts[0]), torch.cat(parts[1])
        return (self.train_x, self.train_y) if split == "train" else (self.test_x, self.test_y)


def _check_preprocessing(value: Any) -> None:
    if not isinstance(value, Preprocessing):
        raise ValueError(f"preprocessing: expected a Preprocessing, got {given(value)}")


def load_data(
    name: str,
    path: str | Path | None = None,
    *,
    size: int | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
) -> Data | ImageFolder:
    """Load the data set `name`. Nothing is downloaded.

    Args:
        name: "digits" (scikit-learn's 1,797 scans), "cifar10" (the official python archive),
            "imagefolder" (one folder per class), or "synthetic" (patterns with noise).
        path: archive or extracted folder of cifar10, or root of imagefolder; None for the others.
        size: height and width of an input in pixels, 8 to 2048. None is 16 for digits, 32 for
            synthetic, 224 for imagefolder; cifar10 is always 32.
        preprocessing: that of a trained model, in place of the data set's own.
        seed: of the synthetic patterns, and of the split of digits and of an imagefolder without
            a test folder.
        on_bad_image: for an image of imagefolder that cannot be read: "error", or "skip" to leave
            it out.

    Returns:
        A `Data` in memory, or an `ImageFolder`. Both have `name`, `classes`, `num_classes`,
        `channels`, `size`, `preprocessing`, `augmentation`, `count(split)` and `batches(…)`.

    Raises:
        ValueError: an argument is invalid, or a file is missing or damaged; the message names it.
        MissingPackage: a package is not installed; the message says how to install it.
    """
    if size is not None:
        integer(size, "size", "at least 8 pixels", 8, MOST_SIZE)
    check_seed(seed)
    check_choice(on_bad_image, "on_bad_image", ON_BAD_IMAGE)
    if preprocessing is not None:
        _check_preprocessing(preprocessing)
        size = size or preprocessing.size
        data = load_data(name, path, size=size, seed=seed, on_bad_image=on_bad_image)
        return data.seen_by(preprocessing.at(data.size))
    check_choice(name, "name", DATA)
    if path is not None:
        check_path(path, "path")
    if name in ("cifar10", "imagefolder") and path is None:
        raise ValueError(f"path: {name} needs the path of its file or folder")
    if name in ("digits", "synthetic") and path is not None:
        raise ValueError(f"path: expected None for {name}, got {str(path)!r}")
    if name == "digits":
        return digits(size or 16, seed)
    if name == "synthetic":
        return synthetic(size or 32, seed)
    if name == "imagefolder":
        return ImageFolder(Path(path), size or 224, seed, on_bad_image)
    if size not in (None, 32):
        raise ValueError(f"size: expected 32 pixels for cifar10, got {size}")
    return cifar10(Path(path))


def digits(size: int = 16, seed: int = 0) -> Data:
    """Scans of 8×8 pixels and 17 grey levels (Alpaydin & Kaynak 1998, UCI); a fifth is for test.

    Resized bilinearly to size × size, in three equal channels. Digits are never mirrored.
    """
    sklearn = imported("sklearn.datasets", "digits", "scikit-learn")
    images, labels = sklearn.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    split = imported("sklearn.model_selection", "digits", "scikit-learn").train_test_split
    train, test = split(range(len(y)), test_size=TEST_SHARE, random_state=seed, stratify=labels)
    mean, std = x[train].mean().item(), x[train].std().item()
    x = x.expand(-1, 3, -1, -1)
    preprocessing = Preprocessing(size, size, (mean,) * 3, (std,) * 3)
    classes = tuple(map(str, range(10)))
    return Data("digits", classes, preprocessing, "crop", x[train], y[train], x[test], y[test])


def cifar10(path: Path) -> Data:
    """CIFAR-10 (Krizhevsky 2009): 32×32 colour images of ten classes, as bytes."""
    classes, train_x, train_y, test_x, test_y = read_cifar10(path)
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in train_x.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).sqrt()
    preprocessing = Preprocessing(32, 32, tuple(mean.tolist()), tuple(std.tolist()))
    return Data("cifar10", classes, preprocessing, "crop-flip", train_x, train_y, test_x, test_y)


def synthetic(size: int = 32, seed: int = 0) -> Data:
    """One smooth pattern per class plus noise: learned in a few epochs, needs no file."""
    generator = torch.Generator().manual_seed(seed)
    classes, counts = SYNTHETIC["classes"], (SYNTHETIC["train"], SYNTHETIC["test"])
    coarse = torch.rand(classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    y = torch.arange(sum(counts)) % classes
    noise = torch.randn(len(y), 3, size, size, generator=generator)
    x = (patterns[y] + 0.5 * noise).clamp_(0, 1)
    (train_x, test_x), (train_y, test_y) = x.split(counts), y.split(counts)
    mean, std = train_x.mean((0, 2, 3)), train_x.std((0, 2, 3))
    preprocessing = Preprocessing(size, size, tuple(mean.tolist()), tuple(std.tolist()))
    names = tuple(f"pattern {i}" for i in range(classes))
    return Data("synthetic", names, preprocessing, "crop", train_x, train_y, test_x, test_y)
