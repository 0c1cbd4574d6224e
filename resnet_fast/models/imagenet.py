"""Models for ImageNet: 224×224 images, 1000 classes by default.

The `options` of every function are those of `ResNet`. The 3×3 convolution of a bottleneck has the
stride ("v1.5"). Counts are parameters with 1000 classes.
"""

from __future__ import annotations

from typing import Any

from ..modules import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from .registry import register
from .resnet import ResNet


@register
def resnet18(**options: Any) -> ResNet:
    """ResNet-18, 11.69 M (arXiv:1512.03385, table 1)."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **options)


@register
def resnet34(**options: Any) -> ResNet:
    """ResNet-34, 21.80 M (arXiv:1512.03385, table 1)."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **options)


@register
def resnet50(**options: Any) -> ResNet:
    """ResNet-50, 25.56 M (arXiv:1512.03385, table 1)."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **options)


@register
def resnet101(**options: Any) -> ResNet:
    """ResNet-101, 44.55 M (arXiv:1512.03385, table 1)."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **options)


@register
def resnet152(**options: Any) -> ResNet:
    """ResNet-152, 60.19 M (arXiv:1512.03385, table 1)."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **options)


@register
def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50: 32 groups of 4 channels, 25.03 M (arXiv:1611.05431, table 1)."""
    return ResNet(Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4, **options)


@register
def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101: 32 groups of 8 channels, 88.79 M (arXiv:1611.05431, table 1)."""
    return ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8, **options)


@register
def resnext101_64x4d(**options: Any) -> ResNet:
    """ResNeXt-101: 64 groups of 4 channels, 83.46 M (arXiv:1611.05431, table 1)."""
    return ResNet(Bottleneck, [3, 4, 23, 3], groups=64, width_per_group=4, **options)


@register
def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50: 3×3 convolutions twice as wide, 68.88 M (arXiv:1605.07146)."""
    return ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=128, **options)


@register
def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101: 3×3 convolutions twice as wide, 126.89 M (arXiv:1605.07146)."""
    return ResNet(Bottleneck, [3, 4, 23, 3], width_per_group=128, **options)


@register
def preact_resnet18(**options: Any) -> ResNet:
    """Pre-activation ResNet-18, 11.69 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBasicBlock, [2, 2, 2, 2], **options)


@register
def preact_resnet34(**options: Any) -> ResNet:
    """Pre-activation ResNet-34, 21.80 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBasicBlock, [3, 4, 6, 3], **options)


@register
def preact_resnet50(**options: Any) -> ResNet:
    """Pre-activation ResNet-50, 25.55 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBottleneck, [3, 4, 6, 3], **options)


@register
def preact_resnet101(**options: Any) -> ResNet:
    """Pre-activation ResNet-101, 44.54 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBottleneck, [3, 4, 23, 3], **options)


@register
def preact_resnet152(**options: Any) -> ResNet:
    """Pre-activation ResNet-152, 60.19 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBottleneck, [3, 8, 36, 3], **options)


@register
def preact_resnet200(**options: Any) -> ResNet:
    """Pre-activation ResNet-200, 64.67 M (arXiv:1603.05027, appendix)."""
    return ResNet(PreActBottleneck, [3, 24, 36, 3], **options)


@register
def plain_resnet18(**options: Any) -> ResNet:
    """`resnet18` without shortcuts, 11.52 M (arXiv:1512.03385, section 4.1)."""
    return ResNet(BasicBlock, [2, 2, 2, 2], shortcut="none", **options)


@register
def plain_resnet34(**options: Any) -> ResNet:
    """`resnet34` without shortcuts, 21.62 M (arXiv:1512.03385, section 4.1)."""
    return ResNet(BasicBlock, [3, 4, 6, 3], shortcut="none", **options)
