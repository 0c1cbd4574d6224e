"""From an image to a model's input. A checkpoint stores it, for prediction to repeat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime.optional import imported

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalize: (x − mean) / std per channel.

    Attributes:
        size: height and width of the crop, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        mean: one value per channel, for x in [0, 1].
        std: one value per channel, for x in [0, 1].
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def at(self, size: int) -> Preprocessing:
        """The same for inputs of another size; `resize` is scaled in proportion."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))

    def normalize(self, x: Tensor) -> Tensor:
        """(x − mean) / std of x [N,C,H,W]; uint8 counts as x / 255. fp32, in x's memory format."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        constants = torch.tensor([self.mean, self.std], device=x.device)
        mean, std = constants.view(2, 1, -1, 1, 1)
        return (x - mean) / std


class Inputs:
    """Mixin of a data set with `classes` and `preprocessing`: sizes that a model needs."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def channels(self) -> int:
        return self.preprocessing.channels

    @property
    def size(self) -> int:
        """Height and width of an input."""
        return self.preprocessing.size


def imagenet(size: int = 224) -> Preprocessing:
    """ImageNet's: shorter side to 256, centre crop 224 × 224 (He et al. 2015, section 3.4)."""
    return Preprocessing(size, round(size * 256 / 224), IMAGENET_MEAN, IMAGENET_STD)


def read_image(path: Path, preprocessing: Preprocessing, crop: int | None = None) -> Tensor:
    """Read an image as uint8 [C, crop, crop], resized and centre-cropped; None is `size`.

    The same pixels as torchvision's `Resize` and `CenterCrop`.

    Raises:
        ValueError: the file is missing, damaged or not an image; the message names it.
        MissingPackage: Pillow is not installed.
    """
    Image = imported("PIL.Image", "images", "pillow")
    crop = preprocessing.size if crop is None else crop
    mode = "L" if preprocessing.channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            image = image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image: {error}") from None
    width, height = (preprocessing.resize * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    image = image.crop((left, top, left + crop, top + crop))
    values = np.asarray(image, dtype=np.uint8)
    return torch.from_numpy(values.reshape(crop, crop, -1).copy()).permute(2, 0, 1)
