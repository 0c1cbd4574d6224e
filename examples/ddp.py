"""DistributedDataParallel around a fused model, compared with plain PyTorch in one process.

Each process has its own GPU (NCCL), or all run on the CPU (gloo).

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


def main(steps=2):
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

    # A foreign model: DistributedDataParallel(resnet_fast.fuse(model)), in this order.
    wrapped = DistributedDataParallel(model, device_ids=[device] if cuda else None)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
        optimizer.step()

    # The same in one process: the mean of the gradients of every process's part of the batch.
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(world), y.chunk(world), strict=True):
            (F.cross_entropy(plain(part), labels) / world).backward()
        optimizer.step()

    parameters = dict(plain.named_parameters())
    for name, value in wrapped.module.named_parameters():
        torch.testing.assert_close(value, parameters[name], rtol=1e-6, atol=1e-8, msg=name)
    if rank == 0:
        print(f"ok: {world} processes trained as plain PyTorch in one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
