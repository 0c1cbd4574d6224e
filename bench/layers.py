"""The convolutions of a model as shapes, each once, with how often it occurs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import resnet_fast
from resnet_fast.blocks import ChainBlock
from resnet_fast.chain import Conv


@dataclass(frozen=True)
class Layer:
    """A convolution [N,C,H,W] → [N,K,P,Q] with its normalization, and whether a residual is added.

    relu: false for a projection. bytes and flops are for a batch of n, 2 a multiply-add.
    """

    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    conv: Conv
    residual: bool = False
    relu: bool = True

    @property
    def out_size(self) -> tuple[int, int]:
        """P, Q."""
        height = self.conv.output_size(self.height, self.kernel[0], 0)
        return height, self.conv.output_size(self.width, self.kernel[1], 1)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K,C/groups,R,S]."""
        return self.filters, self.channels // self.conv.groups, *self.kernel

    def shapes(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of x and y for a batch of n."""
        return (n, self.channels, self.height, self.width), (n, self.filters, *self.out_size)

    def flops(self, n: int) -> int:
        """Floating point operations of the convolution."""
        k, c, r, s = self.weight_shape
        p, q = self.out_size
        return 2 * n * p * q * k * c * r * s

    def bytes(self, n: int, size: int) -> int:
        """Bytes that inference must move: x, filters, residual and y once, `size` an element."""
        x, y = (torch.Size(shape).numel() for shape in self.shapes(n))
        return size * (x + torch.Size(self.weight_shape).numel() + y * (1 + self.residual))

    def __str__(self) -> str:
        r, stride = self.kernel[0], self.conv.stride[0]
        name = f"{r}x{r}/{stride} {self.channels}>{self.filters} @{self.height}"
        return name + ("+res" if self.residual else "")


def layers_of(model: str, image: int = 224) -> dict[Layer, int]:
    """Every different convolution of `model` on images of `image` pixels, and how many of each."""
    found: Counter[Layer] = Counter()

    ends: dict[nn.Module, tuple[bool, bool]] = {}  # residual, relu; others: False, True

    def seen(module: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        _, channels, height, width = inputs[0].shape
        conv = Conv(module.stride, module.padding, module.dilation, module.groups)
        size = (channels, height, width, module.out_channels, module.kernel_size)
        found[Layer(*size, conv, *ends.get(module, (False, True)))] += 1

    with torch.device("meta"):
        net = resnet_fast.unfuse(resnet_fast.create_model(model, impl="reference")).eval()
        for block in net.modules():
            if isinstance(block, ChainBlock):
                parts = block.parts()
                ends[parts.convs[-1]] = parts.shortcut != "none", parts.relu
                ends[parts.projection] = False, False
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(seen)
        net(torch.empty(1, 3, image, image))
    return dict(found)
