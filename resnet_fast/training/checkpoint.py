"""Checkpoint files: written atomically, read without running code from them.

A file is written under another name, flushed to disk and renamed (`runtime.files.replacing`); only
then are older ones removed. If the process dies at any time, the last complete checkpoint and the
one before it remain.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.registry import check_name
from ..runtime.files import opened, remove_parts, replacing
from ..spec.values import brief, given
from .preprocessing import Preprocessing
from .torch_file import CheckpointError, read_any

FORMAT = "resnet_fast 1"
NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?\.pt")
BEST = re.compile(r"best-epoch-(\d+)\.pt")
KEPT = 2
LOADER = "loader"  # in place of a data set's name
MOST_CLASSES = 10**6


@dataclass(frozen=True)
class ModelSpec:
    """How to create a model again: `resnet_fast.create_model(name, **options)`.

    Attributes:
        name: of `resnet_fast.list_models()`.
        options: keyword arguments, plain values.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, tensors and plain values, as a checkpoint to `path`. NotWritten says why
    it failed, such as a full disk.
    """
    made = io.BytesIO()  # torch.save hides what is wrong with a file
    torch.save({"format": FORMAT, **content}, made)
    with replacing(path) as file:
        file.write(made.getbuffer())


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `write` wrote, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not a resnet_fast checkpoint.
    """
    content = read_any(path)
    if not is_own(content):
        raise CheckpointError(f"{path}: not a resnet_fast checkpoint")
    *_, preprocessing = about(path, content)
    if preprocessing is not None:
        content["preprocessing"] = asdict(preprocessing)  # with what an earlier file lacks
    return content


def is_own(content: Any) -> bool:
    """Whether the `content` of a file was written by `write`."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def about(
    path: Path, content: Mapping[str, Any]
) -> tuple[ModelSpec | None, tuple[str, ...] | None, Preprocessing | None]:
    """The model, the class names and the preprocessing in the content of `path`.

    A run on a loader knows neither class names nor preprocessing: they are None.

    Raises:
        CheckpointError: one of them is missing or invalid; the message names it.
    """
    classes, spec, preprocessing = map(content.get, ("classes", "spec", "preprocessing"))
    unknown = content.get("data") == LOADER and classes is preprocessing is None
    if not unknown:
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            got = given(classes)
            raise CheckpointError(f"{path}: classes: expected a list of names, got {got}")
        if not 1 <= len(classes) <= MOST_CLASSES:
            got = len(classes)
            raise CheckpointError(f"{path}: classes: expected 1 to {MOST_CLASSES}, got {got}")
    try:
        return (
            None if spec is None else _spec(spec),
            None if unknown else tuple(classes),
            None if unknown else Preprocessing.of(preprocessing),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _spec(value: Any) -> ModelSpec:
    if not isinstance(value, dict) or value.keys() != {"name", "options"}:
        raise ValueError(f"spec: expected a name and options, got {given(value)}")
    try:
        name = check_name(value["name"])
    except ValueError as error:
        raise ValueError(f"spec: {error}") from None
    options = value["options"]
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"spec: expected options by name, got {given(options)}")
    for key, option in options.items():
        parts = option if isinstance(option, (list, tuple)) else [option]
        if not all(part is None or type(part) in (bool, int, float, str) for part in parts):
            raise ValueError(f"spec: {brief(key)}: expected plain values, got {given(option)}")
    return ModelSpec(name, options)


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

    `resumed` is the file that the run continues from, after `epoch` epochs. All other checkpoints
    in `folder`, such as later ones, are removed when the next one is written. `mark_best` keeps one
    more.
    """

    def __init__(self, folder: Path, resumed: Path | None = None, epoch: int = 0) -> None:
        self.folder, self.epoch = folder, epoch
        self.kept = [] if resumed is None else [resumed]

    def write(self, epoch: int, step: int, content: Mapping[str, Any]) -> Path:
        """Write the checkpoint after `epoch` epochs and `step` steps; returns its path."""
        path = self.folder / name_of(epoch, step)
        write(path, content)
        self.kept = [*(kept for kept in self.kept if kept != path), path][-KEPT:]
        kept = {kept.resolve() for kept in self.kept}
        for other in checkpoints(self.folder):
            if other.resolve() not in kept:
                other.unlink(missing_ok=True)
        for other, number in self._best().items():
            if number > self.epoch:  # of the run after `resumed`
                other.unlink(missing_ok=True)
        self.epoch = epoch
        remove_parts(self.folder)
        return path

    def mark_best(self, path: Path, epoch: int) -> None:
        """Keep the checkpoint `path`, after `epoch` epochs, as the best in place of another.

        It is another name of the same file, or a copy where the file system has no such names.
        """
        best = self.folder / f"best-{name_of(epoch, 0)}"
        if not best.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                best.hardlink_to(path)
            except OSError:
                with opened(path) as file, replacing(best) as copy:
                    shutil.copyfileobj(file, copy)
        for other in self._best():
            if other != best:
                other.unlink(missing_ok=True)

    def _best(self) -> dict[Path, int]:
        """The files of `mark_best`, and their epochs."""
        found = {path: BEST.fullmatch(path.name) for path in self.folder.glob("best-*.pt")}
        return {path: int(match[1]) for path, match in found.items() if match}
