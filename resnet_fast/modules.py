"""The fused modules: the blocks of `resnet_fast.blocks` with a forward pass in fused launches.

Each is an ordinary `nn.Module` with ordinary `nn.Conv2d` and `nn.BatchNorm2d` children that hold
the parameters and running statistics; only `forward` differs, so children's own hooks do not run.
Statistics follow each BatchNorm child's own `training` flag: `bn.eval()` freezes that one.
An `nn.SyncBatchNorm` in the place of an `nn.BatchNorm2d` shares them, in training, with the other
processes of its `process_group`, on every device (`resnet_fast.autograd.sync`).
"""

from __future__ import annotations

from torch import Tensor, nn

from . import blocks
from .autograd.chain import Tensors
from .autograd.sync import group_of
from .blocks import NORMS, Parts, zero_pad
from .chain import Chain, Conv, ConvParams, Norm, NormParams, Pool
from .checks import check_impl, pair
from .functional import Running, global_avg_pool, run_chain
from .inference import infer


def run_fused(
    parts: Parts,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    impl: str = "auto",
    keep_activations: bool = False,
) -> Tensor:
    """The chain of `parts` on x [N,C,H,W] by `resnet_fast.functional.run_chain`.

    `residual`, where it is given, is the shortcut. In inference by `resnet_fast.inference` if that
    takes it.
    """
    if residual is None:
        y = infer((parts,), x, impl)
        if y is not None:
            return y
        residual = zero_pad(x, parts) if parts.shortcut == "zero_pad" else None
    shortcut = "residual" if residual is not None else parts.shortcut
    convs, norms = parts.convs, (*parts.norms, parts.projection_norm)
    if parts.projection is not None:
        convs = (*convs, parts.projection)
    geometry = tuple(_geometry(conv) for conv in convs)
    n = len(parts.convs)
    rules = tuple(_rule(norm) for norm in norms)
    chain = Chain(
        geometry[:n], rules[:-1], parts.relu, shortcut,
        geometry[n] if parts.projection is not None else None, rules[-1],
        keep_activations, impl, None if parts.pool is None else windows_of(parts.pool),
    )  # fmt: skip
    tensors = Tensors(
        tuple(ConvParams(conv.weight, conv.bias) for conv in convs),
        tuple(_params(norm) for norm in norms),
    )
    running = [None if norm is None else _running(norm) for norm in norms]
    return run_chain(chain, x, tensors, residual, running)


def _geometry(conv: nn.Conv2d) -> Conv:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ValueError(
            f"padding: expected numbers and zero padding, got padding={conv.padding!r} and "
            f"padding_mode={conv.padding_mode!r}"
        )
    return Conv(conv.stride, conv.padding, conv.dilation, conv.groups)


def windows_of(pool: nn.MaxPool2d) -> Pool:
    """The windows of `pool`; ValueError, naming the argument, where no chain can end with them."""
    if pair(pool.dilation, "dilation") != (1, 1):
        raise ValueError(f"dilation: expected 1 of a fused max-pool, got {pool.dilation!r}")
    for name in ("ceil_mode", "return_indices"):
        if getattr(pool, name):
            raise ValueError(f"{name}: expected False of a fused max-pool")
    sizes = {"kernel": pool.kernel_size, "stride": pool.stride, "padding": pool.padding}
    return Pool(*(pair(value, name) for name, value in sizes.items()))


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` would run hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def ends_chain(module: nn.Module) -> bool:
    """Whether `module` is a max-pool, called for nothing else, that a chain can end with."""
    if type(module) is not nn.MaxPool2d or hooked(module) or "forward" in vars(module):
        return False
    try:
        windows_of(module)
    except ValueError:
        return False
    return True


def _rule(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> Norm | None:
    if norm is None:
        return None
    if not isinstance(norm, NORMS):
        raise ValueError(
            f"norm: expected nn.BatchNorm2d or nn.SyncBatchNorm, got {type(norm).__name__}"
        )
    shares = isinstance(norm, nn.SyncBatchNorm) and norm.training
    group = group_of(norm.process_group) if shares else None
    return Norm(norm.eps, norm.training or norm.running_mean is None, group)


def _params(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> NormParams:
    if norm is None:
        return NormParams()
    return NormParams(norm.weight, norm.bias, norm.running_mean, norm.running_var)


def _running(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Running | None:
    if not (norm.training and norm.track_running_stats):
        return None
    momentum = norm.momentum
    if momentum is None and norm.num_batches_tracked is None:
        momentum = 0.0  # as nn.BatchNorm2d does
    return Running(momentum, norm.num_batches_tracked)


class Fused:
    """Mixin for a `blocks.ChainBlock`: the fused forward pass.

    Attributes:
        impl: "auto", "reference", "native" or "triton" (`resnet_fast.backend`).
        keep_activations: store what lies between convolutions instead of recomputing it in the
            backward pass (more memory).
    """

    impl = "auto"
    keep_activations = False

    def __init__(self, *args, impl: str = "auto", keep_activations: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.impl = check_impl(impl)
        self.keep_activations = keep_activations

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y of the block, x and y [N,C,H,W]; `residual` is added before the last ReLU."""
        return run_fused(
            self.parts(), x, residual, impl=self.impl, keep_activations=self.keep_activations
        )

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        return f"{inherited}, impl={self.impl!r}" if inherited else f"impl={self.impl!r}"


class ConvBNAct2d(Fused, blocks.ConvBNAct2d):
    __doc__ = blocks.ConvBNAct2d.__doc__


class BasicBlock(Fused, blocks.BasicBlock):
    __doc__ = blocks.BasicBlock.__doc__


class Bottleneck(Fused, blocks.Bottleneck):
    __doc__ = blocks.Bottleneck.__doc__


class PreActBasicBlock(Fused, blocks.PreActBasicBlock):
    __doc__ = blocks.PreActBasicBlock.__doc__


class PreActBottleneck(Fused, blocks.PreActBottleneck):
    __doc__ = blocks.PreActBottleneck.__doc__


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d((1, 1))`, in one launch in inference: x [N,C,H,W] → [N,C,1,1]."""

    impl = "auto"

    def __init__(self, *, impl: str = "auto") -> None:
        super().__init__((1, 1))
        self.impl = check_impl(impl)

    def forward(self, input: Tensor) -> Tensor:
        """Mean over H and W."""
        return global_avg_pool(input, impl=self.impl)


PLAIN = {
    ConvBNAct2d: blocks.ConvBNAct2d,
    BasicBlock: blocks.BasicBlock,
    Bottleneck: blocks.Bottleneck,
    PreActBasicBlock: blocks.PreActBasicBlock,
    PreActBottleneck: blocks.PreActBottleneck,
}
