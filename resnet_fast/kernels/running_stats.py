"""Running statistics of the norms of a chain, updated in place by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import launch
from .sizes import cdiv

BLOCK = 128
MOST = 40  # norms per launch: kernel arguments are limited to 4 KB


@triton.jit
def _blend(running, batch, c, inside, share):
    """running = (1 − share)·running + share·batch of channels c; running is a pointer."""
    old = tl.load(running + c, inside, 0.0).to(tl.float64)
    result = (1.0 - share) * old + share * batch
    tl.store(running + c, result.to(running.dtype.element_ty), inside)


@triton.jit
def _update(
    mean, m2, bias, total, running_mean, running_var, tracked, count, channels, momentum,
    CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One norm of `update_running_kernel`; the arguments are its entries."""
    share = tl.full((), 0.0, tl.float64) + momentum
    if CUMULATIVE:
        share = 1.0 / tl.load(tracked).to(tl.float64)
    elif tracked is not None:
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + 1)
    if running_mean is not None:
        c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = c < channels
        values = tl.full((), 0.0, tl.float64) + count
        if total is not None:
            values += tl.load(total).to(tl.float64)
        centre = tl.load(mean + c, inside, 0.0).to(tl.float64)
        if bias is not None:
            centre += tl.load(bias + c, inside, 0.0).to(tl.float64)
        var = tl.load(m2 + c, inside, 0.0).to(tl.float64) / (values - 1.0)
        _blend(running_mean, centre, c, inside, share)
        _blend(running_var, var, c, inside, share)


@triton.jit
def update_running_kernel(
    means, m2s, biases, totals, running_means, running_vars, tracked, counts, channels,
    momentum: tl.float64, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """running = (1 − s)·running + s·batch, num_batches_tracked += 1, for each norm.

    batch is mean + bias and m2/(M − 1), where M is `total` or else `count`; s is momentum. With
    CUMULATIVE, s = 1/num_batches_tracked, which is not changed. Arguments are tuples with an entry
    per norm. Terms whose entry is None are omitted; without a running mean only the batch counts.
    Grid: axis 0: blocks of BLOCK channels of the widest norm; axis 1: norms.
    Bytes moved: six channel vectors per norm, seven with a bias.
    Why: these vectors are small, so a launch takes as long for all norms as for one. fp64, and not
    `running + s·(batch − running)`: an infinite variance stays infinite, as in PyTorch's norms.
    """
    for i in tl.static_range(len(means)):
        if tl.program_id(1) == i:
            _update(
                means[i], m2s[i], biases[i], totals[i], running_means[i], running_vars[i],
                tracked[i], counts[i], channels[i], momentum, CUMULATIVE, BLOCK,
            )  # fmt: skip


def update_running(norms: Sequence[tuple[Any, ...]], momentum: float | None) -> None:
    """Update the running statistics of `norms` in one kernel launch for up to MOST.

    A norm is mean, m2, bias, total, running_mean, running_var, num_batches_tracked and count, of
    which all but count may be None. momentum None is the cumulative average, which needs
    num_batches_tracked; one more launch then counts first, because all programs read the counts.
    """
    if momentum is None:
        torch._foreach_add_([norm[6] for norm in norms], 1)
        norms = [norm for norm in norms if norm[4] is not None]
    for first in range(0, len(norms), MOST):
        *pointers, counts = zip(*norms[first : first + MOST], strict=True)
        channels = tuple(0 if t is None else t.numel() for t in pointers[4])
        launch(
            update_running_kernel, (max(1, cdiv(max(channels), BLOCK)), len(channels)),
            *pointers, counts, channels, momentum or 0.0, momentum is None, BLOCK, num_warps=4,
        )  # fmt: skip
