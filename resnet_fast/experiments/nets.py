"""Nets of a given depth.

The family is He et al. 2015's for CIFAR (arXiv:1512.03385, section 4.2): a 3×3 stem and three
stages of n basic blocks, 6n + 2 layers. `chain` has neither blocks nor shortcuts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .. import blocks
from ..blocks import ResidualBlock
from ..models import ResNet
from ..modules import PLAIN, BasicBlock, ConvBNAct2d, GlobalAvgPool2d

PLANES = 16
STAGES = 4  # of a chain


def blocks_of(depth: int) -> int:
    """n of a net with 6n + 2 layers; ValueError for any other depth."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth: expected 6n + 2 layers (8, 14, 20, …), got {depth}")
    return n


def net(
    depth: int | Sequence[int],
    shortcut: str | None,
    *,
    block: type[ResidualBlock] = BasicBlock,
    num_classes: int = 10,
    in_channels: int = 3,
    planes: int = PLANES,
    impl: str = "auto",
) -> ResNet:
    """A net of `depth` layers with the `shortcut` of `ResNet`; "none" makes it plain.

    A list in place of `depth` has the number of blocks of every stage.

    impl="reference" builds it from plain PyTorch modules, without the fused ones; a seed gives the
    same parameters.
    """
    plain = impl == "reference"
    options = {"fused": False} if plain else {"impl": impl}
    layers = [blocks_of(depth)] * 3 if isinstance(depth, int) else depth
    return ResNet(
        PLAIN.get(block, block) if plain else block, layers, num_classes, shortcut=shortcut,
        stem="cifar", planes=planes, in_channels=in_channels, **options,
    ).to(memory_format=torch.channels_last)  # fmt: skip


def chain(
    depth: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    planes: int = PLANES,
    impl: str = "auto",
) -> nn.Sequential:
    """`depth` layers of 3×3 convolution, BatchNorm and ReLU in four stages, pooling, a classifier.

    Each later stage starts with stride 2 and twice the channels. Initialization and `impl` are as
    in `net`.
    """
    plain = impl == "reference"
    layers: list[nn.Module] = []
    channels = in_channels
    for i in range(depth):
        width = planes * 2 ** (STAGES * i // depth)
        stride = 2 if layers and width != channels else 1
        layers.append(
            blocks.ConvBNAct2d(channels, width, 3, stride) if plain
            else ConvBNAct2d(channels, width, 3, stride, impl=impl)
        )  # fmt: skip
        channels = width
    pool = nn.AdaptiveAvgPool2d(1) if plain else GlobalAvgPool2d(impl=impl)
    model = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def without_norms(model: nn.Module) -> nn.Module:
    """A copy of `model` in plain PyTorch without its normalizations."""
    from ..fusion.api import unfuse

    model = unfuse(copy.deepcopy(model))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model
