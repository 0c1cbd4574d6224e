"""Models as others write them: what `fuse` recognizes, and what it must leave alone."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune


class Basic(nn.Module):
    """As torchvision writes a basic block: one ReLU module, added in place."""

    expansion = 1

    def __init__(self, channels, planes, stride=1, groups=1, width=64, **conv):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False, **conv)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = projection(channels, planes, stride)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision writes a bottleneck, with its groups and width."""

    expansion = 4

    def __init__(self, channels, planes, stride=1, groups=1, width=64):
        super().__init__()
        inner = planes * width // 64 * groups
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(channels, planes * 4, stride)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def projection(channels, planes, stride):
    if stride == 1 and channels == planes:
        return None
    conv = nn.Conv2d(channels, planes, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(planes))


class ResNet(nn.Module):
    """As torchvision writes the net, with two stages of two blocks."""

    def __init__(self, block=Basic, planes=4, **options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        wide = planes * block.expansion
        self.layer1 = nn.Sequential(
            block(planes, planes, **options), block(wide, planes, **options)
        )
        self.layer2 = nn.Sequential(
            block(wide, 2 * planes, 2, **options), block(2 * wide, 2 * planes, **options)
        )
        self.fc = nn.Linear(2 * wide, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class WithIdentities(nn.Module):
    """As timm writes a basic block: members that do nothing, a ReLU for each place."""

    def __init__(self, stride=1, drop_path=None):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.drop_block = nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.se = None
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(4, 4, 1, stride, bias=False)
            self.downsample = nn.Sequential(nn.Identity(), conv, nn.BatchNorm2d(4))
        self.drop_path = drop_path

    def forward(self, x):
        shortcut = x
        x = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        x = self.bn2(self.conv2(x))
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class Functional(nn.Module):
    """Functions for ReLU and addition, an empty `Sequential` for the identity."""

    def __init__(self, shortcut=None, **conv):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, **conv)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential() if shortcut is None else shortcut

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return F.relu(torch.add(self.shortcut(x), self.bn2(self.conv2(out))), inplace=True)


class InSequentials(nn.Module):
    """Both ways as `Sequential`s, the last ReLU made on the spot."""

    def __init__(self, shortcut=()):
        super().__init__()
        self.residual = nn.Sequential(*double(4, 4))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual(x) + self.shortcut(x))


def double(channels, planes):
    """Two biased 3x3 convolutions, each with its norm, and a ReLU between."""
    return (
        nn.Conv2d(channels, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU(),
        nn.Conv2d(planes, planes, 3, padding=1), nn.BatchNorm2d(planes),
    )  # fmt: skip


class Residual(nn.Sequential):
    """A `Sequential` with a forward of its own, which is a block."""

    def forward(self, x):
        return F.relu(super().forward(x) + x)


class OptionA(nn.Module):
    """A shortcut without parameters: fewer channels, zeros in their place."""

    def forward(self, x):
        return F.pad(x[:, 1:], (0, 0, 0, 0, 0, 1))


class PreAct(nn.Module):
    """Full pre-activation; `shortcut` reads what the first ReLU gives, `raw` reads x."""

    def __init__(self, shortcut=None, raw=None, bias=False):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
        self.shortcut, self.raw = shortcut, raw

    def forward(self, x):
        out = F.relu(self.bn1(x))
        skip = x if self.raw is None else self.raw(x)
        if self.shortcut is not None:
            skip = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += skip
        return out


class DoubleConv(nn.Module):
    """Two units without a shortcut, one ReLU module."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, _, self.conv2, self.bn2 = double(3, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Attention(nn.Module):
    """A block with a gate before its addition, which is more than a chain."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu, self.conv2, self.bn2 = double(4, 4)
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(out * self.gate(out).sigmoid() + x)


class Dense(nn.Module):
    """norm → ReLU → conv twice, and what came before beside it; one ReLU ends two runs."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv1(self.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(self.relu(self.norm2(out)))], 1)


class Siamese(nn.Module):
    """One stem, called twice in a forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        a, b = (self.relu(self.bn(self.conv(v))) for v in (x, x.flip(0)))
        return a * b


class Pooled(nn.Module):
    """A max-pool after conv, norm and ReLU, called twice; in a U-Net its input is read as well."""

    def __init__(self, alone=False, ceil_mode=False):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.alone = nn.MaxPool2d(2, ceil_mode=ceil_mode), alone

    def forward(self, x):
        a, b = (self.relu(self.bn(self.conv(v))) for v in (x, x.flip(0)))
        y = self.pool(a) * self.pool(b)
        return y if self.alone else y + a[:, :, ::2, ::2]


class PooledConv(nn.Module):
    """A forward that is one chain with a max-pool at its end."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool = nn.MaxPool2d((3, 2), 2, (1, 0))

    def forward(self, x):
        return self.pool(self.relu(self.bn(self.conv(x))))


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn(self.other(x))


class SharedReLU(nn.Module):
    """Its ReLU is also called on something that is no norm's result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.relu(x)


def vgg():
    """One `Sequential` in the manner of VGG, with biased convolutions among others."""
    return nn.Sequential(
        *double(3, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 5),
    )  # fmt: skip


UNIT, BASIC = "conv norm relu", "conv norm relu conv norm"
PREACT = "norm relu conv norm relu conv"


def stages(block, chain, first):
    """The rows of `ResNet`: its stem, and its blocks, of which the first may have a projection."""
    ends = {"layer1.0": first, "layer1.1": "x", "layer2.0": "conv norm(x)", "layer2.1": "x"}
    rows = {path: f"{block}: {chain} + {end} relu" for path, end in ends.items()}
    return {"conv1": f"{UNIT} pool"} | rows


BASICS = stages("Basic", BASIC, "x")
BOTTLENECKS = stages("Bottleneck", f"{UNIT} {BASIC}", "conv norm(x)")
# Model, shape of x, and all that is fused in it: path and what `explain` calls it.
MODELS = {
    "resnet": (ResNet, (2, 3, 16, 16), BASICS),
    "bottlenecks": (lambda: ResNet(Bottleneck), (2, 3, 16, 16), BOTTLENECKS),
    "resnext": (
        lambda: ResNet(Bottleneck, 8, groups=4, width=16), (2, 3, 16, 16), BOTTLENECKS,
    ),
    "wide": (lambda: ResNet(Bottleneck, width=128), (2, 3, 16, 16), BOTTLENECKS),
    "sync-batch-norm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(ResNet()), (2, 3, 16, 16), BASICS,
    ),
    "identities": (
        WithIdentities, (2, 4, 8, 8), {"(model)": f"WithIdentities: {BASIC} + x relu"},
    ),
    "identities-downsample": (
        lambda: WithIdentities(2), (2, 4, 8, 8),
        {"(model)": f"WithIdentities: {BASIC} + conv norm(x) relu"},
    ),
    "functional": (Functional, (2, 4, 8, 8), {"(model)": f"Functional: {BASIC} + x relu"}),
    "bare-projection": (
        lambda: Functional(nn.Conv2d(4, 4, 1, bias=False)), (2, 4, 8, 8),
        {"(model)": f"Functional: {BASIC} + conv(x) relu"},
    ),
    "projection-with-bias": (
        lambda: Functional(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), (2, 4, 8, 8),
        {"(model)": f"Functional: {BASIC} + conv norm(x) relu"},
    ),
    "option-a": (
        lambda: Functional(OptionA()), (2, 4, 8, 8),
        {"(model)": f"Functional: {BASIC} + shortcut(x) relu"},
    ),
    "biased-shortcut": (
        lambda: Functional(nn.Conv2d(4, 4, 1)), (2, 4, 8, 8),
        {"(model)": f"Functional: {BASIC} + conv(x) relu"},
    ),
    "pooled-shortcut": (
        lambda: InSequentials((nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        (2, 4, 8, 8),
        {"(model)": f"InSequentials: {BASIC} + shortcut(x) relu", "shortcut.1": "conv norm"},
    ),
    "sequentials": (InSequentials, (2, 4, 8, 8), {"(model)": f"InSequentials: {BASIC} + x relu"}),
    "sequential-with-a-forward": (
        lambda: Residual(*double(4, 4)), (2, 4, 8, 8), {"(model)": f"Residual: {BASIC} + x relu"},
    ),
    "preact": (PreAct, (2, 4, 8, 8), {"(model)": f"PreAct: {PREACT} + x"}),
    "preact-projection": (
        lambda: PreAct(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False))), (2, 4, 8, 8),
        {"(model)": f"PreAct: {PREACT} + conv(x)"},
    ),
    "preact-raw-shortcut": (
        lambda: PreAct(raw=nn.Conv2d(4, 4, 1)), (2, 4, 8, 8),
        {"(model)": f"PreAct: {PREACT} + raw(x)"},
    ),
    "no-shortcut": (DoubleConv, (2, 3, 8, 8), {"(model)": f"DoubleConv: {BASIC} relu"}),
    "attention": (Attention, (2, 4, 8, 8), {"conv1": BASIC, "(model)": "add relu"}),
    "dropout-after": (
        lambda: Dropping(4, 4), (2, 4, 8, 8), {"conv1": f"{BASIC} + x relu"},
    ),
    "no-relu-between": (
        lambda: NoReLUBetween(4, 4), (2, 4, 8, 8),
        {"conv1": "conv norm", "conv2": "conv norm + residual relu"},
    ),
    "bias-before-an-addition": (
        lambda: PreAct(bias=True), (2, 4, 8, 8), {"(model)": f"PreAct: {PREACT} + x"},
    ),
    "dense": (Dense, (2, 4, 8, 8), {"norm1": PREACT}),
    "siamese": (Siamese, (2, 4, 8, 8), {"conv": UNIT}),
    "shared-norm": (
        SharedNorm, (2, 4, 8, 8), {"conv": "conv norm", "other": "conv norm"},
    ),
    "shared-relu": (SharedReLU, (2, 4, 8, 8), {"conv": UNIT}),
    "pooled-twice": (lambda: Pooled(True), (2, 4, 8, 8), {"conv": f"{UNIT} pool"}),
    "rounded-up": (
        lambda: Pooled(True, ceil_mode=True), (2, 4, 9, 9), {"conv": UNIT},
    ),
    "pooled-whole": (PooledConv, (2, 4, 8, 8), {"(model)": f"PooledConv: {UNIT} pool"}),
    "vgg": (vgg, (2, 3, 8, 8), {"0": f"{BASIC} relu pool", "7": f"{UNIT} conv relu"}),
}  # fmt: skip


class Iterating(nn.Module):
    """A `Sequential` whose children are called one by one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*double(4, 4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * 2


class Flag(nn.Module):
    """A block that is only called with a further argument."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x, norm=True):
            return F.relu(self.bn(self.conv(x))) if norm else F.relu(self.conv(x))

    def __init__(self):
        super().__init__()
        self.unit = Flag.Unit()

    def forward(self, x):
        return self.unit(x, norm=False)


# Models that call their children in ways of their own, with the shape of x.
CALLED = {
    "iterating": (Iterating, (2, 4, 8, 8)), "flag": (Flag, (2, 4, 8, 8)),
    "pooled-and-read": (Pooled, (2, 4, 8, 8)),
}  # fmt: skip


class SqueezeExcite(nn.Module):
    """A gate of its input, which is not the result of a norm."""

    def __init__(self):
        super().__init__()
        self.excite = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.excite(x.mean((2, 3), keepdim=True))


class Blur(nn.Module):
    """A depthwise convolution by a function."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filters, stride=2, groups=4)


class Standardized(nn.Conv2d):
    """Its filters are computed from its weight."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        z = self.bn(x)
        return self.conv(self.relu(z)) * z


class Branching(Basic):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


class Wrapper(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.bn = conv, nn.BatchNorm2d(4)

    def forward(self, *inputs):
        return self.bn(self.conv(*inputs))


class Dropping(Basic):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.0, self.training)


class StochasticDepth(Basic):
    def forward(self, x):
        return super().forward(x) if self.training else x + self.bn1(self.conv1(x))


class IntoItsInput(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += out
        return self.relu(x)


class Remembering(Basic):
    """Stores `f` of its result as an attribute."""

    def __init__(self, f):
        super().__init__(4, 4)
        self.f = f

    def forward(self, x):
        y = super().forward(x)
        self.last = self.f(y)
        return y


class Scaled(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(torch.add(out, x, alpha=0.5))


class Broadcasting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


class TwoInputs(Basic):
    def forward(self, x, y):
        return self.relu(self.bn1(self.conv1(x)) + y)


class NoReLUBetween(Basic):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * (2 if x.mean() > 0 else 3)


def basic(**changes):
    """A basic block with other children."""
    block = Basic(4, 4)
    for name, module in changes.items():
        setattr(block, name, module)
    return block


def conv(**options):
    """A 3x3 convolution that keeps the size, unless `options` say otherwise."""
    return nn.Conv2d(4, 4, 3, **{"padding": 1, "bias": False, **options})


def hook(name, register):
    """A basic block with a hook on one of its children."""
    block = Basic(4, 4)
    getattr(block.get_submodule(name), register)(lambda *args: None)
    return block


def replaced_forward():
    block = Basic(4, 4)
    block.forward = lambda x: x
    return block


# Model, the path of a row, and what the row says.
LEFT_ALONE = {
    "reflect": (lambda: basic(conv2=conv(padding_mode="reflect")), "conv2", "'reflect'"),
    "same": (lambda: basic(conv2=conv(padding="same")), "conv2", "has padding='same'"),
    "own-forward": (
        lambda: basic(conv2=OtherConv(4, 4, 3, padding=1)), "conv2", "overrides the forward",
    ),
    "transposed": (
        lambda: basic(conv2=nn.ConvTranspose2d(4, 4, 3, padding=1)), "conv2", "ConvTranspose2d",
    ),
    "group-norm": (lambda: basic(bn2=nn.GroupNorm(2, 4)), "bn2", "is of class GroupNorm"),
    "instance-norm": (lambda: basic(bn2=nn.InstanceNorm2d(4)), "bn2", "class InstanceNorm2d"),
    "relu6": (lambda: basic(relu=nn.ReLU6()), "relu", "is of class ReLU6"),
    "silu": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()), "0", "to 1, which is of class SiLU",
    ),
    "block-after": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), basic()), "0", "goes to 1 (Basic); a norm is",
    ),
    "in-a-gate": (lambda: nn.Sequential(conv(), SqueezeExcite()), "1.excite", "one pixel"),
    "depthwise": (
        lambda: nn.Sequential(conv(groups=4), nn.ReLU()), "0", "no multiples of 32",
    ),
    "blur": (Blur, "(model)", "no multiples of 32"),
    "few-channels": (lambda: nn.Sequential(conv(), nn.ReLU()), "0", "no multiples of 32"),
    "standardized": (
        lambda: nn.Sequential(Standardized(4, 4, 3), nn.BatchNorm2d(4)), "0", "are computed",
    ),
    "forward-hook": (lambda: hook("conv2", "register_forward_hook"), "conv2", "it has hooks"),
    "pre-hook": (lambda: hook("bn2", "register_forward_pre_hook"), "bn2", "it has hooks"),
    "backward-hook": (
        lambda: hook("conv2", "register_full_backward_hook"), "conv2", "it has hooks",
    ),
    "relu-hook": (lambda: hook("relu", "register_forward_hook"), "relu", "it has hooks"),
    "pruned": (lambda: basic(conv1=prune.identity(conv(), "weight")), "conv1", "it has hooks"),
    "parametrized": (
        lambda: basic(conv1=parametrizations.weight_norm(conv())), "conv1", "has parametrizations",
    ),
    "lazy": (lambda: basic(conv1=nn.LazyConv2d(4, 3, padding=1)), "conv1", "is lazy"),
    "read-twice": (TwoReaders, "bn", "is used 2 times"),
    "control-flow": (lambda: Branching(4, 4), "(model)", "cannot be traced at foreign_models.py:"),
    "value-in-Python": (
        lambda: Remembering(lambda y: float(y.mean())), "(model)", "uses the value or shape of a",
    ),
    "keeps-a-value": (lambda: Remembering(torch.neg), "(model)", "it computes in last"),
    "no-named-input": (lambda: Wrapper(conv()), "(model)", "no required positional"),
    "untraced-list": (lambda: Wrapper(nn.ModuleList([conv()])), "conv.0", "no forward that can be"),
    "replaced-forward": (replaced_forward, "(model)", "replaced on the instance"),
    "in-place-input": (lambda: IntoItsInput(4, 4), "(model)", "adds in place to a value"),
    "scaled-addition": (lambda: Scaled(4, 4), "(model)", "more arguments than two values"),
    "broadcasting": (Broadcasting, "(model)", "broadcasts 1 input to 4 output"),
    "relu-alone": (lambda: nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), "1", "not a fused"),
}  # fmt: skip
# Those that can be copied, and run in plain PyTorch on one tensor with the same result twice.
RUNS = [name for name in LEFT_ALONE if name not in (
    "lazy", "no-named-input", "untraced-list", "replaced-forward", "in-place-input", "pruned",
)]  # fmt: skip
