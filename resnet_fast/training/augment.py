"""Augmentation of whole batches on the device that trains, from an explicit generator.

The numbers are drawn for the batch of all processes, and a process takes its `share`: what an image
becomes does not depend on how many processes there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "crop", "crop-flip", "resized-crop-flip")
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Draws:
    """Random numbers for the `total` images of a step, of which this process has `share`."""

    generator: torch.Generator
    total: int
    share: slice

    def integers(self, high: int) -> Tensor:
        """Uniform in 0 … high − 1, one an image of the share."""
        where = {"generator": self.generator, "device": self.generator.device}
        return torch.randint(high, (self.total,), **where)[self.share]

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform in [low, high), one an image of the share."""
        where = {"generator": self.generator, "device": self.generator.device}
        return low + (high - low) * torch.rand(self.total, **where)[self.share]


def augment(name: str, x: Tensor, size: int, draws: Draws) -> Tensor:
    """x [N,C,H,W] of `draws`' share, changed as `name` of AUGMENTATIONS says: [N,C,size,size].

    none: the middle.
    crop: padded by size / 8 zeros a side, a random window (He et al. 2015, section 4.2).
    flip: mirrored, half of the images.
    resized-crop: a random part of random shape, resized (Szegedy et al. 2014, arXiv:1409.4842).
    """
    if name == "none":
        top, left = (x.size(2) - size) // 2, (x.size(3) - size) // 2
        return x[:, :, top : top + size, left : left + size]
    if name == "resized-crop-flip":
        x = resized_crop(x, size, draws)
    else:
        x = pad_crop(x, size, size // 8, draws)
    return flip(x, draws) if name.endswith("flip") else x


def pad_crop(x: Tensor, size: int, pad: int, draws: Draws) -> Tensor:
    """A window of size × size out of x with `pad` zeros on every side; channels_last."""
    side = torch.arange(size, device=x.device)
    padded = F.pad(x, (pad,) * 4)
    rows = draws.integers(padded.size(2) - size + 1).view(-1, 1, 1) + side.view(-1, 1)
    columns = draws.integers(padded.size(3) - size + 1).view(-1, 1, 1) + side
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)


def flip(x: Tensor, draws: Draws) -> Tensor:
    """Every image mirrored left to right with probability 1/2."""
    return torch.where(draws.integers(2).bool().view(-1, 1, 1, 1), x.flip(3), x)


def resized_crop(x: Tensor, size: int, draws: Draws) -> Tensor:
    """A box of AREA of the image and RATIO of width to height, bilinear to size × size; floats.

    A box that would be too wide or too high is cut to the image.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    h, w = x.shape[2:]
    area = draws.uniform(*AREA)
    low, high = torch.tensor(RATIO).log().tolist()
    ratio = draws.uniform(low, high).exp()
    wide = (area * ratio * h / w).sqrt().clamp(max=1)  # of the image's width
    tall = (area / ratio * w / h).sqrt().clamp(max=1)
    # In grid_sample's coordinates the image is [-1, 1]: a box is its half-width and its centre.
    centre_x = draws.uniform(-1, 1) * (1 - wide)
    centre_y = draws.uniform(-1, 1) * (1 - tall)
    zero = torch.zeros_like(wide)
    theta = torch.stack([
        torch.stack([wide, zero, centre_x], 1), torch.stack([zero, tall, centre_y], 1)
    ], 1)  # [N,2,3]  # fmt: skip
    grid = F.affine_grid(theta, [len(x), x.size(1), size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
