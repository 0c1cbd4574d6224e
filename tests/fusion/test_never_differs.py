"""Fused equals plain, or plain runs: every module under every change and transform of a table.

A situation is done to a fused module and to its plain twin alike. Results, gradients, statistics
and what hooks have seen must then be the same, in fp64, in training and in evaluation.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from foreign_models import Basic
from foreign_models import ResNet as Foreign
from test_fuse import close, randomize
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast as rf

MODULES = {  # name → how it is made, channels and size of x, path of a conv and of a norm
    "ConvBNAct2d": (lambda: rf.ConvBNAct2d(4, 4, 3), (4, 6), "conv", "bn"),
    "BasicBlock": (lambda: rf.BasicBlock(4, 4), (4, 6), "conv2", "bn1"),
    "BasicBlock-projection": (lambda: rf.BasicBlock(4, 8, 2), (4, 6), "conv1", "downsample.1"),
    "BasicBlock-zero_pad": (
        lambda: rf.BasicBlock(4, 8, 2, shortcut="zero_pad"), (4, 6), "conv1", "bn2",
    ),
    "Bottleneck": (lambda: rf.Bottleneck(8, 2), (8, 6), "conv2", "bn3"),
    "PreActBasicBlock": (lambda: rf.PreActBasicBlock(4, 4), (4, 6), "conv2", "bn2"),
    "PreActBottleneck-projection": (
        lambda: rf.PreActBottleneck(4, 4, 2), (4, 6), "downsample", "bn1",
    ),
    "resnet18": (
        lambda: rf.models.ResNet(rf.BasicBlock, [1, 1], 5, planes=4), (3, 24), "conv1", "bn1",
    ),
    "preact": (
        lambda: rf.models.ResNet(rf.PreActBasicBlock, [1, 1], 5, planes=4, stem="cifar"),
        (3, 8), "layer2.0.conv1", "bn_last",
    ),
    "fused-block": (lambda: rf.fuse(Basic(4, 8, 2)), (4, 6), "conv1", "downsample.1"),
    "fused-net": (lambda: rf.fuse(Foreign()), (3, 24), "conv1", "layer2.0.bn1"),
}  # fmt: skip


def child(module, path):
    return module.get_submodule(path)


def put(module, path, new):
    parent, _, name = path.rpartition(".")
    child(module, parent)._modules[name] = new.double().train(module.training)


class Standardized(nn.Conv2d):
    """Weight standardization, by a forward of its own."""

    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight - mean, self.bias)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.BatchNorm2d):
    """More than its forward, by a `__call__` of its own."""

    def __call__(self, x):
        return super().__call__(x) + 1


class Shifted(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) + 1


def rebuilt(layer, cls):
    """`layer` as one of `cls`, a subclass of its class."""
    layer = copy.deepcopy(layer)
    layer.__class__ = cls
    return layer


def replaced_forward(module, conv, norm, seen):
    original = child(module, norm).forward

    def forward(x):
        seen.append("called")
        return original(x) * 0.5

    child(module, norm).forward = forward


def replaced_conv_forward(module, conv, norm, seen):
    layer = child(module, conv)
    layer._conv_forward = lambda x, weight, bias: F.conv2d(
        x, 2 * weight, bias, layer.stride, layer.padding
    )


def changed_output(module, conv, norm, seen):
    child(module, conv).register_forward_hook(lambda m, args, y: (seen.append(y.shape), 2 * y)[1])


def changed_input(module, conv, norm, seen):
    child(module, norm).register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def gradient_hook(module, conv, norm, seen):
    layer = child(module, conv)
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].shape))


def global_hook(module, conv, norm, seen):
    def note(module, args, y):
        seen.append(type(module).__name__.replace("GlobalAvg", "AdaptiveAvg"))

    handle = register_module_forward_hook(note)
    return handle.remove


def same_padding(module, conv, norm, seen):
    layer = child(module, conv)
    layer.stride, layer.padding = (1, 1), "same"


def padding_of_one(module, conv, norm, seen):
    layer = child(module, conv)
    layer.padding = layer.padding[:1]


SITUATIONS = {
    "spectral_norm": lambda m, c, n, seen: spectral_norm(child(m, c)) and None,
    "weight_norm": lambda m, c, n, seen: weight_norm(child(m, c)) and None,
    "parametrized": lambda m, c, n, seen: parametrizations.weight_norm(child(m, c)) and None,
    "pruned": lambda m, c, n, seen: prune.l1_unstructured(child(m, c), "weight", 0.5) and None,
    "own-conv": lambda m, c, n, seen: put(m, c, rebuilt(child(m, c), Standardized)),
    "own-conv-inside": lambda m, c, n, seen: put(m, c, rebuilt(child(m, c), Shifted)),
    "own-norm": lambda m, c, n, seen: put(m, n, rebuilt(child(m, n), Doubled)),
    "own-call": lambda m, c, n, seen: put(m, n, rebuilt(child(m, n), Called)),
    "group-norm": lambda m, c, n, seen: put(m, n, nn.GroupNorm(2, child(m, n).num_features)),
    "identity-norm": lambda m, c, n, seen: put(m, n, nn.Identity()),
    "replaced-forward": replaced_forward,
    "replaced-conv-forward": replaced_conv_forward,
    "hook": changed_output,
    "pre-hook": changed_input,
    "backward-hook": gradient_hook,
    "global-hook": global_hook,
    "reflect": lambda m, c, n, seen: setattr(child(m, c), "padding_mode", "reflect"),
    "padding-of-one": padding_of_one,
    "dilation-list": lambda m, c, n, seen: setattr(child(m, c), "dilation", [1, 1]),
    "same-padding": same_padding,
    "stride-int": lambda m, c, n, seen: setattr(child(m, c), "stride", child(m, c).stride[0]),
    "frozen": lambda m, c, n, seen: child(m, n).eval() and None,
}


def observed(module, x, training):
    """Result, gradients and statistics of a call, or that it raises."""
    for m in module.modules():
        m.training = training
    x = x.clone().requires_grad_()
    module.zero_grad()
    try:
        y = module(x * 1.0)
        y.square().sum().backward()
        with torch.no_grad():
            again = module(x.detach())
    except Exception:
        return "raises"
    found = {"y": y.detach(), "no_grad": again, "dx": x.grad}
    found |= {name: p.grad for name, p in module.named_parameters()}
    return found | {name: b.clone() for name, b in module.named_buffers()}


def pair_of(name):
    """A module, its plain twin, and x."""
    make, (channels, size), *paths = MODULES[name]
    torch.manual_seed(0)
    module = randomize(make())
    plain = rf.unfuse(copy.deepcopy(module))
    return module, plain, torch.randn(2, channels, size, size, dtype=torch.float64), paths


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", MODULES)
def test_changed(name, situation, training):
    module, plain, x, paths = pair_of(name)
    results, sights = [], []
    for one in (module, plain):
        seen = []
        torch.manual_seed(1)
        undo = SITUATIONS[situation](one, *paths, seen)
        try:
            results.append(observed(one, x, training))
        finally:
            if undo is not None:
                undo()
        sights.append([str(one).removeprefix("Fused") for one in seen])
    assert sights[0] == sights[1]
    if situation == "same-padding" and results[1] == "raises":  # beside a shortcut with a stride
        assert results[0] == "raises"
    else:
        close(*results)


class Halved(TorchFunctionMode):
    """Something that looks at PyTorch's functions: convolutions give half."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y / 2 if func is torch.conv2d else y


def dual_level(module, x, v):
    with forward_ad.dual_level():
        dual = module(forward_ad.make_dual(x, v))
        return tuple(forward_ad.unpack_dual(dual))


def under_mode(module, x, v):
    with Halved():
        return module(x)


def per_sample(module, x, v):
    return torch.func.vmap(lambda one: module(one[None])[0])(x)


def gradient(module, x, v):
    parameters = dict(module.named_parameters())
    call = torch.func.functional_call
    return torch.func.grad(lambda p: call(module, p, (x,)).square().sum())(parameters)


def linearized(module, x, v):
    y, tangent = torch.func.linearize(module, x)
    return y, tangent(v)


def symbolic(module, x, v):
    """fx cannot tell that a residual is not given."""
    rest = {"residual": None} if isinstance(module, rf.blocks.ConvBNAct2d) else None
    return fx.symbolic_trace(module, rest)(x)


def traced(module, x, v):
    return torch.jit.trace(module, x)(x)


def scripted(module, x, v):
    before = {path: type(m) for path, m in module.named_modules()}
    y = torch.jit.script(module)(x)
    assert before == {path: type(m) for path, m in module.named_modules()}
    return y


def hessian(module, x, v):
    return torch.func.jvp(torch.func.grad(lambda x: module(x).square().sum()), (x,), (v,))


TRANSFORMS = {
    "jvp": lambda m, x, v: torch.func.jvp(m, (x,), (v,)),
    "vjp": lambda m, x, v: torch.func.vjp(m, x)[1](m(x)),
    "jacfwd": lambda m, x, v: torch.func.jacfwd(lambda t: m(x + t * v))(torch.zeros(()).double()),
    "dual-level": dual_level,
    "linearize": linearized,
    "grad": gradient,
    "vmap": per_sample,
    "hessian": hessian,
    "function-mode": under_mode,
    "symbolic_trace": symbolic,
    "jit.trace": traced,
    "jit.script": scripted,
}


def outcome(run, *args):
    try:
        return run(*args)
    except Exception:
        return "raises"


@contextmanager
def frozen_or_not(module, frozen):
    module.requires_grad_(not frozen)
    with torch.set_grad_enabled(not frozen):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False], ids=["no_grad", "grad"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MODULES)
def test_transformed(name, transform, frozen):
    module, plain, x, _ = pair_of(name)
    torch.manual_seed(2)
    v = torch.randn_like(x)
    with frozen_or_not(module.eval(), frozen), frozen_or_not(plain.eval(), frozen):
        actual, expected = (outcome(TRANSFORMS[transform], one, x, v) for one in (module, plain))
    if transform == "linearize" and expected == "raises":  # at a ReLU in place
        assert actual == expected
    else:
        close(actual, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_flops(name, training):
    counts = []
    module, plain, x, _ = pair_of(name)
    for one in (module, plain):
        with FlopCounterMode(display=False) as counter:
            one.train(training)(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODULES)
def test_autocast_gives_the_dtype_that_plain_gives(name, dtype):
    module, plain, x, _ = pair_of(name)
    module, plain, x = module.float(), plain.float(), x.to(dtype)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = (one.train(training)(x) for one in (module, plain))
        assert actual.dtype == expected.dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0.05 * scale)


class TestOurNets:
    """Children of `ResNet` that are more than their parameters."""

    @pytest.fixture
    def nets(self):
        module, plain, x, _ = pair_of("resnet18")
        return module.eval(), plain.eval(), x

    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
    @pytest.mark.parametrize(
        "change", ["stage", "no-stage", "relu", "maxpool", "stem-hook", "avgpool", "block"]
    )
    def test_are_called(self, nets, change, grad):
        class Off(nn.Sequential):
            def forward(self, x):
                return super().forward(x) * 0.5

        module, plain, x = nets
        for net in (module, plain):
            if change == "stage":
                net.layer2 = Off(*net.layer2)
            elif change == "no-stage":
                net.layer2, net.fc = nn.Identity(), nn.Identity()
            elif change == "relu":
                net.relu = nn.LeakyReLU()
            elif change == "maxpool":
                net.maxpool.ceil_mode = True
            elif change == "stem-hook":
                net.maxpool.register_forward_hook(lambda m, args, y: y + 1)
            elif change == "avgpool":
                net.avgpool = nn.AdaptiveMaxPool2d(1)
            else:
                net.layer1.append(nn.Tanh())
        with torch.set_grad_enabled(grad):
            close(module(x), plain(x))

    def test_a_projection_may_be_any_module(self):
        module, plain, x, _ = pair_of("BasicBlock-projection")
        for block in (module, plain):
            conv, norm = block.downsample
            block.downsample = nn.Sequential(nn.AvgPool2d(1), conv, norm, nn.Tanh())
        close(module(x), plain(x))

    def test_a_hook_on_a_projection_runs(self):
        module, plain, x, _ = pair_of("BasicBlock-projection")
        for block in (module, plain):
            block.downsample.register_forward_hook(lambda m, args, y: 2 * y)
        close(module(x), plain(x))


def test_gradients_have_memory_of_their_own():
    block, _, x, _ = pair_of("BasicBlock-projection")
    biases = [block.bn2.bias, block.downsample[1].bias]
    gradients = torch.autograd.grad(block(x).square().sum(), biases)
    before = [g.clone() for g in gradients]
    torch._foreach_mul_(gradients, 0.5)
    close(list(gradients), [g / 2 for g in before])
