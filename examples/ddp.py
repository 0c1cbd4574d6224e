"""DistributedDataParallel around a fused model, compared with plain PyTorch in one process.

Runs on one GPU a process (NCCL), or on the CPU (gloo).

Needs: nothing beyond resnet_fast
Run:   torchrun --nproc-per-node 2 examples/ddp.py
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import resnet_fast


def train(model, parts, steps=2):
    """Steps on the mean loss of parts, which normalize by their own statistics."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in parts:
            (F.cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()


def main():
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same model and the same batch in every process
    model = resnet_fast.create_model("cifar_resnet20").to(device, torch.float64)
    plain = resnet_fast.unfuse(copy.deepcopy(model))
    x = torch.randn(8 * world, 3, 32, 32, dtype=torch.float64, device=device)
    y = torch.randint(10, (8 * world,), device=device)
    parts = list(zip(x.chunk(world), y.chunk(world), strict=True))

    # A foreign model: DistributedDataParallel(resnet_fast.fuse(model)), in this order.
    wrapped = DistributedDataParallel(model, device_ids=[device] if cuda else None)
    train(wrapped, [parts[rank]])
    train(plain, parts)  # the same in one process

    for value, expected in zip(wrapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    if rank == 0:
        print(f"ok: {world} processes trained as plain PyTorch in one")
    dist.barrier()  # no process leaves while another still communicates
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
