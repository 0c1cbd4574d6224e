"""A chain as layers: the `nn.Module`s that hold its options and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .chain import Chain, Pool
from .dtypes import autocast_dtype
from .values import pair

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Parts(NamedTuple):
    """The children of a block as a chain (`resnet_fast.spec.chain`): n convolutions, n + 1 norms.

    It has one shortcut more than a chain: "zero_pad", every `stride`-th pixel of x.
    around: the other modules that a plain call runs, each a ReLU or a `Sequential` of the layers.
    """

    convs: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d | nn.SyncBatchNorm | None, ...]
    relu: bool
    shortcut: str
    projection: nn.Conv2d | None = None
    projection_norm: nn.BatchNorm2d | nn.SyncBatchNorm | None = None
    pool: nn.MaxPool2d | None = None
    stride: int = 1
    around: tuple[nn.Module, ...] = ()

    def each(self, get: Callable[[Any], Any]) -> Parts:
        """The same block with get(layer) for each layer, such as its name; `around` is empty."""

        def got(layer: Any) -> Any:
            return None if layer is None else get(layer)

        convs, norms = tuple([*map(get, self.convs)]), tuple([*map(got, self.norms)])
        ends = got(self.projection), got(self.projection_norm), got(self.pool)
        return Parts(convs, norms, self.relu, self.shortcut, *ends, self.stride)


class BorrowedConv:
    """The attributes of an `nn.Conv2d`, of a convolution that a function computes."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: Any = 1, padding: Any = 0,
                 dilation: Any = 1, groups: int = 1) -> None:  # fmt: skip
        self._parameters = {"weight": weight, "bias": bias}
        self.weight, self.bias, self.out_channels = weight, bias, weight.shape[0]
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups


class BorrowedNorm:
    """The attributes of an `nn.BatchNorm2d`, of a norm that a function computes."""

    num_batches_tracked = None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                 running_var: Tensor | None, training: bool = False, momentum: float = 0.1,
                 eps: float = 1e-5) -> None:  # fmt: skip
        self._parameters = {"weight": weight, "bias": bias}
        self._buffers = {"running_mean": running_mean, "running_var": running_var}
        self.running_mean, self.affine = running_mean, True
        self.training, self.momentum, self.eps = training, momentum, eps
        self.track_running_stats = running_mean is not None


class BorrowedPool:
    """The attributes of an `nn.MaxPool2d`, of a max-pool that a function computes."""

    dilation, ceil_mode, return_indices = 1, False, False

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0) -> None:
        self.kernel_size, self.stride, self.padding = kernel_size, stride or kernel_size, padding


def windows_of(pool: nn.MaxPool2d) -> Pool:
    """The windows of `pool`; ValueError names the argument that a chain does not support."""
    if pair(pool.dilation, "dilation") != (1, 1):
        raise ValueError(f"dilation: a fused max-pool needs dilation=1, got {pool.dilation!r}")
    for name in ("ceil_mode", "return_indices"):
        if getattr(pool, name):
            raise ValueError(f"{name}: a fused max-pool needs {name}=False")
    kernel = pair(pool.kernel_size, "kernel")
    stride = kernel if pool.stride is None else pair(pool.stride, "stride")
    return Pool(kernel, stride, pair(pool.padding, "padding"))


def promotes(chain: Chain | Parts, x: Tensor) -> bool:
    """Whether autocast casts x for the convolutions of `chain` while another op reads x uncast.

    That op is a norm before the first convolution, or the addition of a shortcut.
    """
    if len(chain.convs) == 0 or autocast_dtype(x) == x.dtype:
        return False
    return chain.norms[0] is not None or chain.shortcut in ("identity", "zero_pad")
