"""A feature pyramid and a small detection head on a fused backbone: all of it is fused.

Call the backbone's layers one by one, and fuse the whole detector. A backbone of torchvision works
the same way, and `fuse` takes the result of torchvision's `create_feature_extractor`.

Needs: nothing beyond resnet_fast
Run:   python examples/features_and_detection.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import resnet_fast


def conv_bn_relu(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """For every position of four levels: logits of `classes`, and a box."""

    def __init__(self, backbone, classes, widths=(64, 128, 256, 512), width=64):
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(conv_bn_relu(w, width, 1) for w in widths)
        self.tower = nn.Sequential(conv_bn_relu(width, width, 3), conv_bn_relu(width, width, 3))
        self.out = nn.Conv2d(width, classes + 4, 1)

    def forward(self, x):
        net = self.backbone
        c = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        stages, levels = (net.layer1, net.layer2, net.layer3, net.layer4), []
        for stage, lateral in zip(stages, self.lateral, strict=True):
            c = stage(c)
            levels.append(lateral(c))
        for i in (2, 1, 0):  # top-down
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0)
        return [self.out(self.tower(level)) for level in levels]


def main():
    torch.manual_seed(0)
    plain = Detector(resnet_fast.create_model("resnet18", fused=False), classes=3)
    plain.eval().to(memory_format=torch.channels_last)
    detector = resnet_fast.fuse(plain)
    report = resnet_fast.explain(detector)
    print(report)
    x = torch.randn(2, 3, 128, 128).to(memory_format=torch.channels_last)
    torch.testing.assert_close(detector(x), plain(x), rtol=1e-3, atol=1e-3)
    left = {row.path for row in report.rows if row.state != "fused"}
    assert left == {"(model)"}  # the additions of the pyramid
    print("ok: backbone, pyramid and head are fused, outputs agree")


if __name__ == "__main__":
    main()
