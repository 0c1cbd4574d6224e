"""Batches of image files, read by worker processes that stay for further calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.optional import imported
from .images import read_augmented, read_image
from .preprocessing import Preprocessing
from .transforms import Transform, seed_of, torchvision_v2


class Batch(NamedTuple):
    """The images of a batch that can be read.

    Attributes:
        x: uint8 [n, C, side, side], channels_last.
        places: their indices among the files [n].
        unreadable: why the others cannot be read, by path.
    """

    x: Tensor
    places: Tensor
    unreadable: dict[str, str]


class How(NamedTuple):
    """How images are read: by `read_augmented` with a transform, else by `read_image`."""

    preprocessing: Preprocessing
    crop: int | None = None
    transform: Transform | None = None
    seed: int = 0
    epoch: int = 0

    @property
    def side(self) -> int:
        """Height and width of what is read."""
        return self.preprocessing.size if self.crop is None else self.crop

    def read(self, index: int, path: str | Path) -> Tensor:
        """The image; ValueError if it cannot be read."""
        if self.transform is None:
            return read_image(path, self.preprocessing, self.crop)
        seed = seed_of(self.seed, self.epoch, index)
        return read_augmented(path, self.preprocessing, self.transform, seed)


Job = tuple[How, Sequence[tuple[int, str | Path]]]
"""What a worker gets for a batch: how to read, and the index and the path of every image."""


class Loader:
    """Reads batches by worker processes, which wait for the next call until `close`.

    They end with it, with the loader, and when a call is left before its last batch. A call
    within another one has workers of its own. A copy of a loader has none.
    """

    def __init__(self) -> None:
        self._waiting: DataLoader | None = None

    def __reduce__(self):
        return Loader, ()

    def read(
        self, batches: Iterable[Sequence[tuple[int, str | Path]]], how: How, *,
        workers: int = 0, pin_memory: bool = False,
    ) -> Iterator[Batch]:  # fmt: skip
        """Yield a Batch for each of `batches`: the index and the path of every image.

        Args:
            batches: taken one by one, as far ahead as workers read.
            how: how the images are read.
            workers: number of processes, of one thread each; 0 reads in this one.
            pin_memory: whether x and places are in pinned memory, for a GPU.

        Raises:
            MissingPackage: Pillow, or torchvision if `how` has a transform, cannot be imported.
        """
        imported("PIL.Image", "images", "pillow")  # here, because a worker prints a traceback
        if how.transform is not None:
            torchvision_v2()
        loader, self._waiting = self._waiting, None
        if loader is not None and (loader.num_workers, loader.pin_memory) != (workers, pin_memory):
            _end(loader)
            loader = None
        if loader is None:
            loader = DataLoader(
                _Files(), batch_size=None, sampler=_Jobs(), num_workers=workers,
                pin_memory=pin_memory, persistent_workers=workers > 0,
                generator=torch.Generator(),  # by default it draws from the global generator
            )  # fmt: skip
        loader.sampler.jobs = ((how, batch) for batch in batches)
        finished = False
        try:
            yield from loader
            finished = self._waiting is None
        finally:
            loader.sampler.jobs = ()
            if finished:
                self._waiting = loader
            else:
                _end(loader)

    def close(self) -> None:
        """End the workers that wait; a later call starts others."""
        loader, self._waiting = self._waiting, None
        if loader is not None:
            _end(loader)


def _end(loader: DataLoader) -> None:
    if loader._iterator is not None:
        # Otherwise they stay while a traceback, or a cycle of references, holds the iterator.
        loader._iterator._shutdown_workers()


class _Jobs:
    """The sampler: the jobs of the current call."""

    jobs: Iterable[Job] = ()

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)


class _Files(Dataset):
    """The dataset of the workers: an item is a batch, its index a job."""

    def __getitem__(self, job: Job) -> Batch:
        how, images = job
        read, places, unreadable = [], [], {}
        for index, path in images:
            try:
                x = how.read(index, path)
            except ValueError as error:  # as text, so that no traceback is printed
                unreadable[str(path)] = str(error)
            else:
                read.append(x)
                places.append(index)
        none = torch.empty(0, how.side, how.side, how.preprocessing.channels, dtype=torch.uint8)
        x = torch.stack([x.permute(1, 2, 0) for x in read]) if read else none  # as Pillow has them
        places = torch.tensor(places, dtype=torch.int64)
        return Batch(x.permute(0, 3, 1, 2), places, unreadable)
