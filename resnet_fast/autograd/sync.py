"""Batch statistics over several processes: the two collectives of a synchronized normalization.

Forward, one all-gather: each process r has count, mean and m2 = Σ(z − mean)² of its own values.
From those of all processes, in the order of ranks, every process computes the same

    count = Σ count[r]                    mean = Σ count[r]·mean[r] / count, in fp64
    m2 = Σ m2[r] + count[r]·(mean[r] − mean)²

These are sums of squares around means, not differences of raw sums: a channel with mean 1000 and
deviation 1 is accurate, and an infinite mean stays infinite. The formula is that of Chan, Golub &
LeVeque 1983 (The American Statistician 37, p. 242) for any number of parts at once: 64 processes
need as many launches as two. Processes may have different numbers of values, or none.

Backward, one all-reduce: Σdy and Σdy·xhat over all values, from which dz = a·dy + b·(z − mean) + c
follows. The gradients of weight and bias remain the sums of each process, and
DistributedDataParallel averages them like all other gradients, as with `torch.nn.SyncBatchNorm`.

The count is gathered with the statistics in their dtype, so fp32 rounds it from 2²⁴ on. It stays
on the device; the host waits for it only in a process with at most one value per channel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group of processes that share statistics; None if this process is the only one.

    process_group: as in `nn.SyncBatchNorm`; None is the default group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def merge_moments(
    mean: Tensor, m2: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C], m2 [C] and count [1] over all processes of `group`, bit-identical on each.

    mean, m2: of this process's `count` values per channel; zeros if it has no values.
    Raises ValueError on every process if all together have a single value per channel.
    """
    own = torch.cat([mean, m2, mean.new_full((1,), count)])
    ranks, channels = dist.get_world_size(group), mean.numel()
    gathered = own.new_empty(ranks * own.numel())
    # Before torch 2.13, all_gather_single is named all_gather_into_tensor.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, own, group=group)
    means, m2s, counts = gathered.view(ranks, -1).double().split([channels, channels, 1], dim=1)
    total = counts.sum(0)
    if count <= 1 and total == 1:
        raise ValueError(
            "x: expected more than 1 value per channel when training, got 1 in all processes"
        )
    merged = (counts * means).sum(0) / total.clamp(min=1)
    spread = (m2s + counts * (means - merged).square()).sum(0)
    return merged.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)


def mean_sums(
    sum_dy: Tensor, sum_dy_xhat: Tensor, count: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Σdy / count and Σdy·xhat / count over all processes of `group`, each [C]."""
    sums = torch.cat([sum_dy, sum_dy_xhat])
    dist.all_reduce(sums, group=group)
    total_dy, total_dy_xhat = sums.split(sum_dy.numel())
    return total_dy / count, total_dy_xhat / count
