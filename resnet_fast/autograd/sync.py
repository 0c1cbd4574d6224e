"""Batch statistics over several processes: the two collectives of a synchronized normalization.

Forward, one all-gather: each process r has the count, the mean and m2 = Σ(z − mean)² of its own
values, and from everybody's, in the order of ranks, all make the same

    count = Σ count[r]                    mean = Σ count[r]·mean[r] / count, in fp64
    m2 = Σ m2[r] + count[r]·(mean[r] − mean)²

Sums of squares around means, never differences of raw sums: a channel with mean 1000 and deviation
1 is right, and an infinite mean stays infinite. It is the formula of Chan, Golub & LeVeque 1983
(The American Statistician 37, p. 242) for any number of parts at once: as many launches for 64
processes as for two. A process may have more values than another, or none.

Backward, one all-reduce: Σdy and Σdy·xhat over all values, from which dz = a·dy + b·(z − mean) + c
follows. The gradients of weight and bias stay the process's own sums, for DistributedDataParallel
to average as it does all others: so does `torch.nn.SyncBatchNorm`.

The count travels with them, rounded from 2²⁴ values on as they are, and stays on the device: the
host waits for it only in a process that has no more than one value a channel itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes to share statistics with, this one among them; None where there is no other.

    process_group: as of `nn.SyncBatchNorm`, None for the default group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def merge_moments(
    mean: Tensor, m2: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """mean [C], m2 [C] and count [1] over all processes of `group`, the same bits on each.

    mean, m2: of this process's `count` values a channel; zeros without values.
    Raises ValueError, on every process, for a single value a channel in all of them.
    """
    own = torch.cat([mean, m2, mean.new_full((1,), count)])
    ranks, channels = dist.get_world_size(group), mean.numel()
    gathered = own.new_empty(ranks * own.numel())
    # all_gather_into_tensor is its name before torch 2.13.
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
