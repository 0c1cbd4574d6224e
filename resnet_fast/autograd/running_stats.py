"""Update of the running statistics of all norms of a chain, in place and at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.chain import NormParams, Running


class Batch(NamedTuple):
    """Batch statistics of a norm: mean and m2 [C] of the raw output of a convolution over `count`
    values per channel, a number or a positive one-element tensor. `conv_bias` is added to the mean.
    """

    mean: Tensor
    m2: Tensor
    count: int | Tensor
    conv_bias: Tensor | None


def update_running(norms: Sequence[tuple[Running, NormParams, Batch]]) -> None:
    """running = (1 − momentum)·running + momentum·batch in place, with the unbiased variance.

    All norms of a chain are updated at once: on a GPU by one `lerp` launch instead of one per norm.
    On a CPU the two terms are computed separately, because `lerp` subtracts: a variance that
    overflowed to infinity could become NaN; here it stays infinite, as in PyTorch.
    """
    if len({id(params.running_mean) for _, params, _ in norms}) < len(norms):
        for norm in norms:  # a norm used twice is updated twice, in order
            update_running([norm])
        return
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
