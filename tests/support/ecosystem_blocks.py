"""Residual blocks and units as other packages write them, of a few channels."""

import torch
import torch.nn.functional as F
from ecosystem_norms import Functional, NormAct, Ordered, Unit, conv_norm
from torch import nn


def conv3(channels, planes, stride=1, **options):
    return nn.Conv2d(channels, planes, 3, stride, 1, bias=False, **options)


class Basic(nn.Module):
    """conv norm relu conv norm, then what `tail` does, + shortcut, relu; with `between` inside.

    tail: on the main path before the addition. drop: between the first norm and its ReLU. between:
    after the first ReLU. shortcut: on the other path.
    """

    def __init__(
        self, norm=nn.BatchNorm2d, stride=1, tail=None, drop=None, between=None, shortcut=None
    ):
        super().__init__()
        self.conv1, self.bn1 = conv3(4, 4, stride), norm(4)
        self.drop = nn.Identity() if drop is None else drop
        self.relu = nn.ReLU(inplace=True)
        self.between = nn.Identity() if between is None else between
        self.conv2, self.bn2 = conv3(4, 4), norm(4)
        self.tail, self.downsample = tail, shortcut

    def forward(self, x):
        identity = x
        out = self.between(self.relu(self.drop(self.bn1(self.conv1(x)))))
        out = self.bn2(self.conv2(out))
        if self.tail is not None:
            out = self.tail(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class NormActPreAct(nn.Module):
    """As timm's ResNetV2: norms that activate, and a projection of what the first one gives."""

    def __init__(self, channels, planes, stride=1):
        super().__init__()
        self.downsample = None
        if stride > 1 or channels != planes:
            self.downsample = nn.Conv2d(channels, planes, 1, stride, bias=False)
        self.norm1, self.conv1 = NormAct(channels), nn.Conv2d(channels, 4, 1, bias=False)
        self.norm2, self.conv2 = NormAct(4), conv3(4, 4, stride)
        self.norm3, self.conv3 = NormAct(4), nn.Conv2d(4, planes, 1, bias=False)
        self.drop_path = nn.Identity()

    def forward(self, x):
        out = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv1(out)
        out = self.conv2(self.norm2(out))
        out = self.conv3(self.norm3(out))
        return self.drop_path(out) + shortcut


class Gate(nn.Module):
    """Squeeze and excitation by 1x1 convolutions."""

    def __init__(self, channels, hidden=2):
        super().__init__()
        self.fc1, self.act = nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True)
        self.fc2, self.gate = nn.Conv2d(hidden, channels, 1), nn.Sigmoid()

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(s))))


class RegNet(nn.Module):
    """As timm's RegNetY: units that activate, a gate in the middle, a projection with a norm."""

    def __init__(self, act=nn.ReLU, stride=2):
        super().__init__()
        self.conv1 = Unit(4, 8, act=act)
        self.conv2 = Unit(8, 8, 3, stride, groups=2, act=act)
        self.se = Gate(8)
        self.conv3 = Unit(8, 4, act=None)
        self.act3 = act(inplace=True)
        self.drop_path = nn.Identity()
        self.downsample = Unit(4, 4, stride=stride, act=None) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = self.conv3(self.se(self.conv2(self.conv1(x))))
        return self.act3(self.drop_path(out) + self.downsample(x))


class SiLUBlock(nn.Module):
    """Norms that activate by SiLU: the activation stays, conv and norm fuse."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = conv3(4, 4), NormAct(4, nn.SiLU)
        self.conv2, self.norm2 = conv3(4, 4), NormAct(4, None)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)))) + x


class FrozenUnits(nn.Module):
    """A block of units whose norm is frozen and activates."""

    def __init__(self, norm):
        super().__init__()
        self.conv1 = Unit(4, 4, 3, norm=norm)
        self.conv2 = Unit(4, 4, 3, act=None, norm=norm)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv2(self.conv1(x)) + x)


class ConvLayer(nn.Module):
    """As Hugging Face's: convolution, normalization, activation."""

    def __init__(self, channels, planes, kernel=3, stride=1, act=True):
        super().__init__()
        self.convolution = nn.Conv2d(
            channels, planes, kernel, stride, kernel // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(planes)
        self.activation = nn.ReLU() if act else nn.Identity()

    def forward(self, input):
        hidden_state = self.convolution(input)
        hidden_state = self.normalization(hidden_state)
        return self.activation(hidden_state)


class Shortcut(nn.Module):
    """As Hugging Face's: a projection with its norm."""

    def __init__(self, channels, planes, stride):
        super().__init__()
        self.convolution = nn.Conv2d(channels, planes, 1, stride, bias=False)
        self.normalization = nn.BatchNorm2d(planes)

    def forward(self, input):
        return self.normalization(self.convolution(input))


class HuggingFace(nn.Module):
    """As Hugging Face's residual layers."""

    def __init__(self, channels, planes, stride=1):
        super().__init__()
        projected = stride > 1 or channels != planes
        self.shortcut = Shortcut(channels, planes, stride) if projected else nn.Identity()
        self.layer = nn.Sequential(
            ConvLayer(channels, 4, 1),
            ConvLayer(4, 4, 3, stride),
            ConvLayer(4, planes, 1, act=False),
        )
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class OrderedBlock(nn.Module):
    """Two units by an order of names, and a ReLU function after the addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = Ordered(4, 4), Ordered(4, 4, act=False)

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + x)


class ChannelAttention1d(nn.Module):
    """As ECA: a 1-D convolution over the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1, 1).sigmoid()
        return x * y.expand_as(x)


class ChannelAndSpace(nn.Module):
    """As CBAM: a gate per channel, then one per pixel with a norm of its own."""

    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, channels, 1, bias=False)
        )
        self.conv, self.bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)

    def forward(self, x):
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        x = x * gate.sigmoid()
        pixels = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.bn(self.conv(pixels)).sigmoid()


class SplitAttention(nn.Module):
    """As ResNeSt's, of two splits: a grouped convolution whose halves are weighed."""

    def __init__(self, planes=4, radix=2):
        super().__init__()
        self.radix = radix
        self.conv = conv3(planes, planes * radix, groups=radix)
        self.bn0, self.act0 = nn.BatchNorm2d(planes * radix), nn.ReLU(inplace=True)
        self.fc1, self.bn1 = nn.Conv2d(planes, 2, 1), nn.BatchNorm2d(2)
        self.act1, self.fc2 = nn.ReLU(inplace=True), nn.Conv2d(2, planes * radix, 1)

    def forward(self, x):
        x = self.act0(self.bn0(self.conv(x)))
        n, c, h, w = x.shape
        x = x.reshape(n, self.radix, c // self.radix, h, w)
        gap = x.sum(1).mean((2, 3), keepdim=True)
        weights = self.fc2(self.act1(self.bn1(self.fc1(gap))))
        weights = weights.view(n, self.radix, -1).softmax(1).view(n, self.radix, -1, 1, 1)
        return (x * weights).sum(1)


class Middle(nn.Module):
    """A bottleneck whose 3x3 convolution is `middle`, between two units."""

    def __init__(self, middle):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.act1, self.conv2 = nn.ReLU(inplace=True), middle
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv2(self.act1(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(out))
        out += x
        return self.act3(out)


class Res2Net(nn.Module):
    """Channels in four parts; each convolution but the first reads the sum of part and result."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.convs = nn.ModuleList(conv3(4, 4) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.conv3, self.bn3 = nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        parts = torch.split(self.relu(self.bn1(self.conv1(x))), 4, 1)
        done, part = [], parts[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            part = parts[i] if i == 0 else part + parts[i]
            part = self.relu(bn(conv(part)))
            done.append(part)
        done.append(parts[-1])
        out = self.bn3(self.conv3(torch.cat(done, 1)))
        out += x
        return self.relu(out)


class InstanceAndBatch(nn.Module):
    """As IBN-a: an instance norm for one half of the channels, a batch norm for the other."""

    def __init__(self, channels=4):
        super().__init__()
        self.half = channels // 2
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.half)

    def forward(self, x):
        a, b = torch.split(x, [self.half, x.shape[1] - self.half], 1)
        return torch.cat((self.IN(a.contiguous()), self.BN(b.contiguous())), 1)


class InstanceBlock(Basic):
    """A basic block with IBN-a as its first norm."""

    def __init__(self):
        super().__init__()
        self.bn1 = InstanceAndBatch()


class DropPath(nn.Module):
    """As timm's stochastic depth: whole images of the main path, in training."""

    def __init__(self, p=0.5):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * keep.div_(1 - self.p)


class DropBlock(nn.Module):
    """Drops squares of pixels, in training."""

    def __init__(self, p=0.1, size=3):
        super().__init__()
        self.p, self.size = p, size

    def forward(self, x):
        if not self.training or not self.p:
            return x
        seeds = torch.empty_like(x).bernoulli_(self.p / self.size**2)
        mask = 1 - F.max_pool2d(seeds, self.size, 1, self.size // 2)
        return x * mask * (mask.numel() / mask.sum().add(1e-7))


class WideDropout(nn.Module):
    """As Wide ResNet: pre-activation with dropout between the convolutions."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), conv3(4, 4)
        self.dropout = nn.Dropout(0.3)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), conv3(4, 4)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.dropout(F.relu(self.bn2(out)))
        return self.conv2(out) + x


class PreActivation(nn.Module):
    """Full pre-activation, its shortcut added in place."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), conv3(4, 4)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), conv3(4, 4)
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Averaged(nn.Module):
    """As CLIP's bottleneck: no stride, an average pool on both paths instead."""

    def __init__(self, channels, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv3(4, 4), nn.BatchNorm2d(4)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(4, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.relu2 = nn.ReLU(inplace=True)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != planes:
            pooled = nn.AvgPool2d(stride)
            self.downsample = nn.Sequential(pooled, *conv_norm(channels, planes, 1, act=None))

    def forward(self, x):
        identity = x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu3(out)


class BlurPool(nn.Module):
    """A fixed filter per channel after reflection, of stride 2."""

    def __init__(self, channels):
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        plane = line[:, None] * line[None] / 16
        self.register_buffer("filt", plane.repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.filt, stride=2, groups=x.shape[1])


class Inverted(nn.Module):
    """As MobileNetV2's block: ReLU6, depthwise in the middle, no activation at its end."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Sequential(*conv_norm(4, 8, 1, act=nn.ReLU6)),
            nn.Sequential(*conv_norm(8, 8, 3, groups=8, act=nn.ReLU6)),
            *conv_norm(8, 4, 1, act=None),
        )

    def forward(self, x):
        return x + self.conv(x)


class Branches(nn.Module):
    """As RepVGG in training: a 3x3 and a 1x1 convolution, each with a norm, and a norm of x."""

    def __init__(self):
        super().__init__()
        self.conv_3x3 = nn.Sequential(*conv_norm(4, 4, 3, act=None))
        self.conv_1x1 = nn.Sequential(*conv_norm(4, 4, 1, act=None))
        self.identity = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv_1x1(x) + self.conv_3x3(x)
        out += self.identity(x)
        return self.act(out)


class Shuffle(nn.Module):
    """As ShuffleNetV2's unit: one half of the channels goes through, both are shuffled."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(
            *conv_norm(4, 4, 1), *conv_norm(4, 4, 3, groups=4, act=None), *conv_norm(4, 4, 1)
        )

    def forward(self, x):
        a, b = x.chunk(2, dim=1)
        out = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = out.size()
        return torch.transpose(out.view(n, 2, c // 2, h, w), 1, 2).contiguous().view(n, c, h, w)


class Root(nn.Module):
    """As DLA's: a convolution of several inputs side by side, the first of them added."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.residual = nn.ReLU(inplace=True), True

    def forward(self, children):
        out = self.bn(self.conv(torch.cat(children, 1)))
        if self.residual:
            out += children[0]
        return self.relu(out)


class Tree(nn.Module):
    """Two basic blocks and the root that joins them."""

    def __init__(self):
        super().__init__()
        self.tree1, self.tree2, self.root = Basic(), Basic(), Root()

    def forward(self, x):
        a = self.tree1(x)
        b = self.tree2(a)
        return self.root([b, a])


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self):
        super().__init__()
        self.branch1 = Functional(4, 4, kernel_size=1)
        self.branch2 = nn.Sequential(
            Functional(4, 4, kernel_size=1), Functional(4, 4, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1, ceil_mode=True), Functional(4, 4, kernel_size=1)
        )
        self.branch4 = Functional(4, 4, kernel_size=(1, 7), padding=(0, 3))

    def forward(self, x):
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)
        parts = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(pooled)]
        return torch.cat(parts, 1)


class DenseLayer(nn.Module):
    """As torchvision's: a list of all earlier results in, a few new channels out."""

    def __init__(self, channels):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = conv3(8, 4)

    def bottleneck(self, inputs):
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input):
        inputs = [input] if isinstance(input, torch.Tensor) else input
        return self.conv2(self.relu2(self.norm2(self.bottleneck(inputs))))


class Dense(nn.Module):
    """Two dense layers and a transition."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"a": DenseLayer(4), "b": DenseLayer(8)})
        self.transition = nn.Sequential(
            nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 4, 1, bias=False),
            nn.AvgPool2d(2),
        )  # fmt: skip

    def forward(self, x):
        features = [x]
        for _, layer in self.layers.items():
            features.append(layer(features))
        return self.transition(torch.cat(features, 1))
