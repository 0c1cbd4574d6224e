"""Models for CIFAR: 32×32 images, 10 classes by default.

`cifar_…` nets (He et al. 2015, section 4.2): a 3×3 stem of 16 filters and three stages of n blocks
with 16, 32, 64 planes. Depth is 6n + 2 with basic blocks, 9n + 2 with bottlenecks. Basic blocks
have zero-pad shortcuts (option A), bottlenecks projections, as in the papers. The `options` of
every function are those of `ResNet`. Counts are parameters with 10 classes.
"""

from __future__ import annotations

from typing import Any

from ..blocks import ResidualBlock
from ..modules import BasicBlock, PreActBasicBlock, PreActBottleneck
from .registry import register
from .resnet import ResNet


def _cifar(
    block: type[ResidualBlock], n: int, shortcut: str | None, num_classes: int = 10, **options: Any
) -> ResNet:
    return ResNet(
        block, [n, n, n], num_classes, shortcut=shortcut, stem="cifar", planes=16, **options
    )


@register
def cifar_resnet20(**options: Any) -> ResNet:
    """ResNet-20 of n = 3, 0.27 M (arXiv:1512.03385, table 6)."""
    return _cifar(BasicBlock, 3, "zero_pad", **options)


@register
def cifar_resnet32(**options: Any) -> ResNet:
    """ResNet-32 of n = 5, 0.46 M (arXiv:1512.03385, table 6)."""
    return _cifar(BasicBlock, 5, "zero_pad", **options)


@register
def cifar_resnet44(**options: Any) -> ResNet:
    """ResNet-44 of n = 7, 0.66 M (arXiv:1512.03385, table 6)."""
    return _cifar(BasicBlock, 7, "zero_pad", **options)


@register
def cifar_resnet56(**options: Any) -> ResNet:
    """ResNet-56 of n = 9, 0.85 M (arXiv:1512.03385, table 6)."""
    return _cifar(BasicBlock, 9, "zero_pad", **options)


@register
def cifar_resnet110(**options: Any) -> ResNet:
    """ResNet-110 of n = 18, 1.73 M (arXiv:1512.03385, table 6)."""
    return _cifar(BasicBlock, 18, "zero_pad", **options)


@register
def plain_cifar_resnet20(**options: Any) -> ResNet:
    """`cifar_resnet20` without shortcuts, 0.27 M (arXiv:1512.03385, section 4.2)."""
    return _cifar(BasicBlock, 3, "none", **options)


@register
def plain_cifar_resnet32(**options: Any) -> ResNet:
    """`cifar_resnet32` without shortcuts, 0.46 M (arXiv:1512.03385, section 4.2)."""
    return _cifar(BasicBlock, 5, "none", **options)


@register
def plain_cifar_resnet44(**options: Any) -> ResNet:
    """`cifar_resnet44` without shortcuts, 0.66 M (arXiv:1512.03385, section 4.2)."""
    return _cifar(BasicBlock, 7, "none", **options)


@register
def plain_cifar_resnet56(**options: Any) -> ResNet:
    """`cifar_resnet56` without shortcuts, 0.85 M (arXiv:1512.03385, section 4.2)."""
    return _cifar(BasicBlock, 9, "none", **options)


@register
def plain_cifar_resnet110(**options: Any) -> ResNet:
    """`cifar_resnet110` without shortcuts, 1.73 M (arXiv:1512.03385, section 4.2)."""
    return _cifar(BasicBlock, 18, "none", **options)


@register
def cifar_preact_resnet110(**options: Any) -> ResNet:
    """Pre-activation ResNet-110 of n = 18, 1.73 M (arXiv:1603.05027, table 2)."""
    return _cifar(PreActBasicBlock, 18, "zero_pad", **options)


@register
def cifar_preact_resnet164(**options: Any) -> ResNet:
    """Pre-activation ResNet-164: bottlenecks, n = 18, 1.70 M (arXiv:1603.05027, table 4)."""
    return _cifar(PreActBottleneck, 18, None, **options)


@register
def cifar_preact_resnet1001(**options: Any) -> ResNet:
    """Pre-activation ResNet-1001: bottlenecks, n = 111, 10.33 M (arXiv:1603.05027, table 4).

    The paper's 10.2 M count only the filters and fc.
    """
    return _cifar(PreActBottleneck, 111, None, **options)


@register
def small_resnet(num_classes: int = 10, **options: Any) -> ResNet:
    """ResNet-18 for 32×32 images: a 3×3 stem without pooling, 11.17 M."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes, stem="cifar", **options)
