"""Image files: find them in a folder, and read them as a model's input.

Which files are images follows torchvision's `ImageFolder`; what cannot be an image is counted in
`Skipped` with the reason.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.files import opened, reason
from ..runtime.optional import MissingPackage, imported
from .preprocessing import Preprocessing
from .transforms import Transform, seeded

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
)  # fmt: skip
# Pillow's other formats are rare, and one runs a program: Ghostscript for EPS.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "DIB", "PPM", "GIF")
HIDDEN = "hidden"
NOT_FINITE = "it has values that are not finite"
MARGIN = 2  # a JPEG is decoded at no less than this multiple of the size it is resized to
SCALES = (8, 4, 2)  # at which a JPEG can be decoded smaller
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


def read_image(path: str | Path, preprocessing: Preprocessing, crop: int | None = None) -> Tensor:
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
    crop = preprocessing.size if crop is None else crop
    return _read(path, lambda Image, image: _pixels(Image, image, preprocessing, crop))


def read_augmented(
    path: str | Path, preprocessing: Preprocessing, transform: Transform, seed: int
) -> Tensor:
    """Read an image as uint8 [C, size, size], augmented by `transform` from `seed`.

    The same pixels as torchvision's v2 transforms from this seed: RandomResizedCrop (bilinear) of
    the whole image, RandomHorizontalFlip, RandAugment, RandomErasing. A JPEG whose crop is at least
    four times the size is decoded at a half, a quarter or an eighth, so that the crop is still at
    least twice the size. 16-bit values and floats as `read_image`.

    Raises:
        ValueError, MissingPackage: as `read_image`; MissingPackage for torchvision too.
    """
    return _read(path, lambda Image, image: _crop(Image, image, preprocessing, transform, seed))


def _read(path: str | Path, pixels: Callable[[Any, Any], Tensor]) -> Tensor:
    """pixels(PIL.Image, the opened image); ValueError names the file."""
    Image = imported("PIL.Image", "images", "pillow")
    try:
        with opened(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not read here
            with Image.open(file, formats=FORMATS) as image:
                if min(image.size) < 1:
                    raise ValueError(f"{image.width} × {image.height} pixels")
                return pixels(Image, image)
    except MissingPackage:
        raise
    except Image.UnidentifiedImageError:
        why = f"expected one of {', '.join(FORMATS)}"
    except Exception as error:  # a damaged file may raise any exception
        why = reason(error)
    raise ValueError(f"{path}: not a readable image: {why}")


def _pixels(Image: Any, image: Any, preprocessing: Preprocessing, crop: int) -> Tensor:
    sides = image.size
    width, height = (preprocessing.resize * side // min(sides) for side in sides)
    image.draft(None, (MARGIN * width, MARGIN * height))
    image, scale = _converted(image, preprocessing.channels)
    interpolation = Image.Resampling[preprocessing.interpolation.upper()]
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    box = left, top, left + crop, top + crop
    if width * height > MOST_CROPS * crop * crop:
        across, down = image.width / width, image.height / height
        box = box[0] * across, box[1] * down, box[2] * across, box[3] * down
        image = image.resize((crop, crop), interpolation, box)
    else:
        image = image.resize((width, height), interpolation).crop(box)
    x = torch.from_numpy(_levels(image, scale).reshape(crop, crop, -1)).permute(2, 0, 1)
    return x.expand(preprocessing.channels, -1, -1)


def _crop(
    Image: Any, image: Any, preprocessing: Preprocessing, transform: Transform, seed: int
) -> Tensor:
    size, width, height = preprocessing.size, *image.size
    with seeded(seed):
        box = transform.box(image, size)
        room = min(box[2] - box[0], box[3] - box[1]) // (MARGIN * size)
        scale = next((scale for scale in SCALES if scale <= room), 1)
        if image.draft(None, (width // scale, height // scale)) is None:
            scale = 1  # not a JPEG
        box = tuple(round(side / scale) for side in box)
        image, levels = _converted(image, preprocessing.channels)
        interpolation = Image.Resampling[preprocessing.interpolation.upper()]
        image = image.crop(box).resize((size, size), interpolation)
        if levels is not None:
            image = _coloured(Image.fromarray(_levels(image, levels)), preprocessing.channels)
        return transform.cropped(image, preprocessing.mean)


def _converted(image: Any, channels: int) -> tuple[Any, tuple[float, float] | None]:
    """The image as L or RGB; or, of integers or floats, as F with what becomes 0 and 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return _coloured(image, channels), None
    usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    image = image.convert("F")
    return image, _range(*image.getextrema(), usual)


def _coloured(image: Any, channels: int) -> Any:
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _levels(image: Any, scale: tuple[float, float] | None) -> np.ndarray:
    """The pixels as uint8; `scale` is of `_converted`."""
    values = np.array(image)
    if scale is None:
        return values
    values = (values - scale[0]) * (255 / (scale[1] - scale[0]))
    if not np.isfinite(values).all():
        raise ValueError(NOT_FINITE)
    return np.rint(values).clip(0, 255).astype(np.uint8)


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
