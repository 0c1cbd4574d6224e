"""A folder of images, one folder per class; the files are read during training.

    ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or valid, or test)
    ROOT/train/CLASS/*.jpg or ROOT/CLASS/*.jpg: training holds out every fifth image of a class
    ROOT/val/CLASS/*.jpg: only for evaluation
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .images import SUFFIXES, Skipped, folders_in, images_in
from .loader import How, Loader
from .preprocessing import Inputs, Preprocessing, imagenet
from .transforms import Transform

TRAIN = "train"
TESTS = ("val", "valid", "test")
TEST_EVERY = 5
ON_BAD_IMAGE = ("error", "skip")

File = tuple[Path, int]


class ImageFolder(Inputs):
    """A data set of image files, with ImageNet's preprocessing at `size`.

    Attributes as `data.Data`, with `files` in place of tensors. Workers that read the files stay
    from call to call of `batches`, until `close` or until the data set is deleted.

    Args:
        root: folder as above.
        size: height and width of an input in pixels.
        seed: of the split, if there is no test folder.
        on_bad_image: "error" raises ValueError for an image that cannot be read, "skip" leaves it
            out and adds it to `unreadable`.

    Attributes:
        files: (path, label) of the images of each split.
        held_out: whether "test" is a part of the images that `root` has for training.
        skipped: number of files that cannot be images, by reason.
        unreadable: why images could not be read so far, by path.

    Raises:
        ValueError: a folder is missing, has fewer than two classes or no images; the message names
            it.
    """

    name: ClassVar[str] = "imagefolder"
    augmentation: ClassVar[str] = "resized-crop-flip"

    def __init__(
        self, root: Path, size: int = 224, seed: int = 0, on_bad_image: str = "error"
    ) -> None:
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder")
        self.preprocessing = imagenet(size)
        self.on_bad_image = on_bad_image
        self.skipped, self.unreadable = Skipped(), dict[str, str]()
        self._loader = Loader()
        parted = (root / TRAIN).is_dir()
        tests = [root / name for name in TESTS if (root / name).is_dir()]
        if not parted:  # folders of these names may be classes
            tests = tests if {f.name for f in folders_in(root, Skipped())} <= set(TESTS) else []
        train: list[File] = []
        if parted or not tests:
            self.classes, train = self._images(root / TRAIN if parted else root)
        if tests:
            classes, test = self._images(tests[0])
            if train and classes != self.classes:
                odd = sorted(set(classes) ^ set(self.classes))
                raise ValueError(f"{tests[0]}: its classes differ from those of train: {odd[0]!r}")
            self.classes = classes
        else:
            train, test = _part(train, seed)
        self.held_out = not tests
        self.files = {"train": train, "test": test, "all": sorted([*train, *test])}

    def seen_by(self, preprocessing: Preprocessing) -> ImageFolder:
        """The same images with another preprocessing, that of a trained model."""
        other = copy.copy(self)
        other.preprocessing, other._loader = preprocessing, Loader()
        return other

    def close(self) -> None:
        """End the workers that wait for further batches; `batches` starts others."""
        self._loader.close()

    def count(self, split: str) -> int:
        """Number of images in `split`: "train", "test", or "all" for both."""
        return len(self.files[split])

    def batches(
        self, split: str, chosen: Sequence[Tensor], device: torch.device, workers: int = 0, *,
        transform: Transform | None = None, seed: int = 0, epoch: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Yield (x, y) on `device` for each batch of indices in `chosen`.

        With a transform `of_files`, x is uint8 [N,3,size,size], augmented. Else it is uint8
        [N,3,H,W], resized and centre-cropped to H = W = `preprocessing.resize` for "train", for the
        augmentation on the device, and `size` for the other splits. An image that cannot be read is
        an error, or is missing from its batch.

        Args:
            split: "train", "test" or "all".
            chosen: indices of the images of each batch.
            device: where x and y are put.
            workers: processes that read, of one thread each; 0 reads in this one.
            transform: augmentation.
            seed: of the augmentation, together with the epoch and the index of each image; it does
                not depend on workers or on the order of the images.
            epoch: number of the epoch.
        """
        files = self.files[split]
        augments = transform is not None and transform.of_files
        side = self.preprocessing.resize if split == "train" else self.size
        how = How(self.preprocessing, side)
        if augments:
            how = How(self.preprocessing, None, transform, seed, epoch)
        images = ([(i, os.fspath(files[i][0])) for i in batch.tolist()] for batch in chosen)
        pin_memory = device.type == "cuda"
        with closing(
            self._loader.read(images, how, workers=workers, pin_memory=pin_memory)
        ) as batches:
            for batch in batches:
                if batch.unreadable and self.on_bad_image == "error":
                    raise ValueError(next(iter(batch.unreadable.values())))
                self.unreadable.update(batch.unreadable)
                y = torch.tensor([files[i][1] for i in batch.places.tolist()], dtype=torch.int64)
                yield batch.x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def _images(self, root: Path) -> tuple[tuple[str, ...], list[File]]:
        """Class names and files of a folder with one folder per class."""
        folders = folders_in(root, self.skipped)
        if len(folders) < 2:
            found = " and ".join(folder.name for folder in folders) or "none"
            raise ValueError(f"{root}: expected one folder per class, at least two; found {found}")
        files: list[File] = []
        for label, folder in enumerate(folders):
            skipped = Skipped()
            found = images_in(folder, skipped)
            if not found:
                why = f" (skipped: {skipped})" if skipped else ""
                raise ValueError(
                    f"{folder}: no images; expected {', '.join(sorted(SUFFIXES))} files{why}"
                )
            files += [(path, label) for path in found]
            self.skipped += skipped
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
