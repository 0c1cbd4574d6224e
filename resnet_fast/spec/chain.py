"""A residual block as data: a chain of convolutions and normalizations, and a shortcut.

Every layer of resnet_fast is one `Chain`: n convolutions, n + 1 places for a normalization
(before the first convolution, between two, after the last) and a join with the shortcut.

    conv + BN + ReLU        convs (c,)          norms (-, n)         shortcut none | residual
    conv + bias + ReLU      convs (c,)          norms (-, -)         shortcut none | residual
    a stem                  convs (c,)          norms (-, n)         shortcut none, with a pool
    BN + ReLU               convs ()            norms (n,)           shortcut none | residual
    add + ReLU              convs ()            norms (-,)           shortcut residual
    BasicBlock, Bottleneck  convs (c, c[, c])   norms (-, n, n[, n]) any shortcut
    pre-activation blocks   convs (c, c[, c])   norms (n, n[, n], -) any shortcut, relu=False

With h[0] = x: h[j+1] = conv[j](φ[j](h[j])), φ[j] = relu∘norm[j], or the identity without norm[j].
The join is y = relu(norm[n](h[n]) + s) with an optional ReLU. s is nothing, x ("identity"), another
tensor ("residual") or projection_norm(projection(φ[0](x))) ("projection"). A pool takes the maximum
over windows of relu(norm[n](h[n])).
He et al. 2015 (arXiv:1512.03385, eq. 1 and 2), He et al. 2016 (arXiv:1603.05027, fig. 4e).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .values import check_pair, given, is_number

IMPLS = ("auto", "reference", "native", "triton")
SHORTCUTS = ("none", "identity", "residual", "projection")


@dataclass(frozen=True)
class Conv:
    """Geometry of a convolution: arguments of `torch.nn.functional.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: int, kernel: int, axis: int) -> int:
        """P (axis 0) or Q (axis 1) from H or W: ⌊(size + 2p − d(kernel − 1) − 1) / s⌋ + 1."""
        reach = self.dilation[axis] * (kernel - 1) + 1
        return (size + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    def output_shape(
        self, x: Sequence[int], w: Sequence[int], weight: str = "weight"
    ) -> tuple[int, int, int, int]:
        """[N,K,P,Q] of inputs [N,C,H,W] and filters [K,C/groups,R,S]; errors call them `weight`.

        Raises ValueError if the shapes do not match or the geometry is invalid.
        """
        if len(w) != 4:
            raise ValueError(f"{weight}: expected 4 dimensions [K, C/groups, R, S], got {tuple(w)}")
        groups, whole = self.groups, isinstance(self.groups, int)
        if not whole or isinstance(groups, bool) or groups < 1 or w[0] % groups:
            raise ValueError(f"groups: expected a divisor of {w[0]} filters, got {given(groups)}")
        if w[1] * self.groups != x[1]:
            raise ValueError(
                f"{weight}: expected {x[1]} input channels / {self.groups} groups in dimension 1, "
                f"got shape {tuple(w)}"
            )
        check_pair("stride", self.stride, 1)
        check_pair("padding", self.padding, 0)
        check_pair("dilation", self.dilation, 1)
        p, q = (self.output_size(x[2 + i], w[2 + i], i) for i in (0, 1))
        if min(p, q) < 1:
            raise ValueError(
                f"x: {x[2]}x{x[3]} pixels are too few for a {w[2]}x{w[3]} convolution with "
                f"padding {self.padding} and dilation {self.dilation}"
            )
        return x[0], w[0], p, q

    def args(self) -> tuple[list[int], list[int], list[int], int]:
        """stride, padding, dilation, groups in the order of the ops."""
        return list(self.stride), list(self.padding), list(self.dilation), self.groups


MOST_POSITIONS = 255  # of a window: one byte holds a position, or 255 for none


@dataclass(frozen=True)
class Pool:
    """Windows of a max-pool: arguments of `torch.nn.functional.max_pool2d` without ceil_mode.

    Raises ValueError for an empty window, over 255 positions, or a window that can be all padding.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_pair("kernel", self.kernel, 1)
        check_pair("stride", self.stride, 1)
        check_pair("padding", self.padding, 0)
        if self.kernel[0] * self.kernel[1] > MOST_POSITIONS:
            raise ValueError(
                f"kernel: expected a window of 1 to {MOST_POSITIONS} positions, got {self.kernel}"
            )
        if any(2 * p > k for p, k in zip(self.padding, self.kernel, strict=True)):
            raise ValueError(
                f"padding: expected 0 to half of the kernel {self.kernel}, got {self.padding}"
            )

    def output_shape(self, x: Sequence[int]) -> tuple[int, int, int, int]:
        """[N,C,P,Q] of [N,C,H,W]; ValueError if it has no pixels."""
        windows = Conv(self.stride, self.padding)
        p, q = (windows.output_size(x[2 + i], self.kernel[i], i) for i in (0, 1))
        if min(p, q) < 1:
            raise ValueError(
                f"x: {x[2]}x{x[3]} pixels are too few to pool {self.kernel[0]}x{self.kernel[1]} "
                f"with padding {self.padding}"
            )
        return x[0], x[1], p, q

    def args(self) -> tuple[list[int], list[int], list[int]]:
        """kernel, stride, padding in the order of the ops."""
        return list(self.kernel), list(self.stride), list(self.padding)


@dataclass(frozen=True)
class Norm:
    """One normalization: its eps, and whether it uses batch statistics or running statistics.

    group: the `torch.distributed.ProcessGroup` that shares batch statistics; None uses the batch of
    this process (`resnet_fast.autograd.sync.group_of` returns either).
    """

    eps: float = 1e-5
    batch_stats: bool = True
    group: Any = None

    def __post_init__(self) -> None:
        if not is_number(self.eps) or self.eps < 0:
            raise ValueError(f"eps: expected a finite number of at least 0, got {given(self.eps)}")
        if not isinstance(self.batch_stats, bool):
            raise ValueError(f"batch_stats: expected True or False, got {given(self.batch_stats)}")
        if self.group is not None and not self.batch_stats:
            raise ValueError("group: expected None for a norm with running statistics")


class ConvParams(NamedTuple):
    """Tensors of a convolution: filters [K,C/groups,R,S], bias [K] or None."""

    weight: Tensor
    bias: Tensor | None = None


class NormParams(NamedTuple):
    """Tensors of a normalization, each [C] or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None

    def running(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Running mean and variance in `dtype`; both must exist."""
        assert self.running_mean is not None and self.running_var is not None  # check_chain
        return self.running_mean.to(dtype), self.running_var.to(dtype)


@dataclass(frozen=True)
class Chain:
    """The static half of a block, without tensors (see the docstring of this module).

    keep_activations: True stores φ[j](h[j]) for the backward pass, False recomputes it from h[j],
    "auto" is True on a GPU and for the Triton kernels, which write it to memory anyway, and False
    for the CPU kernels, which compute it on load.
    """

    convs: tuple[Conv, ...]
    norms: tuple[Norm | None, ...]
    relu: bool = True
    shortcut: str = "none"
    projection: Conv | None = None
    projection_norm: Norm | None = None
    keep_activations: bool | str = False
    impl: str = "auto"
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if len(self.norms) != len(self.convs) + 1:
            raise ValueError(
                f"norms: expected {len(self.convs) + 1} entries, one more than convolutions, "
                f"got {len(self.norms)}"
            )
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut: expected one of {SHORTCUTS}, got {self.shortcut!r}")
        if (self.shortcut == "projection") != (self.projection is not None):
            raise ValueError("projection: expected a Conv exactly when shortcut='projection'")
        if self.projection is not None and not self.convs:
            raise ValueError("projection: expected None without a convolution beside it")
        bare = self.norms[-1] is None
        if self.projection_norm is not None and (self.projection is None or bare):
            raise ValueError("projection_norm: expected None without projection or final norm")
        if not self.convs and bare and self.shortcut != "residual":
            raise ValueError("shortcut: expected 'residual' without a convolution or a norm")
        if self.pool is not None and (bare or not self.relu or self.shortcut != "none"):
            raise ValueError("pool: needs a final norm, relu=True and shortcut='none'")

    @property
    def all_convs(self) -> tuple[Conv, ...]:
        """The chain's convolutions, then the projection if there is one."""
        return self.convs if self.projection is None else (*self.convs, self.projection)

    @property
    def all_norms(self) -> tuple[Norm | None, ...]:
        """The chain's norms, then the projection's."""
        return (*self.norms, self.projection_norm)

    def keeps(self, x: Tensor) -> bool:
        """Whether activations on the device of x are stored (`keep_activations`)."""
        auto = x.is_cuda or self.impl == "triton"
        return auto if self.keep_activations == "auto" else bool(self.keep_activations)

    @property
    def shared(self) -> bool:
        """Whether any norm shares statistics with other processes."""
        return any(norm is not None and norm.group is not None for norm in self.all_norms)


class Running(NamedTuple):
    """How one norm updates its running statistics, as in `torch.nn.BatchNorm2d`.

    momentum=None gives the cumulative average, 1 / num_batches_tracked.
    """

    momentum: float | None = 0.1
    num_batches_tracked: Tensor | None = None


class Tensors(NamedTuple):
    """The tensors of a chain, in the order of `ChainFunction.apply`'s arguments."""

    convs: tuple[ConvParams, ...]
    norms: tuple[NormParams, ...]

    def flat(self) -> list[Tensor | None]:
        return [t for params in (*self.convs, *self.norms) for t in params]


def unflatten(chain: Chain, flat: tuple[Tensor | None, ...]) -> Tensors:
    """Inverse of `Tensors.flat`; the projection's convolution and norm come last."""
    n = len(chain.convs) + (chain.projection is not None)
    pairs: Any = [flat[2 * i : 2 * i + 2] for i in range(n)]
    convs = tuple(ConvParams(*pair) for pair in pairs)
    rest = flat[2 * n :]
    return Tensors(convs, tuple(NormParams(*rest[i : i + 4]) for i in range(0, len(rest), 4)))
