"""Training in one process, or in several that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class World:
    """This process is number `rank` of `size`."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0


def world() -> World:
    """The processes of the default group; without a group, this process alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started; yields this process's device.

    "cuda" takes NCCL and GPU number LOCAL_RANK, "cpu" takes gloo. Without torchrun: `device`.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield torch.device(device)
        return
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        yield where
    finally:
        dist.destroy_process_group()


def batches(images: int, batch_size: int, seed: int, epoch: int, here: World) -> list[Tensor]:
    """This process's image indices for every step of `epoch`: shuffled, the same in every run.

    All processes together see batch i of `batch_size` images, and each process every size-th of
    them. The incomplete last batch is left out.
    """
    sampler = DistributedSampler(range(images), here.size, here.rank, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    own = batch_size // here.size
    with torch.device("cpu"):  # also under torch.set_default_device
        order = torch.tensor(list(sampler), dtype=torch.int64)
    return list(order[: images // batch_size * own].split(own))


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes."""
    if world().size > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process."""
    if world().size == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=device)).item())


def same_buffers(module: nn.Module) -> None:
    """Broadcast the first process's buffers: running statistics differ between processes."""
    if world().size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gathered(value: Any) -> list[Any]:
    """The `value` of every process, on the first one; an empty list on the others."""
    here = world()
    if here.size == 1:
        return [value]
    found = [None] * here.size if here.first else None
    dist.gather_object(value, found)
    return found or []
