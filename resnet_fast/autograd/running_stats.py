"""Update of the running statistics of all norms of a chain, in place and at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import backends, ops, replay
from ..spec.chain import Chain, NormParams, Running


class Batch(NamedTuple):
    """Batch statistics of a norm: mean and m2 [C] of the raw output of a convolution over `count`
    values per channel, a number or a positive one-element tensor. `conv_bias` is added to the mean.
    """

    mean: Tensor
    m2: Tensor
    count: int | Tensor
    conv_bias: Tensor | None


Norms = Sequence[tuple[Running, NormParams, Batch]]
"""For each norm: how to update its running statistics, these, and those of the batch."""


def update_running(chain: Chain, norms: Norms) -> None:
    """running = (1 − momentum)·running + momentum·batch in place, with the unbiased variance.

    All norms of a chain are updated at once: by one launch where Triton computes them, by one call
    where the native CPU kernels do.
    """
    if len({id(params.running_mean) for _, params, _ in norms}) < len(norms):
        for norm in norms:  # a norm used twice is updated twice, in order
            update_running(chain, [norm])
        return
    written = [t for rule, params, _ in norms for t in (*params[2:], rule.num_batches_tracked)]
    if any(t is not None and t.requires_grad for t in written):
        _by_pytorch(norms)  # raises PyTorch's error where gradients are enabled
        return
    update = _updater(chain.impl, norms[0][2].mean)
    _replayed(update, chain, norms)
    if update is _by_triton:  # PyTorch does not see what a kernel writes
        for rule, _, _ in norms:
            if rule.num_batches_tracked is not None:
                torch.autograd.graph.increment_version(rule.num_batches_tracked)


def _replayed(update: Callable[..., None], chain: Chain, norms: Norms) -> None:
    """`update` on the tensors of `norms`, replayed if it was recorded.

    A new momentum is recorded anew. As in PyTorch, the version counters of statistics do not count
    updates, because other calls of a norm save them for their backward pass.
    """
    seen = torch.compiler.is_compiling() or ops.traced()
    rules, tensors = [], []
    for rule, params, batch in norms:
        statistics = [t if t is None or seen else t.data for t in params[2:]]
        momentum, count, total = rule.momentum, batch.count, None
        if isinstance(count, Tensor):
            count, total = 0, count
        rules.append((momentum if momentum is None else float(momentum), count))
        tensors += (batch.mean, batch.m2, batch.conv_bias, total, *statistics)
        tensors.append(rule.num_batches_tracked)
    replay.run(update, chain, (tuple(rules),), tensors)


def _updater(impl: str, x: Tensor) -> Callable[..., None]:
    """The function that updates where `impl` computes norms; if anything sees ops, PyTorch's."""
    if torch.compiler.is_compiling():
        return _by_ops
    own = impl == "triton" or not x.is_cpu
    if own:
        kernels, _ = backends.triton_module()
        if kernels is not None and kernels.launch.compiling():
            return _by_triton  # the launches are listed
    if ops.traced() or x.is_meta:
        return _by_ops
    chosen = backends.chosen("bn_finalize", impl, x.device.type, x.dtype)
    if chosen == "triton":
        return _by_triton
    has = chosen == "native" and x.is_cpu and hasattr(backends.native_ops(), "update_running")
    return _by_native if has else _by_ops


def _by_ops(
    chain: Chain, rules: Sequence[tuple[float | None, int]], *tensors: Tensor | None
) -> None:
    """Update by PyTorch.

    tensors: for each norm mean, m2, conv_bias, the count if it is a tensor, running_mean,
    running_var, num_batches_tracked. rules: its momentum, and its count or 0.
    """
    _by_pytorch([
        (Running(momentum, tracked), NormParams(None, None, *running),
         Batch(mean, m2, count if total is None else total, bias))
        for (momentum, count), (mean, m2, bias, total, *running, tracked)
        in zip(rules, _sevens(tensors), strict=True)
    ])  # fmt: skip


def _sevens(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [tensors[i : i + 7] for i in range(0, len(tensors), 7)]


def _by_native(
    chain: Chain, rules: Sequence[tuple[float | None, int]], *tensors: Tensor | None
) -> None:
    """`_by_ops` by one call for norms of one momentum, if it takes the tensors."""
    norms, momentum = _sevens(tensors), rules[0][0]
    dtype = norms[0][0].dtype
    fits = momentum is not None and all(
        rule == momentum and count > 1 and bias is None and tracked is not None
        and all(t is not None and t.dtype == dtype and t.is_contiguous() for t in statistics)
        for (rule, count), (mean, m2, bias, _, *running, tracked) in zip(rules, norms, strict=True)
        for statistics in [(mean, m2, *running)]
    )  # fmt: skip
    if not fits:
        _by_ops(chain, rules, *tensors)
        return
    backends.native_ops().update_running(
        [t for norm in norms for t in norm[:2]], [count for _, count in rules],
        [t for norm in norms for t in norm[4:6]], [norm[6] for norm in norms], momentum,
    )  # fmt: skip


def _by_triton(
    chain: Chain, rules: Sequence[tuple[float | None, int]], *tensors: Tensor | None
) -> None:
    """`_by_ops` by the kernel, if it takes the tensors."""
    norms = _sevens(tensors)
    if not all(_fits(momentum, *norm) for (momentum, _), norm in zip(rules, norms, strict=True)):
        _by_ops(chain, rules, *tensors)
        return
    groups: dict[float | None, list[tuple[Tensor | int | None, ...]]] = {}
    for (momentum, count), norm in zip(rules, norms, strict=True):
        if norm[4] is None or (count == 0 and norm[3] is None):  # only the batch is counted
            norm = (*[None] * 6, norm[6])
        if any(t is not None for t in norm):
            groups.setdefault(momentum, []).append((*norm, count))
    for momentum, group in groups.items():
        backends.triton_module()[0].update_running(group, momentum)


def _fits(momentum: float | None, *norm: Tensor | None) -> bool:
    """Whether the kernel takes these tensors of a norm: plain and dense ones, on one device."""
    tracked, device = norm[-1], norm[0].device
    if tracked is None and momentum is None:
        return False
    if tracked is not None and (tracked.dtype != torch.int64 or tracked.numel() != 1):
        return False
    refusal = backends.triton_module()[0].refusal
    return all(
        type(t) in replay.PLAIN and t.device == device and t.is_contiguous()
        and (t is tracked or t.is_meta or not refusal("bn_finalize", device.type, t.dtype))
        for t in norm if t is not None
    )  # fmt: skip


def _by_pytorch(norms: Norms) -> None:
    """Update by PyTorch's ops, on a GPU by one `lerp` launch instead of one per norm.

    On a CPU the two terms are computed separately, because `lerp` subtracts: a variance that
    overflowed to infinity could become NaN; here it stays infinite, as in PyTorch.
    """
    tracked = [r.num_batches_tracked for r, *_ in norms if r.num_batches_tracked is not None]
    if tracked:
        torch._foreach_add_(tracked, 1)
    norms = [norm for norm in norms if norm[1].running_mean is not None and not _empty(norm[2])]
    for momentum in dict.fromkeys(running.momentum for running, *_ in norms):
        same = [norm for norm in norms if norm[0].momentum == momentum]
        statistics = [t for _, p, _ in same for t in (p.running_mean, p.running_var)]
        values = [t for pair in _mean_and_variance([batch for *_, batch in same]) for t in pair]
        values = [t.to(s.dtype) for t, s in zip(values, statistics, strict=True)]
        if momentum is not None:
            if statistics[0].is_cpu:
                torch._foreach_mul_(statistics, 1 - momentum)
                torch._foreach_add_(statistics, values, alpha=momentum)
            else:
                torch._foreach_lerp_(statistics, values, momentum)
            continue
        seen = [running.num_batches_tracked for running, *_ in same for _ in range(2)]
        for s, t, n in zip(statistics, values, seen, strict=True):
            share = 1.0 / n.to(s.dtype)
            s.mul_(1 - share).add_(t * share)


def _mean_and_variance(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    m2s, degrees = [b.m2 for b in batches], [b.count - 1 for b in batches]
    if any(isinstance(degree, Tensor) for degree in degrees):
        variances = [m2 / degree for m2, degree in zip(m2s, degrees, strict=True)]
    else:
        variances = torch._foreach_div(m2s, degrees)
    for batch, variance in zip(batches, variances, strict=True):
        mean, bias = batch.mean, batch.conv_bias
        yield (mean if bias is None else mean + bias.detach().to(mean.dtype)), variance


def _empty(batch: Batch) -> bool:
    return not isinstance(batch.count, Tensor) and batch.count == 0
