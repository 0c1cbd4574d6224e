"""A folder of images, one folder per class; the files are read during training.

    ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or valid, or test), or only
    ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg: then every fifth image of a class is a test image
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .preprocessing import Inputs, Preprocessing, imagenet, read_image

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"))
TESTS = ("val", "valid", "test")
TEST_EVERY = 5

File = tuple[Path, int]


class ImageFolder(Inputs):
    """A data set of image files, with ImageNet's preprocessing at `size`.

    Attributes as `data.Data`, with `files` in place of tensors. For training, images are resized
    and centre-cropped to `preprocessing.resize`; the augmentation on the device does the rest.

    Args:
        root: folder as above.
        size: height and width of an input in pixels.
        seed: of the split, if there is no test folder.

    Raises:
        ValueError: a folder is missing, has fewer than two classes or no images, or leaves no test
            images; the message names it.
    """

    name: ClassVar[str] = "imagefolder"
    augmentation: ClassVar[str] = "resized-crop-flip"

    def __init__(self, root: Path, size: int = 224, seed: int = 0) -> None:
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.preprocessing = imagenet(size)
        parted = (root / "train").is_dir()
        self.classes, train = _images(root / "train" if parted else root)
        tests = [root / name for name in TESTS if parted and (root / name).is_dir()]
        if tests:
            classes, test = _images(tests[0])
            if classes != self.classes:
                odd = sorted(set(classes) ^ set(self.classes))
                raise ValueError(f"{tests[0]}: its classes differ from those of train: {odd[0]!r}")
        else:
            train, test = _part(train, seed)
            if not test:
                raise ValueError(
                    f"{root}: no test images; expected a val folder or a class of at least "
                    f"{TEST_EVERY} images"
                )
        self.files = {"train": train, "test": test}

    def seen_by(self, preprocessing: Preprocessing) -> ImageFolder:
        """The same images with another preprocessing, that of a trained model."""
        other = copy.copy(self)
        other.preprocessing = preprocessing
        return other

    def count(self, split: str) -> int:
        """Number of images in `split`, "train" or "test"."""
        return len(self.files[split])

    def batches(
        self, split: str, chosen: Sequence[Tensor], device: torch.device, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) on `device` for each batch of indices in `chosen`, read by `workers`.

        x is uint8 [N,3,H,W]; H = W is `size` for test, `preprocessing.resize` for training.
        """
        crop = self.preprocessing.resize if split == "train" else self.size
        loader = torch.utils.data.DataLoader(
            _Files(self, self.files[split], crop),
            batch_sampler=[indices.tolist() for indices in chosen],
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # by default a loader draws from the global generator
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield tuple(t.to(device, non_blocking=True) for t in batch)


class _Files(torch.utils.data.Dataset):
    """The Dataset of the workers; returns an error as text, so that no traceback is printed."""

    def __init__(self, folder: ImageFolder, files: Sequence[File], crop: int) -> None:
        self.preprocessing, self.files, self.crop = folder.preprocessing, files, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        path, label = self.files[index]
        try:
            return read_image(path, self.preprocessing, self.crop), label
        except ValueError as error:
            return str(error)


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _images(root: Path) -> tuple[tuple[str, ...], list[File]]:
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if len(folders) < 2:
        found = " and ".join(folder.name for folder in folders) or "none"
        raise ValueError(f"{root}: expected one folder per class, at least two; found {found}")
    files: list[File] = []
    for label, folder in enumerate(folders):
        found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder}: no images; expected {', '.join(sorted(SUFFIXES))} files")
        files += [(path, label) for path in found]
    return tuple(folder.name for folder in folders), files


def _part(files: Sequence[File], seed: int) -> tuple[list[File], list[File]]:
    """Split into train and test: every TEST_EVERY-th image of a class, shuffled, is for test."""
    generator = torch.Generator().manual_seed(seed)
    train: list[File] = []
    test: list[File] = []
    for label in sorted({label for _, label in files}):
        own = [file for file in files if file[1] == label]
        for place, index in enumerate(torch.randperm(len(own), generator=generator).tolist()):
            (test if place % TEST_EVERY == TEST_EVERY - 1 else train).append(own[index])
    return sorted(train), sorted(test)
