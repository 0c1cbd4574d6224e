"""fuse, unfuse, explain: models built elsewhere, recognized by structure; what is left alone."""

import copy
import importlib
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import resnet_fast
from resnet_fast import backend, blocks, modules
from resnet_fast.fuse import explain, fuse, unfuse
from resnet_fast.fusion.swap import Unfinished

# ---- models, each in somebody's style


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
    """Both ways as `Sequential`s, the last ReLU made on the spot; the lines are not residual."""

    def __init__(self, shortcut=()):
        super().__init__()
        self.residual = nn.Sequential(*double(4, 4))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):
        return nn.ReLU(inplace=True)(self.residual(x) + self.shortcut(x))


def double(channels, planes):
    return (
        nn.Conv2d(channels, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU(),
        nn.Conv2d(planes, planes, 3, padding=1), nn.BatchNorm2d(planes),
    )  # fmt: skip


class OptionA(nn.Module):
    def forward(self, x):
        return F.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 0, 0))


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


def vgg():
    return nn.Sequential(
        *double(3, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 5),
    )  # fmt: skip


UNIT, BASIC = "conv norm relu", "conv norm relu conv norm"
THREE = f"conv norm relu {BASIC}"
STEM = {"conv1": UNIT}
PREACT = "norm relu conv norm relu conv"


def stages(name, chain):
    names = [f"{name}: {chain} {end} relu" for end in ("+ x", "+ conv norm(x)")]
    first = names["Bottleneck" in name]
    return STEM | {"layer1.0": first, "layer1.1": names[0], "layer2.0": names[1],
                   "layer2.1": names[0]}  # fmt: skip


# Model, shape of x, and all that is fused in it: path and what `explain` calls it.
MODELS = {
    "resnet": (ResNet, (2, 3, 16, 16), stages("Basic", BASIC)),
    "bottlenecks": (lambda: ResNet(Bottleneck), (2, 3, 16, 16), stages("Bottleneck", THREE)),
    "resnext": (
        lambda: ResNet(Bottleneck, 8, groups=4, width=16), (2, 3, 16, 16),
        stages("Bottleneck", THREE),
    ),
    "wide": (
        lambda: ResNet(Bottleneck, width=128), (2, 3, 16, 16), stages("Bottleneck", THREE),
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
        {"(model)": f"Functional: {BASIC} + shortcut(x) relu"},
    ),
    "pooled-shortcut": (
        lambda: InSequentials((nn.AvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))),
        (2, 4, 8, 8),
        {"(model)": f"InSequentials: {BASIC} + shortcut(x) relu", "shortcut.1": "conv norm"},
    ),
    "sequentials": (InSequentials, (2, 4, 8, 8), {"(model)": f"InSequentials: {BASIC} + x relu"}),
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
    "attention": (Attention, (2, 4, 8, 8), {"conv1": UNIT, "conv2": "conv norm"}),
    "dense": (Dense, (2, 4, 8, 8), {"norm1": "norm relu", "conv1": UNIT}),
    "siamese": (Siamese, (2, 4, 8, 8), {"conv": UNIT}),
    "vgg": (vgg, (2, 3, 8, 8), {"0": f"{BASIC} relu", "7": UNIT}),
}  # fmt: skip


def randomize(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.double()


def close(actual, expected):
    """Both ran in fp64 and do the same sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def results(model, x):
    """Of a training step and an evaluation: outputs, gradients, running statistics."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    model.train()
    y = model(x * 1.0)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state = {name: b.clone() for name, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        return {"training": y, "x": x.grad, "evaluation": model(x), **gradients, **state}


def assert_same_mathematics(model, x, **options):
    plain = copy.deepcopy(model)
    close(results(fuse(model, **options), x), results(plain, x))


def fused(model):
    """What `explain` says is fused, by path."""
    return {row.path: row.what for row in explain(model).rows if row.state == "fused"}


def why(model, path):
    (row,) = (row for row in explain(model).rows if row.path == path)
    return f"{row.state}: {row.why}"


@pytest.fixture
def net():
    return randomize(ResNet())


IMAGE = (2, 3, 16, 16)


class TestWhatIsFused:
    @pytest.mark.parametrize("name", MODELS)
    def test_is_found_by_structure(self, name):
        build, _, expected = MODELS[name]
        assert fused(fuse(build())) == expected

    @pytest.mark.parametrize("name", MODELS)
    def test_computes_the_same(self, name, impl):
        impl.need(torch.float64)
        build, shape, _ = MODELS[name]
        model = randomize(build()).to(impl.device)
        x = torch.randn(shape, dtype=torch.float64, device=impl.device)
        assert_same_mathematics(model, x, impl=impl.name)

    @pytest.mark.parametrize("name", ["resnet", "dense", "vgg"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_compiles_in_one_graph(self, name, training):
        build, shape, _ = MODELS[name]
        model = fuse(randomize(build())).train(training)
        plain = unfuse(copy.deepcopy(model))
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(shape, dtype=torch.float64)
        close(compiled(x), plain(x))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    def test_statistics_follow_each_norm_s_own_mode(self, net):
        net.layer1[0].bn1.eval()
        net.bn1.eval()
        plain, x = copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        model = fuse(net)
        close(model(x), plain(x))
        close(dict(model.named_buffers()), dict(plain.named_buffers()))

    def test_an_argument_beyond_the_traced_one_runs_the_original(self, net):
        class Scaled(Basic):
            def forward(self, x, scale=None):
                y = super().forward(x)
                return y if scale is None else y * scale

        block = fuse(randomize(Scaled(4, 4)).eval())
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        assert fused(block)
        close(block(x, 2.0), 2 * block(x))
        close(block(x=x), block(x))

    def test_a_block_registered_twice_is_fused_once_for_both(self):
        block = Basic(4, 4)
        model = randomize(nn.Sequential(block, block))
        assert fused(fuse(model)) == {"0": f"Basic: {BASIC} + x relu"}
        assert_same_mathematics(model, torch.randn(2, 4, 8, 8, dtype=torch.float64))

    @pytest.mark.parametrize("source", ["torchvision", "timm"])
    def test_the_real_ones(self, source):
        try:
            package = importlib.import_module(
                f"{source}.models" if source == "torchvision" else source
            )
        except Exception as error:  # absent, or built for another torch
            pytest.skip(f"{source}: {error}")
        create = package.create_model if source == "timm" else package.models.get_model
        for name in ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"):
            model = randomize(create(name, num_classes=5))
            states = [row.state for row in explain(model).rows]
            assert states == ["fusible"] * (9 if name == "resnet18" else 17)
            assert_same_mathematics(model, torch.randn(IMAGE, dtype=torch.float64))


# ---- what is left alone


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        z = self.conv(x)
        return self.relu(self.bn(z)) * z


class SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)) * self.bn(self.other(x))


class SharedReLU(nn.Module):
    """Its ReLU also reads something that is no norm, so it cannot wait for one."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * self.relu(x)


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
        return F.dropout(super().forward(x), 0.1, self.training)


class StochasticDepth(Basic):
    def forward(self, x):
        return super().forward(x) if self.training else x + self.bn1(self.conv1(x))


class IntoItsInput(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x += out
        return self.relu(x)


class Scaled(Basic):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(torch.add(out, x, alpha=0.5))


class Broadcasting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x[:, :1] if False else x
        return F.relu(self.bn(self.conv(x)) + x)


class TwoInputs(Basic):
    def forward(self, x, y):
        return self.relu(self.bn1(self.conv1(x)) + y)


class NoReLUBetween(Basic):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


class OtherConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def basic(**changes):
    """A basic block with other children."""
    block = Basic(4, 4)
    for name, module in changes.items():
        setattr(block, name, module)
    return block


def conv(**options):
    return nn.Conv2d(4, 4, 3, **{"padding": 1, "bias": False, **options})


def hook(name, register):
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
    "same": (lambda: basic(conv2=conv(padding="same")), "conv2", "pads with padding='same'"),
    "own-forward": (
        lambda: basic(conv2=OtherConv(4, 4, 3, padding=1)), "conv2", "a forward of its own",
    ),
    "transposed": (
        lambda: basic(conv2=nn.ConvTranspose2d(4, 4, 3, padding=1)), "conv2", "ConvTranspose2d",
    ),
    "sync-batch-norm": (
        lambda: basic(bn2=nn.SyncBatchNorm(4)), "(model)", "bn2 is of class SyncBatchNorm",
    ),
    "group-norm": (lambda: basic(bn2=nn.GroupNorm(2, 4)), "conv2", "bn2, which is of class Group"),
    "instance-norm": (lambda: basic(bn2=nn.InstanceNorm2d(4)), "(model)", "class InstanceNorm2d"),
    "relu6": (lambda: basic(relu=nn.ReLU6()), "(model)", "relu is of class ReLU6"),
    "silu": (lambda: nn.Sequential(conv(), nn.SiLU()), "0", "no BatchNorm2d"),
    "forward-hook": (lambda: hook("conv2", "register_forward_hook"), "conv2", "it has hooks"),
    "pre-hook": (lambda: hook("bn2", "register_forward_pre_hook"), "conv2", "bn2, which has hooks"),
    "backward-hook": (
        lambda: hook("conv2", "register_full_backward_hook"), "(model)", "conv2 has hooks",
    ),
    "relu-hook": (lambda: hook("relu", "register_forward_hook"), "(model)", "relu has hooks"),
    "pruned": (lambda: basic(conv1=prune.identity(conv(), "weight")), "conv1", "it has hooks"),
    "parametrized": (
        lambda: basic(conv1=parametrizations.weight_norm(conv())), "conv1", "has parametrizations",
    ),
    "lazy": (lambda: basic(conv1=nn.LazyConv2d(4, 3, padding=1)), "conv1", "is lazy"),
    "read-twice": (TwoReaders, "conv", "goes to 2 places"),
    "shared-norm": (SharedNorm, "conv", "bn is also called elsewhere"),
    "control-flow": (lambda: Branching(4, 4), "(model)", "cannot be traced: TraceError: symbolic"),
    "no-named-input": (lambda: Wrapper(conv()), "(model)", "names no input"),
    "untraced-list": (lambda: Wrapper(nn.ModuleList([conv()])), "conv.0", "no forward that can be"),
    "replaced-forward": (replaced_forward, "(model)", "replaced on the instance"),
    "dropout": (lambda: Dropping(4, 4), "(model)", "its result comes from dropout"),
    "module-dropout": (
        lambda: WithIdentities(drop_path=nn.Dropout(0.1)), "(model)", "is of class Dropout",
    ),
    "stochastic-depth": (lambda: StochasticDepth(4, 4), "(model)", "differs between training"),
    "in-place-input": (lambda: IntoItsInput(4, 4), "(model)", "in place to its input"),
    "scaled-addition": (lambda: Scaled(4, 4), "(model)", "its result comes from add"),
    "broadcasting": (Broadcasting, "(model)", "broadcasts channels"),
    "two-inputs": (lambda: TwoInputs(4, 4), "(model)", "does not take one tensor"),
    "no-relu-between": (lambda: NoReLUBetween(4, 4), "(model)", "main path is conv norm conv norm"),
    "bias-without-norm": (lambda: PreAct(bias=True), "(model)", "main path is norm relu conv"),
    "gate": (Attention, "(model)", "main path comes from mul"),
}  # fmt: skip
# Those that PyTorch runs here, trains the same twice, and can copy.
RUNS = [name for name in LEFT_ALONE if name not in (
    "lazy", "no-named-input", "untraced-list", "replaced-forward", "dropout", "module-dropout",
    "two-inputs", "sync-batch-norm", "in-place-input", "pruned",
)]  # fmt: skip


class TestWhatIsLeftAlone:
    @pytest.mark.parametrize("name", LEFT_ALONE)
    def test_with_a_reason(self, name):
        build, path, reason = LEFT_ALONE[name]
        model = build()
        said = why(fuse(model), path)
        assert said.startswith("left alone: ") and reason in said
        assert type(fuse(model)) is type(model) or path != "(model)"

    @pytest.mark.parametrize("name", RUNS)
    def test_still_computes_the_same(self, name):
        model = LEFT_ALONE[name][0]().double()
        channels = 1 if name == "broadcasting" else 4
        x = torch.randn(2, channels, 8, 8, dtype=torch.float64)
        assert_same_mathematics(model, x)

    def test_a_shared_relu_stays_and_the_rest_of_its_run_is_fused(self):
        model = randomize(SharedReLU())
        assert fused(fuse(model)) == {"conv": "conv norm"}
        assert type(fuse(model).relu) is nn.ReLU
        assert_same_mathematics(model, torch.randn(2, 4, 8, 8, dtype=torch.float64))

    def test_tracing_leaves_nothing_on_the_modules(self):
        class Remembers(Basic):
            def forward(self, x):
                self.last = x
                return super().forward(x)

        model = Remembers(4, 4).eval()
        model.bn1.train()
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        explain(model)
        assert before == {name: dict(vars(module)) for name, module in model.named_modules()}


class TestHooks:
    def test_of_a_fused_module_run(self, net):
        seen = []
        net.layer1[0].register_forward_hook(lambda m, args, y: seen.append(y.shape))
        model = fuse(net)
        assert "layer1.0" in fused(model)
        model(torch.randn(IMAGE, dtype=torch.float64))
        assert seen == [(2, 4, 4, 4)]

    @pytest.mark.parametrize("name", ["conv1", "bn2", "relu", "downsample", "downsample.0"])
    def test_on_a_child_of_a_block_run_though_they_came_later(self, net, name):
        plain, model, x = copy.deepcopy(net), fuse(net), torch.randn(IMAGE, dtype=torch.float64)
        seen = []
        child = model.layer2[0].get_submodule(name)
        handle = child.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        close(model(x), plain(x))
        assert len(seen) == (2 if name == "relu" else 1)
        said = why(model, "layer2.0")
        assert said == "fusible: " if "down" in name else f"{name} has hooks" in said
        handle.remove()
        assert why(model, "layer2.0") == "fused: "

    def test_in_a_sequential_run_though_they_came_later(self):
        model = randomize(vgg())
        plain, model = copy.deepcopy(model), fuse(model)
        x, seen = torch.randn(2, 3, 8, 8, dtype=torch.float64), []
        model[1].register_forward_hook(lambda m, args, y: seen.append(y))
        close(model(x), plain(x))
        close(seen, [plain[1](plain[0](x))])

    def test_on_the_convolution_of_a_run_see_its_own_result(self, net):
        plain, model, x = copy.deepcopy(net), fuse(net), torch.randn(IMAGE, dtype=torch.float64)
        seen = []
        model.conv1.register_forward_hook(lambda m, args, y: seen.append(y))
        close(model(x), plain(x))
        close(seen, [plain.conv1(x)])


class TestSharing:
    def test_a_fused_copy_has_the_same_tensors_under_the_same_keys(self, net):
        model = fuse(net)
        assert list(model.state_dict()) == list(net.state_dict())
        assert model is not net and fused(net) == {}
        for (name, ours), (_, theirs) in zip(
            [*model.named_parameters(), *model.named_buffers()],
            [*net.named_parameters(), *net.named_buffers()],
            strict=True,
        ):
            assert ours is theirs, name
            assert ours.data_ptr() == theirs.data_ptr()

    def test_in_place_every_module_stays_the_object_it_was(self, net):
        before = dict(net.named_modules())
        assert fuse(net, inplace=True) is net
        assert dict(net.named_modules()) == before
        assert isinstance(net.layer1[0], Basic) and isinstance(net.conv1, nn.Conv2d)
        assert unfuse(net, inplace=True) is net
        assert dict(net.named_modules()) == before

    def test_unfuse_gives_every_class_and_attribute_back(self, net):
        before = {name: (type(m), dict(vars(m))) for name, m in net.named_modules()}
        unfuse(fuse(net, inplace=True), inplace=True)
        assert {name: (type(m), dict(vars(m))) for name, m in net.named_modules()} == before
        model = fuse(net)
        assert type(unfuse(model)) is ResNet and fused(unfuse(model)) == {}
        assert fused(model) == MODELS["resnet"][2]

    def test_fusing_again_is_fusing_once(self, net):
        once = fuse(net)
        twice = fuse(once, impl="reference")
        assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
        assert "impl='reference'" in repr(twice.layer1[0]) and "impl='auto'" in repr(once.layer1[0])

    def test_modes_and_requires_grad_stay(self, net):
        net.eval()
        net.layer1.train()
        net.conv1.requires_grad_(False)
        model = fuse(net)
        assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
        model(torch.randn(IMAGE, dtype=torch.float64)).sum().backward()
        assert net.conv1.weight.grad is None and net.bn1.weight.grad is not None

    def test_an_optimizer_made_before_goes_on(self, net):
        plain, x = copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, 0.9) for model in (plain, net)]
        fuse(net, inplace=True)
        for _ in range(3):
            for model, optimizer in zip((plain, net), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        close(dict(net.state_dict()), dict(plain.state_dict()))

    def test_state_dicts_load_strictly_both_ways(self, net):
        other = randomize(ResNet())
        fuse(other, inplace=True).load_state_dict(net.state_dict())
        x = torch.randn(IMAGE, dtype=torch.float64)
        close(other.eval()(x), net.eval()(x))
        randomize(net).load_state_dict(other.state_dict())
        close(other(x), net(x))

    @pytest.mark.parametrize("name", ["resnet", "dense", "vgg", "pooled-shortcut"])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_and_pickles_are_fused_and_their_own(self, name, how):
        build, shape, expected = MODELS[name]
        model = fuse(randomize(build()), impl="reference").eval()
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert fused(other) == expected
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        x = torch.randn(shape, dtype=torch.float64)
        close(other(x), model(x))
        assert fused(unfuse(other)) == {}

    def test_moves_to_another_dtype(self, net):
        model = fuse(net).float().eval()
        assert model(torch.randn(IMAGE)).dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}


class TestChangedLater:
    def test_other_parameters_and_children_are_used(self, net):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            torch.manual_seed(1)
            block = changed.layer1[0]
            block.conv1 = randomize(nn.Conv2d(4, 4, 3, 1, 2, 2, bias=False))
            block.bn2.weight = nn.Parameter(torch.rand(4, dtype=torch.float64))
            changed.conv1 = randomize(nn.Conv2d(3, 4, 7, 2, 3))
        close(model(x), plain(x))

    def test_a_block_with_another_norm_runs_as_it_says(self, net):
        model, plain, x = fuse(net), copy.deepcopy(net), torch.randn(IMAGE, dtype=torch.float64)
        for changed in (model, plain):
            changed.layer1[0].bn1 = nn.InstanceNorm2d(4)
        close(model(x), plain(x))
        assert "is of class InstanceNorm2d" in why(model, "layer1.0")

    def test_a_run_with_another_norm_says_what_to_do(self, net):
        model = fuse(net)
        model.bn1 = nn.SyncBatchNorm(4).double()
        with pytest.raises(AttributeError, match=r"replaced, or .* alone; use resnet_fast.unfuse"):
            model(torch.randn(IMAGE, dtype=torch.float64))
        fuse(model, inplace=True)
        assert "conv1" not in fused(model) and type(model.conv1) is nn.Conv2d

    def test_a_sequential_may_be_cut_walked_and_extended(self):
        model = randomize(vgg()).eval()
        plain, model = copy.deepcopy(model), fuse(model)
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for stop in range(len(plain)):
            close(model[:stop](x), plain[:stop](x))
            assert fused(model[:stop]) == {} and type(unfuse(model[:stop])) is nn.Sequential
        y = x
        for layer in model:
            y = layer(y)
        close(y, plain(x))
        for changed in (model, plain):
            changed.append(nn.Tanh())
        close(model(x), plain(x))
        assert fused(model) == {}

    def test_the_children_of_a_net_may_be_strung_together(self, net):
        net.eval()
        backbone = nn.Sequential(*list(fuse(net).children())[:-1])
        x = torch.randn(IMAGE, dtype=torch.float64)
        close(net.fc(backbone(x).mean((2, 3))), net(x))

    def test_a_convolution_of_a_run_called_alone_is_of_no_use(self, net):
        z = fuse(net).conv1(torch.randn(IMAGE, dtype=torch.float64))
        assert isinstance(z, Unfinished)
        with pytest.raises(TypeError, match="must be Tensor, not Unfinished"):
            F.relu(z)


class TestOurOwn:
    @pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "PreActBasicBlock"])
    def test_blocks_go_to_their_plain_twins_and_back(self, name):
        block = randomize(getattr(modules, name)(4, 4, 2)).train()
        plain = unfuse(block)
        assert type(plain) is getattr(blocks, name)
        assert fused(block) and not fused(plain)
        x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
        back = fuse(plain, impl="reference")
        assert type(back) is type(block) and back.impl == "reference" and block.impl == "auto"
        assert_same_mathematics(plain, x)

    def test_models_switch_stem_and_blocks(self):
        model = randomize(resnet_fast.create_model("cifar_resnet20"))
        plain = unfuse(model)
        assert model.fused and not plain.fused
        assert not any(isinstance(m, modules.Fused) for m in plain.modules())
        assert {row.state for row in explain(model).rows} == {"fused"}
        assert {row.state for row in explain(plain).rows} == {"fusible"}
        back = fuse(plain, impl="reference")
        assert back.fused and back.impl == back.layer1[0].impl == "reference"
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
        assert_same_mathematics(plain, torch.randn(2, 3, 16, 16, dtype=torch.float64))

    def test_a_plain_twin_with_hooks_inside_is_left_alone(self):
        plain = unfuse(modules.BasicBlock(4, 4))
        plain.bn1.register_forward_hook(lambda *args: None)
        assert type(fuse(plain)) is blocks.BasicBlock
        assert "bn1 has hooks" in why(plain, "(model)")

    def test_a_subclass_of_a_fused_module_has_no_plain_twin(self):
        class Mine(modules.BasicBlock):
            pass

        with pytest.raises(TypeError, match=r"^0: Mine has no plain twin"):
            unfuse(nn.Sequential(Mine(4, 4)))


class TestExplain:
    def test_rows_are_data_in_the_order_of_the_model(self, net):
        report = explain(net)
        assert [row.path for row in report.rows] == list(MODELS["resnet"][2])
        assert {row.state for row in report.rows} == {"fusible"}
        assert set(report.impls) == {"inference", "training"}

    def test_prints_an_aligned_table(self, net):
        net.layer1[0].conv2.register_forward_hook(lambda *args: None)
        lines = str(explain(fuse(net))).splitlines()
        column = lines[0].index("is ")
        assert lines[0].split() == ["path", "what", "is", "why"]
        assert all(re.match("fused|left alone", line[column:]) for line in lines[1:-2])
        assert re.fullmatch(r"5 fused, 0 fusible, \d left alone", lines[-2])
        assert re.fullmatch(r'impl="auto" picks \w+ for inference, \w+ for .* on cpu\)', lines[-1])

    def test_of_a_model_without_anything_to_fuse(self):
        report = explain(nn.Linear(3, 4))
        assert report.rows == [] and "0 fused" in str(report)


class TestErrors:
    @pytest.mark.parametrize("function", [fuse, unfuse, explain])
    def test_not_a_module(self, function):
        with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got list"):
            function([nn.Conv2d(3, 4, 1)])

    def test_unknown_impl(self, net):
        with pytest.raises(ValueError, match=r"^impl: expected one of .*got 'cuda'"):
            fuse(net, impl="cuda")
        assert fused(net) == {}

    def test_an_implementation_that_is_not_there_says_so_when_called(self, net):
        if backend.refusal("triton", "conv_fprop", "cpu", torch.float64) is None:
            pytest.skip("triton runs here")
        with pytest.raises(RuntimeError, match=r"^impl='triton' cannot run"):
            fuse(net, impl="triton")(torch.randn(IMAGE, dtype=torch.float64))

    def test_a_class_derived_from_a_fused_one_is_not_taken_apart(self, net):
        model = fuse(net)
        parametrizations.weight_norm(model.conv1)
        with pytest.raises(TypeError, match="got ParametrizedFusedConv2d, made of one"):
            unfuse(model, inplace=True)
