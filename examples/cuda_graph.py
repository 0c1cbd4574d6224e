"""`graph_step` and `graph`: a training step, and inference, as one CUDA graph each.

On a CPU the same code runs call by call.

Needs: nothing beyond resnet_fast
Run:   python examples/cuda_graph.py
"""

import torch
import torch.nn.functional as F

import resnet_fast


def main(steps=15):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet_fast.create_model("cifar_resnet20")
    model.to(device, memory_format=torch.channels_last)
    x = torch.randn(16, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (16,), device=device)

    # A learning rate that is a tensor on the device puts the update into the graph.
    rate = torch.tensor(0.05, device=device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = resnet_fast.graph_step(model, F.cross_entropy, optimizer, x, y)
    assert step.in_graph
    losses = []
    for _ in range(steps):
        losses.append(step(x, y).item())  # .item() copies: the next call overwrites the result
        schedule.step()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    assert losses[-1] < losses[0] / 2

    model.eval()
    run = resnet_fast.graph(model, x)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
    print("ok: the loss went down, the graph's logits are the model's")


if __name__ == "__main__":
    main()
