"""From an image to a model's input. A checkpoint stores it, for prediction to repeat."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..models.pretrained import IMAGENET_MEAN, IMAGENET_STD
from ..spec.values import given, integer, is_number

INTERPOLATIONS = ("bilinear", "bicubic")
MOST_SIZE = 2048  # pixels; a file may not ask for more
MOST_RESIZE = 4 * MOST_SIZE
MOST_CHANNELS = 64


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalize: (x − mean) / std per channel.

    Attributes:
        size: height and width of the crop, in pixels.
        resize: length of the shorter side before the crop, in pixels.
        mean: one value per channel, for x in [0, 1].
        std: one value per channel, for x in [0, 1].
        interpolation: of the resize, "bilinear" or "bicubic", with antialiasing.

    Raises:
        ValueError: an attribute is invalid; the message names it.
    """

    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = INTERPOLATIONS[0]

    def __post_init__(self) -> None:
        integer(self.size, "size", "at least 1 pixel", 1, MOST_SIZE)
        expected = f"at least the size, {self.size} pixels"
        integer(self.resize, "resize", expected, self.size, MOST_RESIZE)
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, tuple) and all(is_number(v) for v in value)
            if not numbers or not 1 <= len(value) <= MOST_CHANNELS:
                raise ValueError(f"{name}: expected one number per channel, got {given(value)}")
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"std: expected {len(self.mean)} numbers above 0, got {given(self.std)}"
            )
        if not isinstance(self.interpolation, str) or self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got "
                f"{given(self.interpolation)}"
            )

    @classmethod
    def of(cls, values: Any) -> Preprocessing:
        """From its attributes as a file has them: a dict, with lists or tuples.

        A file without interpolation is of before there was one, when it was "bilinear".

        Raises:
            ValueError: they are no such dict, or one is invalid.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(values, dict):
            values = {"interpolation": INTERPOLATIONS[0], **values}
        if not isinstance(values, dict) or values.keys() != set(names):
            raise ValueError(
                f"preprocessing: expected a dict of {', '.join(names)}, got {given(values)}"
            )
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**plain)
        except ValueError as error:
            raise ValueError(f"preprocessing: {error}") from None

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

