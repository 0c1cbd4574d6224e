"""Fuse a residual block of your own, and read why the layers of another block are not fused.

`fuse` recognizes a block by what its forward pass computes; names do not matter.

Needs: nothing beyond resnet_fast
Run:   python examples/custom_block.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast


class MyBlock(nn.Module):
    """conv + BatchNorm + ReLU, conv + BatchNorm, residual add, ReLU: fused into one call."""

    def __init__(self, channels, norm=nn.BatchNorm2d):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_a = norm(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_b = norm(channels)

    def forward(self, x):
        h = F.relu(self.norm_a(self.a(x)))
        return F.relu(x + self.norm_b(self.b(h)))


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = nn.Sequential(MyBlock(32), MyBlock(32, norm=nn.InstanceNorm2d))
    net = net.to(device, memory_format=torch.channels_last)
    fused = resnet_fast.fuse(net)

    report = resnet_fast.explain(fused)
    print(report, end="\n\n")
    by_path = {row.path: row for row in report.rows}
    assert by_path["0"].state == "fused"
    assert by_path["1"].what == "add relu"
    assert by_path["1.a"].what == "conv"
    assert by_path["1.norm_a"].state == "left alone"

    # Both run, fused or not: outputs and gradients are those of the original, up to rounding.
    x = torch.randn(8, 32, 28, 28, device=device).to(memory_format=torch.channels_last)
    expected = net(x)
    expected_grads = torch.autograd.grad(expected.square().mean(), list(net.parameters()))
    y = fused(x)
    grads = torch.autograd.grad(y.square().mean(), list(fused.parameters()))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)
    print("ok: block 0 is fused, of block 1 the end; outputs and gradients agree")


if __name__ == "__main__":
    main()
