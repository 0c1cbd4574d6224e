"""Augmentation of whole batches on the training device, from an explicit generator.

Random numbers are drawn for the batch of all processes, and each process takes its `share`: the
result does not depend on the number of processes.
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
    """Random numbers for the `total` images of a step; this process takes `share`."""

    generator: torch.Generator
    total: int
    share: slice

    def integers(self, high: int) -> Tensor:
        """Uniform in 0 … high − 1, one per image of the share."""
        where = {"generator": self.generator, "device": self.generator.device}
        return torch.randint(high, (self.total,), **where)[self.share]

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform in [low, high), one per image of the share."""
        where = {"generator": self.generator, "device": self.generator.device}
        return low + (high - low) * torch.rand(self.total, **where)[self.share]


def augment(name: str, x: Tensor, size: int, draws: Draws) -> Tensor:
    """Augment x [N,C,H,W], the share of `draws`, by `name` of AUGMENTATIONS: [N,C,size,size].

    none: centre crop.
    crop: size / 8 zeros on every side, then a random window (He et al. 2015, section 4.2).
    flip: half of the images are mirrored left to right.
    resized-crop: a random box of random shape, resized (Szegedy et al. 2014, arXiv:1409.4842).
    """
    if name == "none":
        return centre_crop(x, size)
    if name == "resized-crop-flip":
        x = resized_crop(x, size, draws)
    else:
        x = pad_crop(x, size, size // 8, draws)
    return flip(x, draws) if name.endswith("flip") else x


def centre_crop(x: Tensor, size: int) -> Tensor:
    """The middle size × size pixels of x [N,C,H,W]; a smaller side is kept."""
    top, left = (max(side - size, 0) // 2 for side in x.shape[2:])
    return x[:, :, top : top + size, left : left + size]


def pad_crop(x: Tensor, size: int, pad: int, draws: Draws) -> Tensor:
    """A random size × size window of x, padded by `pad` zeros on every side; channels_last."""
    side = torch.arange(size, device=x.device)
    padded = F.pad(x, (pad,) * 4)
    rows = draws.integers(padded.size(2) - size + 1).view(-1, 1, 1) + side.view(-1, 1)
    columns = draws.integers(padded.size(3) - size + 1).view(-1, 1, 1) + side
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return padded[image, :, rows, columns].permute(0, 3, 1, 2)


def flip(x: Tensor, draws: Draws) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    return torch.where(draws.integers(2).bool().view(-1, 1, 1, 1), x.flip(3), x)


def resized_crop(x: Tensor, size: int, draws: Draws) -> Tensor:
    """A random box of each image, resized bilinearly to size × size; floats.

    Its share of the image's area is in AREA, its width over its height in RATIO. A box wider or
    higher than the image is cut to the image.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    h, w = x.shape[2:]
    area = draws.uniform(*AREA)
    low, high = torch.tensor(RATIO).log().tolist()
    ratio = draws.uniform(low, high).exp()
    wide = (area * ratio * h / w).sqrt().clamp(max=1)  # of the image's width
    tall = (area / ratio * w / h).sqrt().clamp(max=1)
    # grid_sample's coordinates of the image are [-1, 1]; a box is given by half-width and centre.
    centre_x = draws.uniform(-1, 1) * (1 - wide)
    centre_y = draws.uniform(-1, 1) * (1 - tall)
    zero = torch.zeros_like(wide)
    theta = torch.stack([
        torch.stack([wide, zero, centre_x], 1), torch.stack([zero, tall, centre_y], 1)
    ], 1)  # [N,2,3]  # fmt: skip
    grid = F.affine_grid(theta, [len(x), x.size(1), size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
