"""Image files: find them in a folder, and read them as a model's input.

Which files are images follows torchvision's `ImageFolder`; what cannot be an image is counted in
`Skipped` with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import opened, reason
from ..runtime.optional import imported
from .preprocessing import Preprocessing

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)  # fmt: skip
# Pillow's other formats are rare, and one runs a program: Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF")
HIDDEN = "hidden"
NOT_FINITE = "it has values that are not finite"
MARGIN = 2  # a JPEG is decoded at no less than this multiple of the size it is resized to
MOST_CROPS = 16  # of a larger resized image, only the crop is computed


class Skipped(Counter[str]):
    """Number of files and folders that were not taken as images, by reason."""

    def __str__(self) -> str:
        return ", ".join(f"{why}: {count}" for why, count in sorted(self.items()))


def folders_in(root: Path, skipped: Skipped) -> list[Path]:
    """The folders in `root` that can be classes, sorted; links are followed."""
    found = []
    for path in sorted(root.iterdir()):
        if path.is_dir():
            if _takes_folder(path, skipped):
                found.append(path)
        elif _takes_file(path, skipped):
            skipped["outside of the class folders"] += 1
    return found


def images_in(root: Path, skipped: Skipped) -> list[Path]:
    """All images in `root` and its subfolders, sorted; links are followed."""
    return sorted(_walk(root, skipped, frozenset()))


def _walk(folder: Path, skipped: Skipped, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:
        skipped["links to a folder above"] += 1
        return
    for path in folder.iterdir():
        if not path.is_dir():
            if _takes_file(path, skipped):
                yield path
        elif _takes_folder(path, skipped):
            yield from _walk(path, skipped, above | {here})


def _takes_folder(path: Path, skipped: Skipped) -> bool:
    if _hidden(path):
        why = HIDDEN
    elif path.suffix.lower() in SUFFIXES:
        why = "folders named like an image"
    else:
        return True
    skipped[why] += 1
    return False


def _takes_file(path: Path, skipped: Skipped) -> bool:
    if _hidden(path):
        why = HIDDEN
    elif not path.exists():
        why = "broken links"
    elif path.suffix.lower() not in SUFFIXES:
        why = "of other types"
    elif not path.is_file():
        why = "pipes or devices"
    elif not path.stat().st_size:
        why = "empty"
    else:
        return True
    skipped[why] += 1
    return False


def _hidden(path: Path) -> bool:
    """Whether a name is hidden, such as .ipynb_checkpoints and ._x.jpg, or macOS's __MACOSX."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def read_image(path: Path, preprocessing: Preprocessing, crop: int | None = None) -> Tensor:
    """Read an image as uint8 [C, crop, crop], resized and centre-cropped; None is `size`.

    The same pixels as torchvision's `Resize` and `CenterCrop`, except that
    - a JPEG of at least four times the resized size is decoded at a half, a quarter or an eighth,
      still at least twice the resized size;
    - of an image whose resized pixels are more than 16 crops, such as 3000 × 2, only the crop is
      computed;
    - 16-bit values are divided by 257, where Pillow would cut them at 255. Integers of 32 bits are
      scaled to 0 … 255 from 0 … 65535, floats from 0 … 1 or 0 … 255, if all are within it, else
      from their minimum and maximum.

    Raises:
        ValueError: the file is missing, damaged or not an image; the message names it.
        MissingPackage: Pillow is not installed.
    """
    Image = imported("PIL.Image", "images", "pillow")
    crop = preprocessing.size if crop is None else crop
    try:
        with opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not read here
            with Image.open(file, formats=FORMATS) as image:
                return _pixels(Image, image, preprocessing, crop)
    except Image.UnidentifiedImageError:
        why = f"expected one of {', '.join(FORMATS)}"
    except Exception as error:  # a damaged file may raise any exception
        why = reason(error)
    raise ValueError(f"{path}: not a readable image: {why}")


def _pixels(Image: Any, image: Any, preprocessing: Preprocessing, crop: int) -> Tensor:
    sides = image.size
    if min(sides) < 1:
        raise ValueError(f"{sides[0]} × {sides[1]} pixels")
    width, height = (preprocessing.resize * side // min(sides) for side in sides)
    image.draft(None, (MARGIN * width, MARGIN * height))
    scale = None
    if image.mode == "F" or image.mode.startswith("I"):
        usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
        image = image.convert("F")
        scale = _range(*image.getextrema(), usual)
    else:
        image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    interpolation = Image.Resampling[preprocessing.interpolation.upper()]
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    box = left, top, left + crop, top + crop
    if width * height > MOST_CROPS * crop * crop:
        across, down = image.width / width, image.height / height
        box = box[0] * across, box[1] * down, box[2] * across, box[3] * down
        image = image.resize((crop, crop), interpolation, box)
    else:
        image = image.resize((width, height), interpolation).crop(box)
    values = np.array(image)
    if scale is not None:
        values = (values - scale[0]) * (255 / (scale[1] - scale[0]))
        if not np.isfinite(values).all():
            raise ValueError(NOT_FINITE)
        values = np.rint(values).clip(0, 255).astype(np.uint8)
    x = torch.from_numpy(values.reshape(crop, crop, -1)).permute(2, 0, 1)
    return x.expand(preprocessing.channels, -1, -1)


def _range(low: float, high: float, usual: Sequence[float]) -> tuple[float, float]:
    """The values that become 0 and 255: 0 and the first of `usual` that is high enough, else the
    extrema.
    """
    if not math.isfinite(high - low):
        raise ValueError(NOT_FINITE)
    for most in usual:
        if 0 <= low and high <= most:
            return 0.0, most
    return low, high if high > low else low + max(1.0, abs(low))


class Batch(NamedTuple):
    """The images of a batch that can be read.

    Attributes:
        x: uint8 [n, C, crop, crop].
        places: their indices among the files [n].
        unreadable: why the others cannot be read, by path.
    """

    x: Tensor
    places: Tensor
    unreadable: dict[str, str]


def read_batches(
    files: Sequence[Path], chosen: Sequence[Sequence[int]], preprocessing: Preprocessing, *,
    crop: int | None = None, workers: int = 0, pin_memory: bool = False,
) -> Iterator[Batch]:  # fmt: skip
    """Read the files of each batch of indices in `chosen`, by `workers` processes."""
    crop = preprocessing.size if crop is None else crop
    imported("PIL.Image", "images", "pillow")  # here, because a worker prints a traceback
    dataset = _Files(files, preprocessing, crop)
    yield from torch.utils.data.DataLoader(
        dataset,
        batch_sampler=chosen,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # by default a loader draws from the global generator
    )


class _Files(torch.utils.data.Dataset):
    """The Dataset of the workers; an error is text, so that no traceback is printed."""

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing, crop: int) -> None:
        self.files, self.preprocessing, self.crop = files, preprocessing, crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, read_image(self.files[index], self.preprocessing, self.crop)
        except ValueError as error:
            return index, str(error)

    def collate(self, items: Sequence[tuple[int, Tensor | str]]) -> Batch:
        read = [(place, x) for place, x in items if isinstance(x, Tensor)]
        none = torch.empty(0, self.preprocessing.channels, self.crop, self.crop, dtype=torch.uint8)
        return Batch(
            torch.stack([x for _, x in read]) if read else none,
            torch.tensor([place for place, _ in read], dtype=torch.int64),
            {str(self.files[place]): why for place, why in items if isinstance(why, str)},
        )
