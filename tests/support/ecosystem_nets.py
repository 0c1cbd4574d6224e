"""Whole nets as other packages write them: feature extractors, detection, segmentation."""

from collections import OrderedDict

import foreign_models
import torch
import torch.nn.functional as F
from ecosystem_blocks import Averaged, HuggingFace
from ecosystem_norms import conv_norm
from torch import fx, nn


class Features(foreign_models.ResNet):
    """A ResNet that returns what each stage gives."""

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        a = self.layer1(x)
        return {"layer1": a, "layer2": self.layer2(a)}


def feature_extractor():
    """As torchvision's: an fx graph of a net's layers."""
    return fx.symbolic_trace(Features())


def exported():
    """A net as `torch.export` gives it back."""
    net = foreign_models.ResNet().double().eval()
    return torch.export.export(net, (torch.zeros(2, 3, 32, 32).double(),)).module()


class LayerGetter(nn.ModuleDict):
    """As torchvision's: children in turn, some of their results kept."""

    def __init__(self, net, kept):
        children = OrderedDict()
        for name, child in net.named_children():
            children[name] = child
            if name == list(kept)[-1]:
                break
        super().__init__(children)
        self.kept = dict(kept)

    def forward(self, x):
        out = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.kept:
                out[self.kept[name]] = x
        return out


def layer_getter(norm=nn.BatchNorm2d):
    """A ResNet's two stages, with `norm` in place of each batch norm."""
    net = foreign_models.ResNet(foreign_models.Bottleneck)
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, norm(child.num_features))
    return LayerGetter(net, {"layer1": "low", "layer2": "out"})


class Pyramid(nn.Module):
    """A feature pyramid over `body`: 1x1 and 3x3 convolutions without norms."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.inner = nn.ModuleList([nn.Conv2d(16, 4, 1), nn.Conv2d(32, 4, 1)])
        self.outer = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, x):
        found = self.body(x)
        names, values = list(found.keys()), list(found.values())
        last = self.inner[-1](values[-1])
        results = [self.outer[-1](last)]
        for i in range(len(values) - 2, -1, -1):
            side = self.inner[i](values[i])
            last = side + F.interpolate(last, size=side.shape[-2:], mode="nearest")
            results.insert(0, self.outer[i](last))
        return OrderedDict(zip(names, results, strict=True))


class Pooling(nn.Sequential):
    """The branch of ASPP that sees the whole image."""

    def __init__(self, channels, planes):
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_norm(channels, planes, 1))

    def forward(self, x):
        size = x.shape[-2:]
        for layer in self:
            x = layer(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Dilated(nn.Module):
    """As DeepLabV3: a backbone with dilation, parallel dilated convolutions, a classifier."""

    def __init__(self):
        super().__init__()
        self.backbone = layer_getter()
        for conv in self.backbone["layer2"].modules():
            if isinstance(conv, nn.Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (2, 2)
        branches = [nn.Sequential(*conv_norm(32, 4, 1))]
        branches += [nn.Sequential(*conv_norm(32, 4, 3, dilation=d)) for d in (2, 3)]
        self.convs = nn.ModuleList([*branches, Pooling(32, 4)])
        self.project = nn.Sequential(*conv_norm(16, 4, 1), nn.Dropout(0.5))
        self.classifier = nn.Sequential(*conv_norm(4, 4), nn.Conv2d(4, 5, 1))

    def forward(self, x):
        size = x.shape[-2:]
        x = self.backbone(x)["out"]
        x = self.project(torch.cat([conv(x) for conv in self.convs], 1))
        x = F.interpolate(self.classifier(x), size=size, mode="bilinear", align_corners=False)
        return OrderedDict(out=x)


class UNet(nn.Module):
    """Two levels: skips beside what is upsampled, once by a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(*conv_norm(3, 4), *conv_norm(4, 4))
        self.down2 = nn.Sequential(*conv_norm(4, 8), *conv_norm(8, 8))
        self.bottom = nn.Sequential(*conv_norm(8, 8))
        self.up2 = nn.ConvTranspose2d(8, 8, 2, 2)
        self.after2 = nn.Sequential(*conv_norm(16, 4), *conv_norm(4, 4))
        self.after1 = nn.Sequential(*conv_norm(8, 4))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(self.pool(a))
        x = self.up2(self.bottom(self.pool(b)))
        x = self.after2(torch.cat([b, x], 1))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.head(self.after1(torch.cat([a, x], 1)))


class Tower(nn.Module):
    """As RetinaNet's head: one tower for every level."""

    def __init__(self, norms):
        super().__init__()
        layers = []
        for _ in range(2):
            conv = nn.Conv2d(4, 4, 3, padding=1, bias=not norms)
            layers += [conv, nn.BatchNorm2d(4)] if norms else [conv]
            layers.append(nn.ReLU(inplace=True))
        self.conv, self.logits = nn.Sequential(*layers), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, features):
        found = []
        for level in features:
            y = self.logits(self.conv(level))
            n, _, h, w = y.shape
            found.append(y.view(n, -1, 2, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 2))
        return torch.cat(found, 1)


class Retina(nn.Module):
    """A shared head on two levels of one image."""

    def __init__(self, norms=True):
        super().__init__()
        self.head = Tower(norms)

    def forward(self, x):
        return self.head([x, F.max_pool2d(x, 2)])


class Fuse(nn.Module):
    """As HRNet's fuse layers: each output is the sum of all branches, resampled, and a ReLU."""

    def __init__(self, branches=3):
        super().__init__()
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self.between(i, j) for j in range(branches)) for i in range(branches)
        )
        self.fuse_act = nn.ReLU(inplace=False)

    @staticmethod
    def between(i, j):
        """From branch j to branch i, which has 2^(j - i) as many rows."""
        if i == j:
            return nn.Identity()
        if j > i:
            up = nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")
            return nn.Sequential(*conv_norm(4, 4, 1, act=None), up)
        steps = [nn.Sequential(*conv_norm(4, 4, 3, 2)) for _ in range(i - j - 1)]
        return nn.Sequential(*steps, nn.Sequential(*conv_norm(4, 4, 3, 2, act=None)))

    def forward(self, x):
        fused = []
        for i, row in enumerate(self.fuse_layers):
            y = None
            for j, layer in enumerate(row):
                part = x[j] if i == j else layer(x[j])
                y = part if y is None else y + part
            fused.append(self.fuse_act(y))
        return fused


class HighResolution(nn.Module):
    """Three branches and their fuse layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(4, 4))
        self.second = nn.Sequential(*conv_norm(4, 4, stride=2))
        self.third = nn.Sequential(*conv_norm(4, 4, stride=2))
        self.fuse = Fuse()

    def forward(self, x):
        a = self.stem(x)
        b = self.second(a)
        return self.fuse([a, b, self.third(b)])


class Clip(nn.Module):
    """As CLIP's ResNet: a stem of three convolutions, and average pools for strides."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv_norm(3, 4, stride=2)
        self.conv2, self.bn2, self.relu2 = conv_norm(4, 4)
        self.conv3, self.bn3, self.relu3 = conv_norm(4, 8)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = nn.Sequential(Averaged(8, 16), Averaged(16, 16))
        self.layer2 = nn.Sequential(Averaged(16, 16, 2))

    def forward(self, x):
        def stem(x):
            x = self.relu1(self.bn1(self.conv1(x)))
            x = self.relu2(self.bn2(self.conv2(x)))
            x = self.relu3(self.bn3(self.conv3(x)))
            return self.avgpool(x)

        x = x.type(self.conv1.weight.dtype)
        return self.layer2(self.layer1(stem(x)))


class HuggingFaceNet(nn.Module):
    """As Hugging Face's encoder: stages in a list, and a record with what each gives."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(HuggingFace(c, k, s), HuggingFace(k, k)) for c, k, s in
            ((4, 16, 1), (16, 8, 2))
        )  # fmt: skip

    def forward(self, hidden_state, output_hidden_states=True):
        states = ()
        for stage in self.stages:
            hidden_state = stage(hidden_state)
            states = states + (hidden_state,) if output_hidden_states else states
        return OrderedDict(last_hidden_state=hidden_state, hidden_states=states)
