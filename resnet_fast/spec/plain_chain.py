"""A chain in PyTorch's own ops, for transforms that support only those (`guard.transformed`).

These are `torch.func`, forward-mode AD, `torch.fx` and `torch.jit.trace`. Dtypes, errors and
running statistics are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .chain import Chain, Norm, NormParams

if TYPE_CHECKING:
    from .chain import Running, Tensors


def plain_chain(
    chain: Chain,
    x: Tensor,
    tensors: Tensors,
    residual: Tensor | None,
    running: Sequence[Running | None],
) -> Tensor:
    """`functional.run_chain` by the equations of `spec.chain`."""

    def conv(i: int, h: Tensor) -> Tensor:
        c = chain.all_convs[i]
        return F.conv2d(h, *tensors.convs[i], c.stride, c.padding, c.dilation, c.groups)

    def norm(i: int, h: Tensor) -> Tensor:
        rule = chain.all_norms[i]
        return h if rule is None else _normalize(h, rule, tensors.norms[i], running[i])

    n, h, first = len(chain.convs), x, x
    for j in range(n):
        h = h if chain.norms[j] is None else F.relu(norm(j, h))
        first = h if j == 0 else first
        h = conv(j, h)
    h = norm(n, h)
    if chain.shortcut == "projection":
        residual = norm(n + 1, conv(n, first))
    elif chain.shortcut == "identity":
        residual = x
    h = h if residual is None else h + residual
    h = F.relu(h) if chain.relu else h
    if chain.pool is None:
        return h
    return F.max_pool2d(h, chain.pool.kernel, chain.pool.stride, chain.pool.padding)


def _normalize(h: Tensor, rule: Norm, params: NormParams, running: Running | None) -> Tensor:
    """BN(h) as in `nn.BatchNorm2d`, with its update of running statistics."""
    if rule.group is not None:
        raise RuntimeError(
            "group: transforms do not support statistics over several processes; use nn.BatchNorm2d"
        )
    weight, bias, mean, var = params
    if not rule.batch_stats:
        return F.batch_norm(h, mean, var, weight, bias, False, 0.0, rule.eps)
    if running is None:
        return F.batch_norm(h, None, None, weight, bias, True, 0.0, rule.eps)
    momentum, seen = running
    if seen is not None:
        seen.add_(1)
    if momentum is None:
        momentum = 1.0 / float(seen)
    return F.batch_norm(h, mean, var, weight, bias, True, momentum, rule.eps)
