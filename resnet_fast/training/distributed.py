"""Training on several processes, as `torchrun` starts them, or on this one alone."""

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
    """This process among all: `rank` of `size`."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def world() -> World:
    """The processes of the default group; where there is none, this one alone."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started; the device of this one.

    NCCL for "cuda", one GPU a process of a machine; gloo for "cpu". Without torchrun: `device`.
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
    """This process's indices for every step of an epoch: shuffled anew, the same in every run.

    All processes together see batch i of `batch_size` images; a process sees every size-th of
    them. What does not fill a batch is left out.
    """
    sampler = DistributedSampler(range(images), here.size, here.rank, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    own = batch_size // here.size
    with torch.device("cpu"):  # whatever torch.set_default_device says
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
    """Every process takes the first one's buffers: batch statistics differ among processes."""
    if world().size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gathered(value: Any) -> list[Any]:
    """`value` of every process on the first one; elsewhere an empty list."""
    here = world()
    if here.size == 1:
        return [value]
    found = [None] * here.size if here.first else None
    dist.gather_object(value, found)
    return found or []
