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
