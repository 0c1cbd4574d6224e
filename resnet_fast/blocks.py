"""Blocks in plain PyTorch: children, shape rules and the forward pass of the papers.

They specify `resnet_fast.modules`, which inherits everything but `forward`, and
`resnet_fast.unfuse` returns them. Children have torchvision's names, so state dicts load in both
directions. He et al. 2015 (arXiv:1512.03385); 2016 (arXiv:1603.05027, fig. 4e).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec.chain import Norm
from .spec.layers import NORMS, Parts
from .spec.values import check_callable, check_flag, check_number, integer

SHORTCUTS = ("identity", "projection", "zero_pad", "none")
CONVS, BNS = ("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3")


class ChainBlock(nn.Module):
    """A module whose children form a chain: `forward` calls them, `parts` names them."""

    def parts(self) -> Parts | None:
        """The chain's children, in order; None if they no longer form a chain."""
        raise NotImplementedError


def zero_pad(x: Tensor, stride: int, channels: int) -> Tensor:
    """Option A of He et al. 2015 (section 3.3): every stride-th pixel, zeros in new channels."""
    x = x[:, :, ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.size(1)))


class ConvBNAct2d(ChainBlock):
    """Convolution without bias, BatchNorm, optional residual addition and ReLU, in plain PyTorch.

    `y = relu(bn(conv(x)) + residual)`; the children are `conv` and `bn`.

    Args:
        in_channels: channels C of x.
        out_channels: channels K of y.
        kernel_size: height and width of the filters.
        stride: stride of the convolution.
        padding: zero padding on each side; None is ⌊dilation·(kernel_size − 1) / 2⌋, which keeps
            the image size at stride 1 for odd kernel_size.
        dilation: spacing of the filter's elements.
        groups: number of groups of channels.
        eps: added to the variance before the square root.
        momentum: weight of the batch in the running statistics, as in `nn.BatchNorm2d`.
        relu: whether to apply the ReLU.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        relu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in {
            "in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size,
            "stride": stride, "dilation": dilation, "groups": groups,
        }.items():  # fmt: skip
            integer(value, name, "a positive integer", 1)
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        integer(padding, "padding", "an integer of at least 0 or None", 0)
        check_flag(relu, "relu")
        if momentum is not None:
            check_number(momentum, "momentum")
        Norm(eps)  # checks it
        where: Any = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            bias=False, **where,
        )  # fmt: skip
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **where)
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y [N,K,P,Q] for x [N,C,H,W]; `residual` [N,K,P,Q] is added before the ReLU."""
        h = self.bn(self.conv(x))
        if residual is not None:
            h = h + residual
        return F.relu(h) if self.relu else h

    def parts(self) -> Parts:
        return Parts((self.conv,), (None, self.bn), self.relu, "none")


class ResidualBlock(ChainBlock):
    """Base of the four residual blocks: builds the children and the shortcut.

    Args:
        inplanes: channels of x.
        planes: channels of the block before its expansion; y has `planes * expansion`.
        stride: stride of one 3×3 convolution and of the shortcut.
        downsample: the projection shortcut, as torchvision passes it: `Sequential(Conv2d,
            BatchNorm2d)`; for pre-activation blocks a `Conv2d`. None builds the one that
            `shortcut` names.
        base_width: width of a bottleneck's group per 64 planes (ResNeXt, Wide ResNet); basic blocks
            need 64.
        dilation: dilation of the 3×3 convolutions.
        norm_layer: function of a channel count that returns an `nn.BatchNorm2d` or
            `nn.SyncBatchNorm`; None is `nn.BatchNorm2d`.
        shortcut: "identity", "projection", "zero_pad" (option A of He et al. 2015, section 3.3),
            "none" (no shortcut), or None: a projection if stride or channels change or `downsample`
            is given, else the identity.

    Raises:
        ValueError: an argument is invalid, or the shortcut does not match the shapes; the message
            names the argument.
    """

    expansion = 1
    preactivation = False

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        shortcut: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in {
            "inplanes": inplanes, "planes": planes, "stride": stride, "groups": groups,
            "base_width": base_width, "dilation": dilation,
        }.items():  # fmt: skip
            integer(value, name, "a positive integer", 1)
        check_callable(norm_layer, "norm_layer")
        self.stride = stride
        self.out_channels = planes * self.expansion
        self.width = self._width(planes, base_width, groups)
        norm_layer = norm_layer or nn.BatchNorm2d
        self.depth = self._build(inplanes, stride, groups, dilation, norm_layer)
        for i in range(1, self.depth + 1):
            if not isinstance(getattr(self, f"bn{i}"), NORMS):
                raise ValueError(
                    "norm_layer: expected a function that returns an nn.BatchNorm2d or "
                    "nn.SyncBatchNorm"
                )
        changes = stride != 1 or inplanes != self.out_channels
        if shortcut is None:
            shortcut = "projection" if changes or downsample is not None else "identity"
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: expected one of {SHORTCUTS} or None, got {shortcut!r}")
        if shortcut == "identity" and changes:
            raise ValueError(
                f"shortcut: 'identity' needs stride 1 and equal channels, got stride {stride}, "
                f"{inplanes} to {self.out_channels} channels"
            )
        if shortcut == "zero_pad" and inplanes > self.out_channels:
            raise ValueError(
                f"shortcut: 'zero_pad' cannot reduce {inplanes} channels to {self.out_channels}; "
                "use 'projection'"
            )
        if downsample is not None and shortcut != "projection":
            raise ValueError(f"downsample: needs shortcut='projection', got shortcut={shortcut!r}")
        self.shortcut = shortcut
        self.downsample = downsample
        if shortcut == "projection" and downsample is None:
            conv = nn.Conv2d(inplanes, self.out_channels, 1, stride, bias=False)
            norm = None if self.preactivation else norm_layer(self.out_channels)
            self.downsample = conv if norm is None else nn.Sequential(conv, norm)
        if shortcut == "projection" and self._projection() is None:
            names = "Conv2d" if self.preactivation else "Conv2d, BatchNorm2d or SyncBatchNorm"
            raise ValueError(f"downsample: expected ({names}), got {self.downsample}")

    def _width(self, planes: int, base_width: int, groups: int) -> int:
        if base_width != 64:
            raise ValueError(f"base_width: expected 64 for a basic block, got {base_width}")
        return planes

    def _build(self, inplanes, stride, groups, dilation, norm_layer) -> int:
        raise NotImplementedError

    def _add_shortcut(self, h: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """h + shortcut(x); a projection reads `first`, the input of the first convolution."""
        if self.shortcut == "identity":
            return h + x
        if self.shortcut == "zero_pad":
            return h + zero_pad(x, self.stride, h.size(1))
        if self.downsample is not None:
            return h + self.downsample(first)
        return h

    def _projection(self) -> tuple[Any, ...] | None:
        """`downsample` as (conv, norm or None, its `Sequential`); None if it is anything else."""
        layers: tuple[nn.Module | None, ...] = (self.downsample,)
        around: tuple[nn.Module, ...] = ()
        if isinstance(self.downsample, nn.Sequential):
            layers, around = tuple(self.downsample), (self.downsample,)
        if len(layers) != (1 if self.preactivation else 2) or not isinstance(layers[0], nn.Conv2d):
            return None
        if self.preactivation:
            return layers[0], None, *around
        return (*layers, *around) if isinstance(layers[1], NORMS) else None

    def parts(self) -> Parts | None:
        held: Any = self._modules  # read at every call; attribute access is slower
        convs = tuple([held[name] for name in CONVS[: self.depth]])
        norms = tuple([held[name] for name in BNS[: self.depth]])
        if None in (norms[1:] if self.preactivation else norms):
            return None
        norms = (*norms, None) if self.preactivation else (None, *norms)
        projection, norm, around = None, None, ()
        if self.shortcut == "projection":
            found = self._projection()
            if found is None:
                return None
            projection, norm, around = found[0], found[1], found[2:]
        return Parts(
            convs, norms, not self.preactivation, self.shortcut, projection, norm,
            stride=self.stride, around=around,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut!r}"


def _conv3x3(inplanes: int, planes: int, stride: int, groups: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


class BasicBlock(ResidualBlock):
    """Plain basic block: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def _build(self, inplanes, stride, groups, dilation, norm_layer) -> int:
        self.conv1 = _conv3x3(inplanes, self.width, stride, groups, dilation)
        self.bn1 = norm_layer(self.width)
        self.conv2 = _conv3x3(self.width, self.out_channels, 1, groups, dilation)
        self.bn2 = norm_layer(self.out_channels)
        return 2

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(self._add_shortcut(h, x, x))


class Bottleneck(ResidualBlock):
    """Plain block: y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))."""

    expansion = 4

    def _width(self, planes: int, base_width: int, groups: int) -> int:
        return int(planes * (base_width / 64.0)) * groups

    def _build(self, inplanes, stride, groups, dilation, norm_layer) -> int:
        self.conv1 = nn.Conv2d(inplanes, self.width, 1, bias=False)
        self.bn1 = norm_layer(self.width)
        self.conv2 = _conv3x3(self.width, self.width, stride, groups, dilation)
        self.bn2 = norm_layer(self.width)
        self.conv3 = nn.Conv2d(self.width, self.out_channels, 1, bias=False)
        self.bn3 = norm_layer(self.out_channels)
        return 3

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(self._add_shortcut(h, x, x))


class PreActBasicBlock(ResidualBlock):
    """Plain block: y = conv2(relu(bn2(conv1(a)))) + shortcut(x), a = relu(bn1(x))."""

    preactivation = True

    def _build(self, inplanes, stride, groups, dilation, norm_layer) -> int:
        self.bn1 = norm_layer(inplanes)
        self.conv1 = _conv3x3(inplanes, self.width, stride, groups, dilation)
        self.bn2 = norm_layer(self.width)
        self.conv2 = _conv3x3(self.width, self.out_channels, 1, groups, dilation)
        return 2

    def forward(self, x: Tensor) -> Tensor:
        a = x if self.bn1 is None else F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return self._add_shortcut(h, x, a)


class PreActBottleneck(ResidualBlock):
    """Plain block: y = conv3(relu(bn3(conv2(relu(bn2(conv1(a))))))) + shortcut(x).

    a = relu(bn1(x)).
    """

    expansion = 4
    preactivation = True
    _width = Bottleneck._width

    def _build(self, inplanes, stride, groups, dilation, norm_layer) -> int:
        self.bn1 = norm_layer(inplanes)
        self.conv1 = nn.Conv2d(inplanes, self.width, 1, bias=False)
        self.bn2 = norm_layer(self.width)
        self.conv2 = _conv3x3(self.width, self.width, stride, groups, dilation)
        self.bn3 = norm_layer(self.width)
        self.conv3 = nn.Conv2d(self.width, self.out_channels, 1, bias=False)
        return 3

    def forward(self, x: Tensor) -> Tensor:
        a = x if self.bn1 is None else F.relu(self.bn1(x))
        h = F.relu(self.bn2(self.conv1(a)))
        h = self.conv3(F.relu(self.bn3(self.conv2(h))))
        return self._add_shortcut(h, x, a)
