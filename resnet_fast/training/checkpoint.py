"""Checkpoint files: written whole or not at all, read without running code from them.

A file is written beside its place, flushed to the disk and renamed, and only then are older ones
removed: whenever the process dies, the last whole checkpoint and the one before it are there.
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
    """A file that is no whole checkpoint; the message names it."""


@dataclass(frozen=True)
class ModelSpec:
    """How a model is made again: `resnet_fast.create_model(name, **options)`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def replacing(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """A file that takes the place of `path` once it is whole and on the disk."""
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
    """`content`, of tensors and plain values, as a checkpoint at `path`."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `write` made, on the CPU.

    Raises:
        CheckpointError: naming the file, for one that is missing, truncated or something else.
    """
    content = read_any(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: no checkpoint of {FORMAT.split()[0]}")
    return content


def read_any(path: Path) -> Any:
    """What `torch.save` wrote to `path`: tensors and plain values, nothing that would run code."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                torn = archive.testzip()
            if torn is not None:
                raise ValueError(f"{torn} in it has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # a broken file may raise anything
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: truncated, or no checkpoint: {why}") from None


def name_of(epoch: int, step: int) -> str:
    """The file for `epoch` whole epochs and `step` steps of the next."""
    return f"epoch-{epoch:04}" + (f"-step-{step:06}" if step else "") + ".pt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the furthest last."""
    found = []
    for path in folder.glob("epoch-*.pt"):
        match = NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for *_, path in sorted(found)]


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The furthest checkpoint in `folder`, None where there is none.

    Raises:
        CheckpointError: it cannot be read; the message names it and the one before it.
    """
    *before, last = [None, *checkpoints(folder)]
    if last is None:
        return None
    try:
        return last, read(last)
    except CheckpointError as error:
        offer = "there is none before it"
        if before[-1] is not None:
            offer = f"the one before it can be asked for: --resume {before[-1]}"
        raise CheckpointError(f"{error}; {offer}") from None


class Keeper:
    """Writes the checkpoints of a run into `folder` and keeps the last KEPT of them.

    `resumed` is the file that the run goes on from; what lies beside it from a run that went
    further is removed once it is replaced.
    """

    def __init__(self, folder: Path, resumed: Path | None = None) -> None:
        self.folder = folder
        self.kept = [] if resumed is None else [resumed]

    def write(self, epoch: int, step: int, content: Mapping[str, Any]) -> Path:
        """The checkpoint after `epoch` epochs and `step` steps; its path."""
        path = self.folder / name_of(epoch, step)
        write(path, content)
        self.kept = [*(kept for kept in self.kept if kept != path), path][-KEPT:]
        kept = {kept.resolve() for kept in self.kept}
        for other in (*checkpoints(self.folder), *self.folder.glob(".*.part")):
            if other.resolve() not in kept:
                other.unlink(missing_ok=True)
        return path
