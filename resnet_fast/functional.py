"""The public functions: conv_bn_act, bn_act, add_relu and the residual chain.

Each checks its arguments, follows autocast, picks the inference or the autograd path, and updates
running statistics. x is NCHW or channels_last. The result keeps x's memory format; channels_last
filters give a channels_last result (`call_format`). Under a transform that supports PyTorch ops
only (`guard.transformed`), plain PyTorch ops run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import ChainFunction, Layout
from .autograd.gated_join import GateFunction, PoolFunction, join, pool
from .autograd.running_stats import Batch, update_running
from .dispatch import ops, replay
from .dispatch.guard import transformed
from .spec.chain import Chain, Conv, ConvParams, Norm, NormParams, Running, Tensors, unflatten
from .spec.checks import check_activations, check_chain, check_impl, check_options
from .spec.dtypes import autocast_dtype, stats_dtype
from .spec.layers import promotes
from .spec.layout import call_format, memory_format
from .spec.plain_chain import plain_chain
from .spec.values import check_tensor, check_tensors, integer, pair


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Fused convolution, batch normalization, optional residual addition and ReLU.

    `y = relu(BN(conv2d(x, weight) + bias) + residual)`. BN is `torch.nn.functional.batch_norm`:
    it uses batch statistics when `training`, else running statistics.

    Saved for backward: x, weight, the raw convolution output, four [K] vectors and, with `relu`,
    one bit per value of y.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; He et al. 2015, arXiv:1512.03385, eq. 1.

    Args:
        x: [N,C,H,W] in fp32, fp64, bf16 or fp16, NCHW or channels_last. Autocast casts it.
        weight: filters [K,C/groups,R,S] in x's dtype; fp32 is also valid with 16-bit x.
        bn_weight: [K], or None for 1.
        bn_bias: [K], or None for 0.
        running_mean: [K], updated in place when `training`. Pass None for both running
            statistics to use batch statistics in either mode.
        running_var: [K], unbiased; as `running_mean`.
        bias: bias of the convolution, [K], or None.
        residual: tensor of y's shape, or None. Mixed dtypes are promoted as in PyTorch's addition.
        stride: stride of the convolution: an integer, or one for H and one for W.
        padding: zero padding on each side, as `stride`.
        dilation: spacing of the filter's elements, as `stride`.
        groups: number of groups of channels; divides C and K.
        training: whether to use batch statistics and update the running ones.
        momentum: weight of the batch: `running = (1 − momentum)·running + momentum·batch`.
        eps: added to the variance before the square root.
        relu: whether to apply the ReLU.
        impl: "auto", "reference", "native" or "triton" (see `resnet_fast.dispatch.backends`).

    Returns:
        y [N,K,P,Q] in x's dtype (after autocast and promotion), channels_last if x or `weight` is.

    Raises:
        ValueError: a shape, dtype, device or option is invalid, or batch statistics have one value
            per channel, as in PyTorch. The message names the argument.
        RuntimeError: an explicit `impl` cannot run this call, or double backward is requested.
    """
    check_tensor(x, "x")
    check_tensor(weight, "weight")
    check_tensors(
        bn_weight=bn_weight, bn_bias=bn_bias, running_mean=running_mean, running_var=running_var,
        bias=bias, residual=residual,
    )  # fmt: skip
    check_options(training, momentum, relu)
    geometry = (pair(stride, "stride"), pair(padding, "padding"), pair(dilation, "dilation"))
    conv = Conv(*geometry, integer(groups, "groups"))
    norm = Norm(eps, training or running_mean is None)
    shortcut = "none" if residual is None else "residual"
    chain = Chain((conv,), (None, norm), relu, shortcut, impl=impl)
    params = NormParams(bn_weight, bn_bias, running_mean, running_var)
    tensors = Tensors((ConvParams(weight, bias),), (NormParams(), params, NormParams()))
    return run_chain(chain, x, tensors, residual, (None, Running(momentum), None))


def bn_act(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    impl: str = "auto",
) -> Tensor:
    """Fused batch normalization, optional residual addition and ReLU.

    `y = relu(BN(x) + residual)`, with BN as in `conv_bn_act`.

    Saved for backward: x, four [C] vectors and, with `relu`, one bit per value of y.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        x: [N,C,H,W] in fp32, fp64, bf16 or fp16, NCHW or channels_last.
        bn_weight: [C], or None for 1.
        bn_bias: [C], or None for 0.
        running_mean: [C], updated in place when `training`. Pass None for both running
            statistics to use batch statistics in either mode.
        running_var: [C], unbiased; as `running_mean`.
        residual: tensor of x's shape, or None. Mixed dtypes are promoted as in PyTorch's addition.
        training: whether to use batch statistics and update the running ones.
        momentum: weight of the batch: `running = (1 − momentum)·running + momentum·batch`.
        eps: added to the variance before the square root.
        relu: whether to apply the ReLU.
        impl: "auto", "reference", "native" or "triton" (see `resnet_fast.dispatch.backends`).

    Returns:
        y [N,C,H,W] in x's dtype (after promotion) and memory format.

    Raises:
        ValueError: as `conv_bn_act`.
        RuntimeError: as `conv_bn_act`.
    """
    check_tensor(x, "x")
    check_tensors(
        bn_weight=bn_weight, bn_bias=bn_bias, running_mean=running_mean, running_var=running_var,
        residual=residual,
    )  # fmt: skip
    check_options(training, momentum, relu)
    norm = Norm(eps, training or running_mean is None)
    shortcut = "none" if residual is None else "residual"
    chain = Chain((), (norm,), relu, shortcut, impl=impl)
    params = NormParams(bn_weight, bn_bias, running_mean, running_var)
    tensors = Tensors((), (params, NormParams()))
    return run_chain(chain, x, tensors, residual, (Running(momentum), None))


def add_relu(x: Tensor, residual: Tensor, *, impl: str = "auto") -> Tensor:
    """Fused addition and ReLU: `y = relu(x + residual)`.

    Saved for backward: a bit mask (one bit per element of y).

    Source: He et al. 2015, arXiv:1512.03385, section 3.2.

    Args:
        x: [N,C,H,W] in fp32, fp64, bf16 or fp16, NCHW or channels_last.
        residual: tensor of x's shape. Mixed dtypes are promoted as in PyTorch's addition.
        impl: "auto", "reference", "native" or "triton" (see `resnet_fast.dispatch.backends`).

    Returns:
        y [N,C,H,W] in x's dtype (after promotion) and memory format.

    Raises:
        ValueError: a shape, dtype, device or option is invalid. The message names the argument.
        RuntimeError: an explicit `impl` cannot run this call, or double backward is requested.
    """
    check_tensor(x, "x")
    check_tensor(residual, "residual")
    chain = Chain((), (None,), True, "residual", impl=impl)
    return run_chain(chain, x, Tensors((), (NormParams(), NormParams())), residual, (None, None))


def global_avg_pool(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Mean over H and W of x [N,C,H,W] → [N,C,1,1], as `nn.AdaptiveAvgPool2d(1)`.

    Inference takes one kernel launch. When a gradient is required, PyTorch's op runs.
    """
    check_tensor(x, "x")
    check_impl(impl)
    if transformed(x):
        return F.adaptive_avg_pool2d(x, 1)
    check_activations(x)
    if _wants_gradient(x):
        return F.adaptive_avg_pool2d(x, 1)
    x = x.contiguous(memory_format=memory_format(x))
    return ops.global_avg_pool(x, impl)[:, :, None, None]


def run_chain(
    chain: Chain,
    x: Tensor,
    tensors: Tensors,
    residual: Tensor | None,
    running: Sequence[Running | None],
) -> Tensor:
    """Run `chain` on x by the equations of `spec.chain`; returns y.

    Args:
        chain: the static half of the block.
        x: [N,C,H,W] in NCHW or channels_last (other strides are copied into one of them).
        tensors: parameters of `chain.all_convs`, and of `chain.norms` and `projection_norm`.
        residual: the shortcut's tensor if `chain.shortcut` is "residual", else None.
        running: for each norm, how to update its running statistics, or None.

    Raises:
        ValueError: as `conv_bn_act`.
        RuntimeError: as `conv_bn_act`.
    """
    if transformed(x) or (residual is not None and transformed(residual)):
        return plain_chain(chain, x, tensors, residual, running)
    dtype = autocast_dtype(x) if chain.convs else x.dtype
    if promotes(chain, x) or (residual is not None and residual.dtype != dtype):
        return _promoted(chain, x, tensors, residual, running)
    if dtype != x.dtype:
        x = x.to(dtype)
    check_impl(chain.impl)  # a valid one has a hash
    flat = tensors.flat()
    kind = replay.kind_of((x, residual, *flat))
    call = replay.known(chain, kind)
    if call is None:
        call, kind, x, residual, *flat = _checked(chain, kind, x, residual, tensors)
    if not call.batch_stats and not _wants_gradient(x, residual, *flat):
        return replay.run(_infer, chain, ((),), (x, residual, *flat))
    y, *statistics = ChainFunction.apply(chain, kind, call.layout, x, residual, *flat)
    follow = []
    for i, norm in enumerate(chain.all_norms):
        if norm is not None and norm.batch_stats:
            mean, m2, *statistics = statistics
            count = call.counts[i]
            if norm.group is not None:
                total, *statistics = statistics
                count = total if count > 0 or total > 0 else 0  # local values: no device sync
            if (rule := running[i]) is not None:
                conv_bias = tensors.convs[i - 1].bias if i > 0 else None
                follow.append((rule, tensors.norms[i], Batch(mean, m2, count, conv_bias)))
    if follow:
        update_running(chain, follow)
    return y


def gated_join(
    z: Tensor,
    norm: Norm | None,
    params: NormParams,
    gate: Callable[[Tensor], Tensor],
    residual: Tensor | None = None,
    relu: bool = True,
    running: Running | None = None,
    impl: str = "auto",
) -> Tensor:
    """The end of a squeeze-and-excitation block: `y = relu(u * gate(mean(u)) + residual)`.

    u = BN(z), or z without a norm; the mean is over H and W. z is read twice and u is not stored
    (`autograd.gated_join`). `gate` is called once, on a tensor that autograd records.

    Saved for backward: z, one bit per value of y with `relu`, vectors.

    Source: Hu et al. 2018, arXiv:1709.01507, eq. 2 to 4.

    Args:
        z: [N,C,H,W] in fp32, fp64, bf16 or fp16, NCHW or channels_last.
        norm: the normalization, or None. With a `group`, and under a transform or compilation,
            PyTorch's ops run after the normalization.
        params: its tensors, [C] each.
        gate: from the means of u in z's dtype to factors, both [N,C,1,1].
        residual: tensor of z's shape, or None. Mixed dtypes are promoted as in PyTorch.
        relu: whether to apply the ReLU.
        running: how to update running statistics, or None.
        impl: "auto", "reference", "native" or "triton" (see `resnet_fast.dispatch.backends`).

    Returns:
        y [N,C,H,W] in the promoted dtype of z, the factors and residual, in z's memory format.

    Raises:
        ValueError: as `run_chain`, or `gate` returns another shape.
        RuntimeError: as `run_chain`.
    """
    plain = transformed(z) or (residual is not None and transformed(residual))
    if plain or torch.compiler.is_compiling() or (norm is not None and norm.group is not None):
        return _plain_join(z, norm, params, gate, residual, relu, running, impl)
    if residual is not None and residual.dtype != z.dtype:
        h = gated_join(z, norm, params, gate, None, False, running, impl)
        return _added(h, residual, relu, impl)
    chain = Chain((), (norm,), True, "residual", impl=impl)
    beside = z if residual is None else residual
    count, *_ = check_chain(chain, z, (), (params, NormParams()), beside)
    z = z.contiguous(memory_format=memory_format(z))
    given = [None if norm is None or t is None else t.contiguous() for t in params]
    link = None
    if _wants_gradient(z, *given):
        z, link, pooled, mean, *vectors = PoolFunction.apply(chain, z, *given)
    else:
        pooled, mean, *vectors = pool(chain, z, *given)
    scale, shift, center, m2 = vectors[:4]
    factors = _factors(gate, pooled.to(z.dtype)[:, :, None, None])
    dtype = torch.promote_types(z.dtype, factors.dtype)
    z = z.to(dtype)
    if residual is not None:
        residual = residual.to(dtype).contiguous(memory_format=memory_format(z))
    e = factors.flatten(1)
    if _wants_gradient(z, e, residual):
        pooled = pooled.detach()
        y = GateFunction.apply(chain, relu, z, link, e, residual, mean, pooled, scale, shift)
    else:
        y, _ = join(chain, relu, False, z, e, residual, scale, shift)
    if norm is not None and norm.batch_stats and running is not None:
        update_running(chain, [(running, params, Batch(center, m2, count, None))])
    return y


def _plain_join(
    z: Tensor,
    norm: Norm | None,
    params: NormParams,
    gate: Callable[[Tensor], Tensor],
    residual: Tensor | None,
    relu: bool,
    running: Running | None,
    impl: str,
) -> Tensor:
    """`gated_join` by PyTorch's ops, or with a group by `run_chain` and PyTorch's ops."""
    u = z
    if norm is not None:
        run = plain_chain if norm.group is None else run_chain
        tensors = Tensors((), (params, NormParams()))
        u = run(Chain((), (norm,), False, impl=impl), z, tensors, None, (running, None))
    y = u * _factors(gate, u.mean((2, 3), keepdim=True))
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def _factors(gate: Callable[[Tensor], Tensor], pooled: Tensor) -> Tensor:
    """gate(pooled), checked."""
    factors = gate(pooled)
    if not isinstance(factors, Tensor) or factors.shape != pooled.shape:
        got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
        raise ValueError(f"gate: expected a result of shape {tuple(pooled.shape)}, got {got}")
    return factors


class _Call(NamedTuple):
    """What calls of a chain on tensors of one kind have in common.

    counts: values per channel of each norm; layout: that of `ChainFunction`, or None.
    """

    counts: list[int]
    batch_stats: bool
    layout: Layout | None


def _checked(
    chain: Chain, kind: Hashable | None, x: Tensor, residual: Tensor | None, tensors: Tensors
) -> tuple[Any, ...]:
    """The `_Call`, and kind, x, residual and `tensors.flat()`, dense in the chain's format.

    ValueError, as `check_chain` raises it, if the tensors do not fit.
    """
    counts = check_chain(chain, x, *tensors, residual)
    weight = tensors.convs[0].weight if tensors.convs else None
    given = x, residual, *tensors.flat()
    x = x.contiguous(memory_format=call_format(x, weight))
    if residual is not None:  # in x's format now: a copied x may fit both
        residual = residual.contiguous(memory_format=memory_format(x, weight))
    flat = [t if t is None or t.dim() > 1 else t.contiguous() for t in given[2:]]
    batch_stats = any(norm is not None and norm.batch_stats for norm in chain.all_norms)
    layout = None if kind is None else Layout.of(chain, x, flat)
    call = _Call(counts, batch_stats, layout)
    if any(a is not b for a, b in zip(given, (x, residual, *flat), strict=True)):
        kind = None  # of other tensors
    replay.known(chain, kind, call)
    return call, kind, x, residual, *flat


def infer_chains(chains: Sequence[tuple[Chain, Tensors]], x: Tensor) -> Tensor | None:
    """y of several chains on x, each on the result of the one before, or None if unsupported.

    For inference on a GPU, where one launch folds the norms of all chains. Unsupported: gradients,
    batch statistics, a chain without a convolution, autocast that mixes dtypes, transforms,
    compilation, and tensors that do not fit, for which `run_chain` raises the error.
    """
    rules = tuple(chain for chain, _ in chains)
    flat = [t for _, tensors in chains for t in tensors.flat()]
    if any(norm is not None and norm.batch_stats for c in rules for norm in c.all_norms):
        return None
    if not all(c.convs for c in rules) or promotes(rules[0], x):
        return None
    if torch.compiler.is_compiling() or transformed(x) or _wants_gradient(x, *flat):
        return None
    try:
        x = x.to(autocast_dtype(x))
        check_chain(rules[0], x, *chains[0][1], None)
        x = x.contiguous(memory_format=call_format(x, flat[0]))
        return replay.run(_infer, rules[0], (rules[1:],), (x, None, *flat))
    except ValueError:
        return None


def _promoted(
    chain: Chain,
    x: Tensor,
    tensors: Tensors,
    residual: Tensor | None,
    running: Sequence[Running | None],
) -> Tensor:
    """`run_chain` with PyTorch's type promotion, where autocast or the residual mixes dtypes.

    A norm before the first convolution reads x uncast; autocast casts a convolution's input. The
    addition runs in the promoted dtype of its operands.
    """
    norms, skip = chain.norms, x if chain.shortcut == "identity" else residual
    h = x
    if promotes(chain, x) and norms[0] is not None:
        start = Chain((), norms[:1], impl=chain.impl)
        params = Tensors((), (tensors.norms[0], NormParams()))
        h = run_chain(start, x, params, None, (running[0], None))
        norms, running = (None, *norms[1:]), (None, *running[1:])
    if chain.convs or norms[0] is not None:
        rest = Chain(
            chain.convs, norms, chain.relu and skip is None,
            chain.shortcut if skip is None else "none", chain.projection, chain.projection_norm,
            chain.keep_activations, chain.impl, chain.pool,
        )  # fmt: skip
        h = run_chain(rest, h, tensors, None, running)
    return h if skip is None else _added(h, skip, chain.relu, chain.impl)


def _added(h: Tensor, skip: Tensor, relu: bool, impl: str) -> Tensor:
    """h + skip in their promoted dtype, and the ReLU."""
    dtype = torch.promote_types(h.dtype, skip.dtype)
    add = Chain((), (None,), relu, "residual", impl=impl)
    nothing = Tensors((), (NormParams(), NormParams()))
    return run_chain(add, h.to(dtype), nothing, skip.to(dtype), (None, None))


def _infer(
    first: Chain,
    others: tuple[Chain, ...],
    x: Tensor,
    residual: Tensor | None,
    *flat: Tensor | None,
) -> Tensor:
    """The chains with running statistics and no gradient: one launch per convolution.

    On a GPU one more launch folds the norms of all chains (`reference.bn_fold`); on a CPU the
    native kernels keep folded norms with the packed filters.
    """
    chains, given, at = (first, *others), [], 0
    for chain in chains:
        size = 2 * len(chain.all_convs) + 4 * len(chain.all_norms)
        given.append(unflatten(chain, flat[at : at + size]))
        at += size
    folds = x.is_cuda or first.impl == "triton"
    ready = _folded(chains, x, given) if folds else given
    y = _run(first, x, residual, ready[0], folds)
    for chain, raw, tensors in zip(others, given[1:], ready[1:], strict=True):
        check_chain(chain, y, *raw, None)
        y = y.contiguous(memory_format=call_format(y, raw.convs[0].weight))
        y = _run(chain, y, None, tensors, folds)
    return y


def _run(
    chain: Chain, x: Tensor, residual: Tensor | None, tensors: Tensors, folded: bool
) -> Tensor:
    """One chain of `_infer`; `folded`: norms have a scale and a shift in place of statistics.

    The norm and ReLU after a convolution are its epilogue. Only a norm before the first
    convolution (pre-activation) and a pool take separate launches.
    """
    n, impl, pool = len(chain.convs), chain.impl, chain.pool
    h, start, projection = x, chain.norms[0], chain.projection
    skip = x if chain.shortcut == "identity" else residual

    def convolve(i: int, h: Tensor, skip: Tensor | None, relu: bool) -> Tensor:
        norm, params, conv = chain.all_norms[i + 1], tensors.norms[i + 1], tensors.convs[i]
        params = NormParams() if norm is None and not folded else params
        y = ops.conv_bn_act(
            h, conv.weight, conv.bias, *params, skip, relu, norm.eps if norm else 0.0,
            *chain.all_convs[i].args(), impl,
        )  # fmt: skip
        return y.contiguous(memory_format=memory_format(x, tensors.convs[0].weight))

    def join(h: Tensor, source: Tensor, projection: Conv) -> Tensor:
        """The last convolution and the projection of `source`, whose norms are folded."""
        both = [(tensors.convs[i].weight, *tensors.norms[i + 1][:2]) for i in (n - 1, n)]
        geometry = *chain.convs[-1].args(), list(projection.stride)
        y = ops.conv_add_projection(h, *both[0], source, *both[1], chain.relu, *geometry, impl)
        return y.contiguous(memory_format=memory_format(x, tensors.convs[0].weight))

    if start is not None:
        params = tensors.norms[0]
        affine = params.weight, params.bias
        if not folded:
            given = *params.running(stats_dtype(x)), 1, *affine, start.eps, impl
            affine = ops.bn_finalize(*given)[:2]
        if n == 0 and pool is not None:
            return ops.bn_relu_max_pool(x, *affine, *pool.args(), False, impl)[0]
        beside, relu = (skip, chain.relu) if n == 0 else (None, True)
        h = ops.bn_act(x, *affine, beside, None, None, relu, False, impl)[0]
    elif n == 0:
        assert skip is not None  # Chain checks it
        return ops.add_relu(x, skip, False, impl)[0] if chain.relu else x + skip
    source = h
    if projection is not None and folded and _pointwise(projection, tensors.convs[n].weight):
        for j in range(n - 1):
            h = convolve(j, h, None, chain.norms[j + 1] is not None)
        return join(h, source, projection)
    if projection is not None:
        skip = convolve(n, source, None, False)
    for j in range(n):
        last = j == n - 1
        relu = chain.relu if last else chain.norms[j + 1] is not None
        h = convolve(j, h, skip if last else None, relu)
    if n == 0 or pool is None:
        return h
    return ops.bn_relu_max_pool(h, None, None, *pool.args(), False, impl)[0]


def _pointwise(conv: Conv, weight: Tensor) -> bool:
    """Whether a projection is 1x1 without padding or groups, as `conv_add_projection` takes it."""
    return conv == Conv(conv.stride) and weight.shape[2:] == (1, 1)


def _folded(chains: Sequence[Chain], x: Tensor, given: Sequence[Tensors]) -> list[Tensors]:
    """The tensors of all chains with a scale and a shift, as weight and bias, for every norm.

    They include the biases of the convolutions, also where no norm follows.
    """
    vectors: list[Tensor | None] = []
    eps = []
    found = []
    for chain, tensors in zip(chains, given, strict=True):
        biases = itertools.chain([None], (c.bias for c in tensors.convs), itertools.repeat(None))
        for norm, params, bias in zip(chain.all_norms, tensors.norms, biases, strict=False):
            found.append(norm is not None or bias is not None)
            if found[-1]:
                vectors += (bias, *(NormParams() if norm is None else params))
                eps.append(0.0 if norm is None else norm.eps)
    ready = iter(ops.bn_fold(x, vectors, eps, chains[0].impl) if eps else ())
    there = iter(found)
    folded = []
    for chain, tensors in zip(chains, given, strict=True):
        convs = tuple(ConvParams(conv.weight) for conv in tensors.convs)
        norms = tuple(
            NormParams(next(ready), next(ready)) if next(there) else NormParams()
            for _ in chain.all_norms
        )
        folded.append(Tensors(convs, norms))
    return folded


def _wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must record this call; an exported program records nothing."""
    if not torch.is_grad_enabled() or _exporting():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def _exporting() -> bool:
    # The flag behind is_exporting(), which torch 2.11 also sets under compile. 2.6 has no flag.
    return getattr(torch.compiler, "_is_exporting_flag", False)
