"""FSDP2 (`fully_shard`) of a fused model, compared with plain PyTorch in one process.

Keep the parameters contiguous: FSDP2 does not shard channels_last filters. Inputs may be
channels_last. Each process has its own GPU (NCCL), or all run on the CPU (gloo).

Needs: nothing beyond resnet_fast
Run:   torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import copy
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

import resnet_fast


def main(steps=2):
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (world,))

    torch.manual_seed(0)  # the same model and the same batch in every process
    model = resnet_fast.create_model("cifar_resnet20").to(device, torch.float64)
    plain = resnet_fast.unfuse(copy.deepcopy(model))
    x = torch.randn(8 * world, 3, 32, 32, dtype=torch.float64, device=device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(10, (8 * world,), device=device)

    for block in (*model.layer1, *model.layer2, *model.layer3):
        fully_shard(block, mesh=mesh)  # a block is the unit: its layers are called by one op
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(world), y.chunk(world), strict=True):
            (F.cross_entropy(plain(part), labels) / world).backward()
        optimizer.step()

    parameters = dict(plain.named_parameters())
    for name, value in model.named_parameters():
        whole = value.full_tensor()
        torch.testing.assert_close(whole, parameters[name], rtol=1e-6, atol=1e-8, msg=name)
    if rank == 0:
        print(f"ok: {world} processes with sharded parameters trained as plain PyTorch in one")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
