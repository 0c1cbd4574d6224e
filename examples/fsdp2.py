"""FSDP2 (`fully_shard`) of a fused model, compared with plain PyTorch in one process.

FSDP2 refuses channels_last filters: convert the input alone. Call `explain` before `fully_shard`:
after it, `explain` sees sharded parameters. Runs on one GPU a process (NCCL), or on the CPU (gloo).

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


def train(model, parts, steps=2):
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
    mesh = dist.init_device_mesh(device.type, (world,))
    torch.manual_seed(0)  # the same model and batch (channels_last) in every process
    model = resnet_fast.create_model("cifar_resnet20").to(device, torch.float64)
    plain = resnet_fast.unfuse(copy.deepcopy(model))
    x = torch.randn(8 * world, 32, 32, 3, dtype=torch.float64, device=device).movedim(3, 1)
    y = torch.randint(10, (8 * world,), device=device)
    parts = list(zip(x.chunk(world), y.chunk(world), strict=True))
    assert {row.state for row in resnet_fast.explain(model).rows} == {"fused"}
    for module in (*model.layer1, *model.layer2, *model.layer3, model):
        fully_shard(module, mesh=mesh)  # blocks and the model, no layer inside of a block
    train(model, [parts[rank]])
    train(plain, parts)  # the same in one process

    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.full_tensor(), expected, rtol=1e-6, atol=1e-8)
    if rank == 0:
        print(f"ok: {world} processes with sharded parameters trained as plain PyTorch in one")
    dist.barrier()  # no process leaves while another still communicates
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
