"""Nets of a given depth.

The family is He et al. 2015's for CIFAR (arXiv:1512.03385, section 4.2): a 3×3 stem and three
stages of n basic blocks, 6n + 2 layers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..blocks import ResidualBlock
from ..models import ResNet
from ..modules import PLAIN, BasicBlock

PLANES = 16


def blocks_of(depth: int) -> int:
    """n of a net with 6n + 2 layers; ValueError for any other depth."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth: expected 6n + 2 layers (8, 14, 20, …), got {depth}")
    return n


def net(
    depth: int,
    shortcut: str | None,
    *,
    block: type[ResidualBlock] = BasicBlock,
    num_classes: int = 10,
    in_channels: int = 3,
    planes: int = PLANES,
    impl: str = "auto",
) -> ResNet:
    """A net of `depth` layers with the `shortcut` of `ResNet`; "none" makes it plain.

    impl="reference" builds it from plain PyTorch modules, without the fused ones; a seed gives the
    same parameters.
    """
    plain = impl == "reference"
    options = {"fused": False} if plain else {"impl": impl}
    return ResNet(
        PLAIN.get(block, block) if plain else block, [blocks_of(depth)] * 3, num_classes,
        shortcut=shortcut, stem="cifar", planes=planes, in_channels=in_channels, **options,
    ).to(memory_format=torch.channels_last)  # fmt: skip


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
