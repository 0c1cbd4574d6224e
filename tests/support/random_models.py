"""Random small models, and what may be done to one: for `test_fuse_property`.

A `Recipe` is data. `Recipe.model()` builds the same model at every call; `change` does the same
surgery to equal models, whether they are fused or not.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

KERNELS = {"basic": (3, 3), "bottleneck": (1, 3, 1), "pre-activation": (3, 3), "unit": (3,)}
STYLES = ("shared", "separate", "functional", "sequential")
SHORTCUTS = ("none", "identity", "module", "projection", "opaque")
SIDES = ("none", "gate", "concatenation", "read", "twice")
TOPS = ("sequential", "iterated", "stem", "stem-read")


@dataclass(frozen=True)
class Layer:
    """One block. Its activations are written in `style`; `side` is what it does beside a chain."""

    kind: str = "basic"
    style: str = "shared"
    shortcut: str = "identity"
    stride: int = 1
    side: str = "none"
    pool: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Surgery:
    """`name` of SURGERY, done to the `index`-th module (modulo their number) that it fits."""

    name: str
    index: int = 0


@dataclass(frozen=True)
class Recipe:
    """A model, what is done to it before and after `fuse`, and how it is called.

    warm: it is called once between `fuse` and what comes after; copied: and deep-copied then.
    A method bound before, which a copy would have of the original, wants `fuse` in place.
    """

    layers: tuple[Layer, ...] = (Layer(),)
    top: str = "sequential"
    before: tuple[Surgery, ...] = ()
    after: tuple[Surgery, ...] = ()
    training: bool = True
    mode: str = "grad"
    inplace: bool = False
    warm: bool = False
    copied: bool = False
    global_hook: bool = False
    channels_last: bool = False

    def model(self):
        torch.manual_seed(0)
        model = Top(self.top, map(build, self.layers))
        if self.top == "sequential":
            model = model.layers
        model = twins.randomize(model).double().train(self.training)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


def build(layer):
    if layer.kind == "unit" and layer.style == "sequential" and layer.side == "none":
        pool = [nn.MaxPool2d(2)] if layer.pool else []
        return nn.Sequential(conv(3, layer), nn.BatchNorm2d(4), nn.ReLU(inplace=True), *pool)
    return Block(layer)


def conv(kernel, layer, stride=1):
    return nn.Conv2d(4, 4, kernel, stride, kernel // 2, bias=layer.bias)


class Block(nn.Module):
    """Any of KERNELS in any of STYLES; skip, scale and extra are for surgery."""

    def __init__(self, layer):
        super().__init__()
        self.kind, self.style, self.side = layer.kind, layer.style, layer.side
        self.skip, self.scale, self.extra = False, 1.0, None
        self.size = len(KERNELS[layer.kind])
        for i, kernel in enumerate(KERNELS[layer.kind]):
            stride = layer.stride if kernel == 3 and (i == 0 or self.size == 3) else 1
            setattr(self, f"conv{i}", conv(kernel, layer, stride))
            setattr(self, f"bn{i}", nn.BatchNorm2d(4))
            if self.style == "separate":
                setattr(self, f"idle{i}", nn.Identity())
                setattr(self, f"act{i}", nn.ReLU(inplace=i == 0))
        self.relu = nn.ReLU(inplace=self.style == "shared")
        if self.style == "sequential":
            self.main = nn.Sequential(*self.flat())
        self.pool = nn.MaxPool2d(2) if layer.pool else None
        self.gate = nn.Conv2d(4, 4, 1) if layer.side == "gate" else None
        self.mix = nn.Conv2d(8, 4, 1) if layer.side == "concatenation" else None
        down = (conv(1, layer, layer.stride), nn.BatchNorm2d(4))
        self.shortcut = {
            "none": None, "identity": None, "module": nn.Identity(), "projection": down,
            "opaque": (nn.AvgPool2d(layer.stride), conv(1, layer), nn.BatchNorm2d(4)),
        }[layer.shortcut]  # fmt: skip
        if isinstance(self.shortcut, tuple):
            self.shortcut = nn.Sequential(*self.shortcut)
        self.adds = layer.shortcut != "none"

    def flat(self):
        """The children of the main path in their order, taken from the block."""
        for i in range(self.size):
            names = (f"conv{i}", f"bn{i}", "")
            for name in (names[1:] + names[:1]) if self.kind == "pre-activation" else names:
                if name:
                    yield self._modules.pop(name)
                elif i < self.size - 1 or self.kind == "pre-activation":
                    yield nn.ReLU(inplace=i > 0)

    def act(self, i, h):
        if self.style == "functional":
            return F.relu(h)
        if self.style == "separate":
            return self.get_submodule(f"act{i}")(self.get_submodule(f"idle{i}")(h))
        return self.relu(h)

    def path(self, x):
        """The main path, and what its shortcut reads."""
        if self.style == "sequential":
            return self.main(x), x
        h = first = x
        for i in range(self.size):
            layer, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            if self.kind == "pre-activation":
                h = self.act(i, norm(h))
                first = h if i == 0 else first
                h = layer(h)
            else:
                h = norm(layer(h))
                h = self.act(i, h) if i < self.size - 1 else h
        return h, first if isinstance(self.shortcut, nn.Sequential) else x

    def chain(self, x):
        if self.skip:
            return x
        h, first = self.path(x)
        if self.side == "gate":
            h = h * self.gate(h).sigmoid()
        if self.adds:
            skip = first if self.shortcut is None else self.shortcut(first)
            if self.style == "shared":
                h += skip
            else:
                h = h + skip
        if self.side == "concatenation":
            h = self.mix(torch.cat([h, h.abs()], 1))
        if self.kind == "pre-activation":
            return h
        y = self.act(self.size - 1, h * 1.0 if self.side == "read" else h)
        return y * h.mean() if self.side == "read" else y

    def forward(self, x):
        y = self.chain(x)
        if self.side == "twice":
            y = y + self.chain(x.flip(0))
        if self.pool is not None:
            y = self.pool(y)
        if self.extra is not None:
            y = self.extra(y)
        return y if self.scale == 1.0 else y * self.scale


class Top(nn.Module):
    """A stem before blocks, called one by one or as a `Sequential`."""

    def __init__(self, style, layers):
        super().__init__()
        self.style = style
        if style.startswith("stem"):
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
            self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        if self.style == "iterated":
            kept = []
            for layer in self.layers:
                x = layer(x)
                kept.append(x.mean())
            return x + sum(kept)
        stem = self.relu(self.bn1(self.conv1(x)))
        y = self.layers(self.maxpool(stem))
        return y + stem.mean() if self.style == "stem-read" else y


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Shifting(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Capped(nn.ReLU):
    def forward(self, x):
        return super().forward(x).clamp(max=1)


CONV, NORM, RELU, POOL = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d
LAYERS = (CONV, NORM, RELU, POOL)


def put(build):
    """A surgery that puts build(child) in the place of the child."""
    return lambda parent, name, child, count: setattr(
        parent, name, build(child).double().train(child.training)
    )


def assign(**values):
    """A surgery that sets attributes."""

    def run(parent, name, child, count):
        for key, value in values.items():
            setattr(child, key, value)

    return run


def do(function):
    """A surgery that does function(child)."""
    return lambda parent, name, child, count: function(child)


def forward_of(method, function):
    """A surgery that binds function(result) of a child's method in the place of that method."""

    def run(parent, name, child, count):
        original = getattr(child, method)
        setattr(child, method, lambda *args: function(original(*args)))

    return run


def like(cls):
    def build(old):
        return cls(
            4, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
        )

    return build


def counting(register, change=None):
    """A surgery that adds a hook, which counts; `change` of its last argument is its result."""

    def run(parent, name, child, count):
        def hook(*args):
            count(f"{register} {name}")
            return None if change is None else change(args[-1])

        getattr(child, register)(hook)

    return run


# What is done, by name: the classes it fits, and run(parent, name, child, count).
SURGERY = {
    "reflect": (CONV, assign(padding_mode="reflect")),
    "padding-same": (CONV, assign(padding="same")),
    "int-stride": (CONV, assign(stride=1)),
    "short-padding": (CONV, assign(padding=(1,))),
    "int-dilation": (CONV, assign(dilation=2)),
    "spectral-norm": (CONV, do(spectral_norm)),
    "weight-norm": (CONV, do(weight_norm)),
    "parametrized": (CONV, do(parametrizations.weight_norm)),
    "pruned": (CONV, do(lambda conv: prune.l1_unstructured(conv, "weight", 0.5))),
    "conv-subclass": (CONV, put(like(Doubling))),
    "standardized": (CONV, put(like(Standardized))),
    "another-conv": (CONV, put(like(nn.Conv2d))),
    "frozen-conv": (CONV, do(lambda conv: conv.weight.requires_grad_(False))),
    "biased": (
        CONV, do(lambda c: setattr(c, "bias", nn.Parameter(c.weight.detach()[:, 0, 0, 0]))),
    ),
    "another-weight": (
        CONV, do(lambda c: setattr(c, "weight", nn.Parameter(c.weight.detach().flip(0)))),
    ),
    "forward-of-conv": (CONV, forward_of("forward", lambda y: 2 * y)),
    "forward-within-conv": (CONV, forward_of("_conv_forward", lambda y: -y)),
    "group-norm": (NORM, put(lambda bn: nn.GroupNorm(2, 4))),
    "instance-norm": (NORM, put(lambda bn: nn.InstanceNorm2d(4, affine=True))),
    "norm-subclass": (NORM, put(lambda bn: Shifting(4))),
    "no-norm": (NORM, put(lambda bn: nn.Identity())),
    "sync-norm": (NORM, put(lambda bn: nn.SyncBatchNorm(4))),
    "norm-in-evaluation": (NORM, do(lambda bn: bn.eval())),
    "norm-in-training": (NORM, do(lambda bn: bn.train())),
    "frozen-norm": (NORM, do(lambda bn: bn.requires_grad_(False))),
    "untracked": (NORM, assign(track_running_stats=False)),
    "without-statistics": (
        NORM, assign(track_running_stats=False, running_mean=None, running_var=None),
    ),
    "not-affine": (NORM, assign(weight=None, bias=None, affine=False)),
    "cumulative": (NORM, assign(momentum=None)),
    "eps": (NORM, assign(eps=0.1)),
    "forward-of-norm": (NORM, forward_of("forward", lambda y: y - 1)),
    "silu": (RELU, put(lambda relu: nn.SiLU())),
    "leaky": (RELU, put(lambda relu: nn.LeakyReLU())),
    "no-relu": (RELU, put(lambda relu: nn.Identity())),
    "relu-subclass": (RELU, put(lambda relu: Capped())),
    "out-of-place": (RELU, assign(inplace=False)),
    "forward-of-relu": (RELU, forward_of("forward", lambda y: 2 * y)),
    "ceil-mode": (POOL, assign(ceil_mode=True)),
    "larger-window": (POOL, assign(kernel_size=3)),
    "indices": (POOL, assign(return_indices=True)),
    "no-pool": (POOL, put(lambda pool: nn.Identity())),
    "average": (POOL, put(lambda pool: nn.AvgPool2d(2))),
    "active-identity": (nn.Identity, put(lambda idle: nn.Tanh())),
    "forward-of-identity": (nn.Identity, forward_of("forward", lambda y: 2 * y)),
    "append": (nn.Sequential, do(lambda layers: layers.append(nn.Tanh()))),
    "insert": (nn.Sequential, do(lambda layers: layers.insert(1, nn.Tanh()))),
    "drop-last": (nn.Sequential, do(lambda layers: layers.pop(-1) if len(layers) > 1 else None)),
    "skip": (Block, assign(skip=True)),
    "scale": (Block, assign(scale=2.0)),
    "extra": (Block, assign(extra=nn.Tanh())),
    "new-shortcut": (Block, assign(shortcut=nn.Tanh())),
    "no-shortcut": (Block, assign(adds=False)),
    "another-style": (Block, assign(style="functional")),
    "forward-of-block": (Block, forward_of("forward", lambda y: 2 * y)),
    "forward-within-block": (Block, forward_of("chain", lambda y: 2 * y)),
    "mode-of-one": ((*LAYERS, Block), do(lambda module: module.train(not module.training))),
    "hook": ((*LAYERS, Block), counting("register_forward_hook")),
    "changing-hook": ((*LAYERS, Block), counting("register_forward_hook", lambda y: 2 * y)),
    "pre-hook": ((*LAYERS, Block), counting("register_forward_pre_hook")),
    "changing-pre-hook": (
        (*LAYERS, Block), counting("register_forward_pre_hook", lambda args: (args[0] + 1,)),
    ),
    "backward-hook": (LAYERS[:2], counting("register_full_backward_hook")),
}  # fmt: skip


def change(model, surgeries, counts):
    """Do `surgeries` to `model`; its hooks count their calls in `counts`."""

    def count(name):
        counts[name] = counts.get(name, 0) + 1

    for surgery in surgeries:
        kinds, run = SURGERY[surgery.name]
        fitting = [(n, m) for n, m in model.named_modules() if n and isinstance(m, kinds)]
        if fitting:
            path, child = fitting[surgery.index % len(fitting)]
            parent, _, name = path.rpartition(".")
            torch.manual_seed(surgery.index)
            run(model.get_submodule(parent), name, child, lambda what, p=path: count(f"{p} {what}"))


@contextlib.contextmanager
def global_hook(model, wanted, counts):
    """A global forward hook, which counts the calls of each module of `model`."""
    if not wanted:
        yield
        return
    paths = {module: path for path, module in model.named_modules()}

    def hook(module, args, y):
        name = f"global {paths.get(module)}"
        counts[name] = counts.get(name, 0) + 1

    with register_module_forward_hook(hook):
        yield
