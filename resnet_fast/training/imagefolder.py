"""A folder of images, one folder a class, read while it is used.

    ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or test), or
    ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg alone: every fifth image of a class is for the test
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
    """Images by path, with ImageNet's preprocessing at `size`; attributes as of `data.Data`.

    Training reads the middle square of the shorter side, `preprocessing.resize` wide, and leaves
    the rest to the augmentation on the device.

    Raises:
        ValueError: naming the folder that is missing, has less than two classes or none of the
            images, or leaves nothing for the test.
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
                raise ValueError(f"{tests[0]}: its classes are not those of train: {odd[0]!r}")
        else:
            train, test = _part(train, seed)
            if not test:
                raise ValueError(f"{root}: no class has {TEST_EVERY} images, so none is for a test")
        self.files = {"train": train, "test": test}

    def seen_by(self, preprocessing: Preprocessing) -> ImageFolder:
        """The same images for a model that wants them so."""
        other = copy.copy(self)
        other.preprocessing = preprocessing
        return other

    def count(self, split: str) -> int:
        """Images in `split`, "train" or "test"."""
        return len(self.files[split])

    def batches(
        self, split: str, chosen: Sequence[Tensor], device: torch.device, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) on `device` for the indices of every batch in `chosen`, read by `workers`.

        x is bytes [N,3,H,W], H = W = `size` for the test and `preprocessing.resize` for training.
        """
        crop = self.preprocessing.resize if split == "train" else self.size
        loader = torch.utils.data.DataLoader(
            _Files(self, self.files[split], crop),
            batch_sampler=[indices.tolist() for indices in chosen],
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else every loader draws from the global one
        )
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield tuple(t.to(device, non_blocking=True) for t in batch)


class _Files(torch.utils.data.Dataset):
    """What a worker reads; an error crosses the process as text, without its traceback."""

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
        raise ValueError(f"{root}: expected one folder a class, two at least; found {found}")
    files: list[File] = []
    for label, folder in enumerate(folders):
        found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{folder}: has no images ({', '.join(sorted(SUFFIXES))})")
        files += [(path, label) for path in found]
    return tuple(folder.name for folder in folders), files


def _part(files: Sequence[File], seed: int) -> tuple[list[File], list[File]]:
    """Every TEST_EVERY-th image of a class, in a shuffled order, for the test."""
    generator = torch.Generator().manual_seed(seed)
    train: list[File] = []
    test: list[File] = []
    for label in sorted({label for _, label in files}):
        own = [file for file in files if file[1] == label]
        for place, index in enumerate(torch.randperm(len(own), generator=generator).tolist()):
            (test if place % TEST_EVERY == TEST_EVERY - 1 else train).append(own[index])
    return sorted(train), sorted(test)
