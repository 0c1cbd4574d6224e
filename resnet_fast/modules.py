"""The fused modules: the blocks of `resnet_fast.blocks` with a forward pass in fused launches.

Each is an ordinary `nn.Module` whose `nn.Conv2d` and `nn.BatchNorm2d` children hold the parameters
and running statistics; only `forward` differs. If a child has hooks or an overridden forward, or
under a transform, the plain forward runs (`dispatch.guard`).
Statistics follow each BatchNorm child's own `training` flag: `bn.eval()` freezes that one.
In training, an `nn.SyncBatchNorm` instead of an `nn.BatchNorm2d` shares statistics with the other
processes of its `process_group`, on every device (`resnet_fast.autograd.sync`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import blocks
from .autograd.sync import group_of
from .blocks import zero_pad
from .dispatch.guard import FORWARDS, fusible, transformed
from .dispatch.native_inference import Everything, infer
from .dispatch.packed_filters import Rechecked
from .functional import gated_join, global_avg_pool, infer_chains, run_chain
from .spec.chain import Chain, Conv, ConvParams, Norm, NormParams, Running, Tensors
from .spec.checks import check_impl, check_keep
from .spec.layers import Parts, windows_of
from .spec.values import pair


def run_fused(
    parts: Parts,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    impl: str = "auto",
    keep_activations: bool | str = False,
) -> Tensor:
    """Run the chain of `parts` on x [N,C,H,W] with `resnet_fast.functional.run_chain`.

    `residual` is the shortcut, if given. In inference, `dispatch.native_inference` runs the chain
    if it can.
    """
    norms = _norms_of(parts)
    if residual is None:
        y = None if any(map(_trains, norms)) else infer((parts,), x, impl)
        if y is not None:
            return y
        if parts.shortcut == "zero_pad":
            residual = zero_pad(x, parts.stride, parts.convs[-1].out_channels)
    shortcut = "residual" if residual is not None else parts.shortcut
    chain, tensors = _chain_of(parts, shortcut, impl, keep_activations)
    running = [None if norm is None else _running(norm) for norm in norms]
    return run_chain(chain, x, tensors, residual, running)


def run_gated(
    parts: Parts,
    gate: Callable[[Tensor], Tensor],
    x: Tensor,
    residual: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """`run_fused` of a chain whose last norm's result u is multiplied by gate(mean of u).

    See `resnet_fast.functional.gated_join`. `parts` ends in a norm; the shortcut is "none" or
    "identity".
    """
    residual = x if parts.shortcut == "identity" else residual
    before, last = parts._replace(relu=False, shortcut="none"), parts.norms[-1]
    assert last is not None
    if not (torch.is_grad_enabled() or last.training):  # the norm is part of the convolution
        u = run_fused(before, x, impl=impl)
        return gated_join(u, None, NormParams(), gate, residual, parts.relu, impl=impl)
    z = x
    if parts.convs:
        z = run_fused(before._replace(norms=(*parts.norms[:-1], None)), x, impl=impl)
    rule = Norm(*cast(Any, _rule(last)))
    return gated_join(z, rule, _params(last), gate, residual, parts.relu, _running(last), impl)


def run_inference(
    chains: Sequence[Parts],
    x: Tensor,
    impl: str,
    everything: Callable[[], Everything],
) -> Tensor | None:
    """y of several chains by one native call, or on a GPU with one fold of all norms, or None.

    None where neither can run them all; then each chain runs on its own. everything: as in
    `dispatch.native_inference.infer`.
    """
    y = infer(chains, x, impl, everything)
    if y is not None or impl not in ("auto", "triton") or not (x.is_cuda or impl == "triton"):
        return y
    if any(parts.shortcut == "zero_pad" or any(map(_trains, _norms_of(parts))) for parts in chains):
        return None
    return infer_chains([_chain_of(parts, parts.shortcut, impl, False) for parts in chains], x)


def _norms_of(parts: Parts) -> tuple[nn.BatchNorm2d | nn.SyncBatchNorm | None, ...]:
    return *parts.norms, parts.projection_norm


def _trains(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> bool:
    return norm is not None and norm.training


def _chain_of(
    parts: Parts, shortcut: str, impl: str, keep_activations: bool | str
) -> tuple[Chain, Tensors]:
    """The chain of `parts`, and its tensors."""
    convs, norms = parts.convs, _norms_of(parts)
    if parts.projection is not None:
        convs = (*convs, parts.projection)
    geometry = tuple([_geometry(conv) for conv in convs])
    rules = tuple([_rule(norm) for norm in norms])
    pool = None if parts.pool is None else windows_of(parts.pool)
    # The cache must not keep a group, and an eps of another type may have no hash.
    plain = all([rule is None or (type(rule[0]) is float and rule[2] is None) for rule in rules])
    chain = (_one_chain if plain and not torch.compiler.is_compiling() else _new_chain)(
        len(parts.convs), geometry, rules, parts.relu, shortcut, keep_activations, impl, pool
    )
    tensors = Tensors(
        tuple(ConvParams(*_held(conv, "_parameters", ("weight", "bias"))) for conv in convs),
        tuple(_params(norm) for norm in norms),
    )
    return chain, tensors


def _new_chain(n, geometry, rules, relu, shortcut, keep_activations, impl, pool) -> Chain:
    """The chain of n convolutions, and of a projection if `geometry` and `rules` have one more."""
    convs = tuple(Conv(*conv) for conv in geometry)
    norms = tuple(None if rule is None else Norm(*rule) for rule in rules)
    projection = convs[n] if len(convs) > n else None
    return Chain(
        convs[:n], norms[:-1], relu, shortcut, projection, norms[-1], keep_activations, impl, pool
    )


_one_chain = functools.lru_cache(maxsize=1024)(_new_chain)
"""Equal arguments give one object: keys of `dispatch.replay` are compared by identity first."""


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Arguments of `Conv`."""
    names = ("stride", "padding", "dilation")
    return *[pair(getattr(conv, name), name) for name in names], conv.groups


def _rule(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> tuple[Any, ...] | None:
    """Arguments of `Norm`."""
    if norm is None:
        return None
    shares = isinstance(norm, nn.SyncBatchNorm) and norm.training
    group = group_of(cast(Any, norm).process_group) if shares else None
    return norm.eps, norm.training or norm.running_mean is None, group


def _params(norm: nn.BatchNorm2d | nn.SyncBatchNorm | None) -> NormParams:
    if norm is None:
        return NormParams()
    statistics = _held(norm, "_buffers", ("running_mean", "running_var"))
    return NormParams(*_held(norm, "_parameters", ("weight", "bias")), *statistics)


def _held(module: nn.Module, place: str, names: tuple[str, str]) -> list[Any]:
    """Attributes of `module` from its dict `place`, much faster than attribute access.

    Replicas of `nn.DataParallel` store them as plain attributes.
    """
    held = module.__dict__[place]
    return [held[name] if name in held else getattr(module, name) for name in names]


def _running(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Running | None:
    if not (norm.training and norm.track_running_stats):
        return None
    momentum = norm.momentum
    if momentum is None and norm.num_batches_tracked is None:
        momentum = 0.0  # as nn.BatchNorm2d does
    return Running(momentum, norm.num_batches_tracked)


class Fused(Rechecked, blocks.ChainBlock):
    """Mixin that gives a block of `resnet_fast.blocks` its fused forward pass.

    Args:
        impl: "auto", "reference", "native" or "triton" (see `resnet_fast.dispatch.backends`).
        keep_activations: True stores the activations between convolutions for the backward pass,
            as PyTorch does; False recomputes them (less memory); "auto" is True on a GPU.
    """

    impl = "auto"
    keep_activations: bool | str = False

    def __init__(
        self, *args, impl: str = "auto", keep_activations: bool | str = False, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.impl = check_impl(impl)
        self.keep_activations = check_keep(keep_activations)

    def forward(self, x: Tensor) -> Tensor:
        """Return y [N,K,P,Q] for x [N,C,H,W]."""
        parts = self.parts()
        if parts is None or not fusible(x, parts):
            return super().forward(x)
        return run_fused(parts, x, impl=self.impl, keep_activations=self.keep_activations)

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that `torch.jit.script` compiles: the plain block with the same children."""
        twin: Any = copy.copy(self)
        twin.__class__ = PLAIN.get(type(self), type(self))
        twin._modules = self._modules.copy()  # script puts prepared children there
        return twin

    def extra_repr(self) -> str:
        inherited = super().extra_repr()
        return f"{inherited}, impl={self.impl!r}" if inherited else f"impl={self.impl!r}"


class ConvBNAct2d(Fused, blocks.ConvBNAct2d):
    """Fused convolution, BatchNorm, optional residual addition and ReLU.

    `y = relu(bn(conv(x)) + residual)`. Arguments are those of `resnet_fast.blocks.ConvBNAct2d` and
    of `resnet_fast.modules.Fused`.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return y [N,K,P,Q] for x [N,C,H,W]; `residual` [N,K,P,Q] is added before the ReLU."""
        parts = self.parts()
        if not fusible(x, parts):
            return blocks.ConvBNAct2d.forward(self, x, residual)
        return run_fused(parts, x, residual, impl=self.impl, keep_activations=self.keep_activations)


class BasicBlock(Fused, blocks.BasicBlock):
    """Fused basic block: `y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Both convolutions are 3×3. Arguments are those of `resnet_fast.blocks.ResidualBlock` and of
    `resnet_fast.modules.Fused`. Source: He et al. 2015, arXiv:1512.03385, fig. 5 left.
    """


class Bottleneck(Fused, blocks.Bottleneck):
    """Fused bottleneck of a 1×1, a 3×3 and a 1×1 convolution.

    `y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`.

    conv2 has the stride ("ResNet v1.5"). The width is
    ⌊planes·base_width / 64⌋·groups, and y has 4·planes channels. Arguments are those of
    `resnet_fast.blocks.ResidualBlock` and of `resnet_fast.modules.Fused`. Source: He et al. 2015,
    arXiv:1512.03385, fig. 5 right.
    """


class PreActBasicBlock(Fused, blocks.PreActBasicBlock):
    """Fused pre-activation block of two 3×3 convolutions.

    `y = conv2(relu(bn2(conv1(a)))) + shortcut(x)`, `a = relu(bn1(x))`. A projection shortcut reads
    a. Arguments are those of `resnet_fast.blocks.ResidualBlock` and of `resnet_fast.modules.Fused`.
    Source: He et al. 2016, arXiv:1603.05027, fig. 4e.
    """


class PreActBottleneck(Fused, blocks.PreActBottleneck):
    """Fused pre-activation bottleneck of a 1×1, a 3×3 and a 1×1 convolution.

    `y = conv3(relu(bn3(conv2(relu(bn2(conv1(a))))))) + shortcut(x)`, `a = relu(bn1(x))`. A
    projection shortcut reads a; conv2 has the stride. Arguments are those of
    `resnet_fast.blocks.ResidualBlock` and of `resnet_fast.modules.Fused`. Source: He et al. 2016,
    arXiv:1603.05027, appendix.
    """


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d((1, 1))`: x [N,C,H,W] → [N,C,1,1], one kernel launch in inference."""

    impl = "auto"

    def __init__(self, *, impl: str = "auto") -> None:
        super().__init__((1, 1))
        self.impl = check_impl(impl)

    def forward(self, input: Tensor) -> Tensor:
        """Mean over H and W."""
        if transformed(input) or input.dim() != 4:
            return F.adaptive_avg_pool2d(input, self.output_size)
        return global_avg_pool(input, impl=self.impl)

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that `torch.jit.script` compiles."""
        return nn.AdaptiveAvgPool2d(self.output_size)


FORWARDS[GlobalAvgPool2d] = GlobalAvgPool2d.forward

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    ConvBNAct2d: blocks.ConvBNAct2d,
    BasicBlock: blocks.BasicBlock,
    Bottleneck: blocks.Bottleneck,
    PreActBasicBlock: blocks.PreActBasicBlock,
    PreActBottleneck: blocks.PreActBottleneck,
}
