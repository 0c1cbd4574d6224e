"""Checkpoint files: written atomically, read without running code from them.

A file is written under another name, flushed to disk and renamed; only then are older ones
removed. If the process dies at any time, the last complete checkpoint and the one before it remain.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = "resnet_fast 1"
NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.pt")
KEPT = 2


class CheckpointError(ValueError):
    """A file is missing, damaged or not a checkpoint; the message names it."""


@dataclass(frozen=True)
class ModelSpec:
    """How to create a model again: `resnet_fast.create_model(name, **options)`.

    Attributes:
        name: of `resnet_fast.list_models()`.
        options: keyword arguments, plain values.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with open(part, mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, tensors and plain values, as a checkpoint to `path`."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `write` wrote, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not a resnet_fast checkpoint.
    """
    content = read_any(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a resnet_fast checkpoint")
    return content


def read_any(path: Path) -> Any:
    """Load what `torch.save` wrote to `path`: tensors and plain values; never runs code from it."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not check the checksums
            with zipfile.ZipFile(path) as archive:
                torn = archive.testzip()
            if torn is not None:
                raise ValueError(f"wrong checksum of {torn}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # a damaged file may raise any exception
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a checkpoint: {why}") from None


def name_of(epoch: int, step: int) -> str:
    """File name after `epoch` complete epochs and `step` steps of the next."""
    return f"epoch-{epoch:04}" + (f"-step-{step:06}" if step else "") + ".pt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, in training order."""
    found = []
    for path in folder.glob("epoch-*.pt"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the last checkpoint in `folder`; None without one.

    Raises:
        CheckpointError: the file cannot be read; the message names it and the one before it.
    """
    *before, last = [None, *checkpoints(folder)]
    if last is None:
        return None
    try:
        return last, read(last)
    except CheckpointError as error:
        offer = "no earlier one is left; remove the file to train from the beginning"
        if before[-1] is not None:
            offer = f"to continue from the one before it: --resume {before[-1]}"
        raise CheckpointError(f"{error}; {offer}") from None


class Keeper:
    """Writes the checkpoints of a run into `folder` and keeps the last KEPT of them.

    `resumed` is the file that the run continues from. All other checkpoints in `folder`, such as
    later ones, are removed when the next one is written.
    """

    def __init__(self, folder: Path, resumed: Path | None = None) -> None:
        self.folder = folder
        self.kept = [] if resumed is None else [resumed]

    def write(self, epoch: int, step: int, content: Mapping[str, Any]) -> Path:
        """Write the checkpoint after `epoch` epochs and `step` steps; returns its path."""
        path = self.folder / name_of(epoch, step)
        write(path, content)
        self.kept = [*(kept for kept in self.kept if kept != path), path][-KEPT:]
        kept = {kept.resolve() for kept in self.kept}
        for other in (*checkpoints(self.folder), *self.folder.glob(".*.part")):
            if other.resolve() not in kept:
                other.unlink(missing_ok=True)
        return path
