"""From an image to a model's input: what a checkpoint keeps so that prediction can repeat it."""

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
    """Shorter side to `resize`, the middle `size` × `size`, then (x − mean) / std a channel.

    mean and std are of values in [0, 1], one a channel.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def at(self, size: int) -> Preprocessing:
        """The same for inputs of another size, `resize` in proportion."""
        return replace(self, size=size, resize=round(self.resize * size / self.size))

    def normalize(self, x: Tensor) -> Tensor:
        """(x − mean) / std of x [N,C,H,W]; bytes count as 255ths. fp32, x's memory format."""
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        constants = torch.tensor([self.mean, self.std], device=x.device)
        mean, std = constants.view(2, 1, -1, 1, 1)
        return (x - mean) / std


class Inputs:
    """Mixin of a data set with `classes` and `preprocessing`: what a model of it looks like."""

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
    """ImageNet's: shorter side to 256, the middle 224 × 224 (He et al. 2015, section 3.4)."""
    return Preprocessing(size, round(size * 256 / 224), IMAGENET_MEAN, IMAGENET_STD)


def read_image(path: Path, preprocessing: Preprocessing, crop: int | None = None) -> Tensor:
    """The image as bytes [C, crop, crop], resized and cut from the middle; crop None is `size`.

    The same pixels as torchvision's `Resize` and `CenterCrop` take.

    Raises:
        ValueError: naming the file, for one that is missing or no image.
        MissingPackage: without Pillow.
    """
    Image = imported("PIL.Image", "images", "pillow")
    crop = preprocessing.size if crop is None else crop
    mode = "L" if preprocessing.channels == 1 else "RGB"
    try:
        with Image.open(path) as image:
            image = image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no image that can be read: {error}") from None
    width, height = (preprocessing.resize * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    image = image.crop((left, top, left + crop, top + crop))
    values = np.asarray(image, dtype=np.uint8)
    return torch.from_numpy(values.reshape(crop, crop, -1).copy()).permute(2, 0, 1)
