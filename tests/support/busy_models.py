"""Models whose forward does more than compute: it stores, counts, draws, or looks around."""

import collections
import functools
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

SEEN = []
COUNTS = {"calls": 0}
TALLY = 0


class Block(nn.Module):
    """A basic block that fuses; those below do something besides."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def hidden(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    def rest(self, h, x):
        return self.relu(self.bn2(self.conv2(h)) + x)

    def forward(self, x):
        return self.rest(self.hidden(x), x)


def conv():
    return nn.Conv2d(4, 4, 3, padding=1, bias=False)


class CountsInABuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


class Averages(Block):
    """An EMA written in place, and one that is bound anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        h = self.hidden(x)
        with torch.no_grad():
            self.ema.mul_(0.9).add_(h.mean((0, 2, 3)), alpha=0.1)
            self.last = h.mean((0, 2, 3))
        return self.rest(h, x)


class RegistersABuffer(Block):
    def forward(self, x):
        h = self.hidden(x)
        self.register_buffer("seen", h.detach().mean((0, 2, 3)), persistent=False)
        return self.rest(h, x)


class ClampsItsWeight(Block):
    def forward(self, x):
        with torch.no_grad():
            self.conv1.weight.clamp_(-0.05, 0.05)
        return super().forward(x)


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class EverySecond(Counts):
    def forward(self, x):
        y = super().forward(x)
        return y if self.calls % 2 else x


class CountsInItsClass(Block):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


class CountsInAGlobal(Block):
    def forward(self, x):
        COUNTS["calls"] += 1
        return super().forward(x)


class BindsAGlobal(Block):
    def forward(self, x):
        global TALLY
        TALLY += 1
        return super().forward(x)


class FillsAGlobalList(Block):
    def forward(self, x):
        h = self.hidden(x)
        SEEN.append(h)
        return self.rest(h, x)


class StoresAFeature(Block):
    def forward(self, x):
        self.feature = self.hidden(x)
        return self.rest(self.feature, x)


class FillsContainers(Block):
    def __init__(self):
        super().__init__()
        self.acts, self.named, self.latest = [], {}, collections.deque(maxlen=2)
        self.nested = {"of": [[]]}

    def forward(self, x):
        h = self.hidden(x)
        self.acts.append(h)
        self.named["pre"] = h
        self.latest.append(h)
        self.nested["of"][0].append(h)
        return self.rest(h, x)


class Meter:
    def __init__(self):
        self.values, self.count = [], 0

    def update(self, value):
        self.values.append(value)
        self.count += 1


class HasAMeter(Block):
    """A Python object that counts; `log` is a function with a list of its own."""

    def __init__(self, log=None):
        super().__init__()
        self.meter, self.log = Meter(), log

    def forward(self, x):
        h = self.hidden(x)
        self.meter.update(h.mean())
        if self.log is not None:
            self.log(h)
        return self.rest(h, x)


def fills_a_closure():
    return HasAMeter(SEEN.append)


class FillsWhatItIsGiven(nn.Module):
    """A parent whose block writes to a dictionary made in its own forward."""

    class Writer(Block):
        def forward(self, x, out=None):
            h = self.hidden(x)
            if out is not None:
                out["pre"] = h
            return self.rest(h, x)

    def __init__(self):
        super().__init__()
        self.block = self.Writer()

    def forward(self, x):
        out = {}
        y = self.block(x, out)
        return y + out["pre"]


class StoresGradients(Block):
    def __init__(self):
        super().__init__()
        self.gradients = []

    def forward(self, x):
        h = self.hidden(x)
        if h.requires_grad:
            h.register_hook(self.gradients.append)
        return self.rest(h, x)


class HooksWhateverComes(StoresGradients):
    def forward(self, x):
        h = self.hidden(x)
        if torch.is_grad_enabled():
            h.register_hook(self.gradients.append)
        return self.rest(h, x)


class DecaysPastTheVersion(Block):
    """Writes to a buffer through `.data`, which no version counter sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("decay", torch.ones(4))

    def forward(self, x):
        self.decay.data.mul_(0.5)
        return super().forward(x)


class Uncopyable:
    """As a trainer or a data set that a module knows."""

    def __deepcopy__(self, memo):
        raise TypeError("not to be copied")


class FreezesItsNorm(Block):
    def forward(self, x):
        self.bn1.eval()
        return super().forward(x)


class BuildsAChild(Block):
    """Makes its projection at the first call, in the manner of lazy modules."""

    def __init__(self):
        super().__init__()
        self.projection = None

    def forward(self, x):
        if self.projection is None:
            self.projection = nn.Conv2d(4, 4, 1, dtype=torch.float64)
        return self.rest(self.hidden(x), self.projection(x))


class Drawing(Block):
    """Skips itself where `draw` says so."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x if self.draw() else super().forward(x)


class DrawsFromItsOwn(Block):
    """Generators that it owns, which a copy must not share."""

    def __init__(self):
        super().__init__()
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)

    def forward(self, x):
        y = super().forward(x)
        return y if self.python.random() + self.numpy.random() < 1 else x


class AddsNoise(Block):
    def forward(self, x):
        h = self.hidden(x)
        return self.rest(h + 0.1 * torch.randn_like(h) if self.training else h, x)


class DropsPaths(Block):
    """As timm drops paths: a mask drawn from x, in training."""

    def forward(self, x):
        y = super().forward(x)
        if not self.training:
            return y
        return x + (y - x) * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)


class Asks(Block):
    """Leaves its first half out where `question` about x says so."""

    def __init__(self, question):
        super().__init__()
        self.question = question

    def forward(self, x):
        return super().forward(x) if self.question(x) else self.rest(x, x)


class Asserts(Block):
    """As timm does, of a value that is no input."""

    def forward(self, x):
        torch._assert(x.mean() < 1e6, "too large")
        return super().forward(x)


class AsksItsChild(Block):
    def forward(self, x):
        return super().forward(x) if self.bn2.training else self.rest(x, x)


class KeepsWhatItSaw(nn.Module):
    """As monodepth's encoder: a list of features that the next forward begins anew."""

    def __init__(self):
        super().__init__()
        self.features, self.conv1, self.bn1 = [], conv(), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(Block(), Block())

    def forward(self, x):
        self.features = []
        self.features.append(self.relu(self.bn1(self.conv1(x))))
        self.features.append(self.layer(self.maxpool(self.features[-1])))
        return self.features[-1]


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's norm with an activation: a BatchNorm2d that counts by itself."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        batch = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, batch,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.act(x)


class PreActWithNormAct(nn.Module):
    """As timm writes ResNetV2's block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = BatchNormAct2d(4), BatchNormAct2d(4)
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x):
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))) + x


class Iterates(nn.Module):
    """A `Sequential` that its parent walks through, and keeps what comes of each layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), Block())

    def forward(self, x):
        taps = []
        for layer in self.layers:
            x = layer(x)
            taps.append(x.mean())
        return x + sum(taps)


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = conv(), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x, norm=True):
        x = self.conv(x)
        return self.relu(self.bn(x) if norm else x)


class CallsWithout(nn.Module):
    """Calls one unit as its forward is by default, and one without its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Unit(), Unit()

    def forward(self, x):
        return self.second(self.first(x), norm=False)


class Checkpoints(Block):
    def forward(self, x):
        if torch.is_grad_enabled():
            return checkpoint(super().forward, x, use_reentrant=False)
        return super().forward(x)


class Caches(Block):
    """A value by shape, made once."""

    def __init__(self):
        super().__init__()
        self.cache = {}

    @functools.cached_property
    def half(self):
        return torch.full((4, 1, 1), 0.5, dtype=torch.float64)

    def forward(self, x):
        if "ones" not in self.cache:
            self.cache["ones"] = torch.ones(4, 1, 1, dtype=torch.float64)
        return self.rest(self.hidden(x) * self.half, x * self.cache["ones"])


def traced():
    return fx.symbolic_trace(Block().double().eval())


def traced_in_training():
    return fx.symbolic_trace(Block().double().train())


def mixed_modes():
    """Training, but for one norm and one block."""
    model = nn.Sequential(Block(), Block(), Block())
    model[0].bn1.eval()
    model[1].eval()
    return model


def used_before(build):
    """What `build` gives, after a training step whose results it kept."""
    model = build().double()
    model(torch.ones(2, 4, 8, 8, dtype=torch.float64).requires_grad_())
    return model


# What stands alone is no part of any fused forward, and `explain` says why.
ALONE = {
    "counts-in-a-buffer": CountsInABuffer, "averages": Averages,
    "registers-a-buffer": RegistersABuffer, "clamps-its-weight": ClampsItsWeight,
    "counts": Counts, "every-second": EverySecond, "counts-in-its-class": CountsInItsClass,
    "counts-in-a-global": CountsInAGlobal, "binds-a-global": BindsAGlobal,
    "fills-a-global-list": FillsAGlobalList, "stores-a-feature": StoresAFeature,
    "fills-containers": FillsContainers, "has-a-meter": HasAMeter,
    "fills-a-closure": fills_a_closure,
    "hooks-whatever-comes": HooksWhateverComes, "stores-gradients": StoresGradients,
    "freezes-its-norm": FreezesItsNorm, "builds-a-child": BuildsAChild,
    "decays-past-the-version": DecaysPastTheVersion,
    "draws-by-torch": lambda: Drawing(lambda: bool(torch.rand(1) < 0.5)),
    "draws-by-random": lambda: Drawing(lambda: random.random() < 0.5),
    "draws-by-numpy": lambda: Drawing(lambda: np.random.rand() < 0.5),
    "draws-by-distributions": lambda: Drawing(
        lambda: bool(torch.distributions.Bernoulli(0.5).sample())
    ),
    "draws-from-its-own": DrawsFromItsOwn, "checkpoints": Checkpoints,
    "asks-for-gradients": lambda: Asks(lambda x: torch.is_grad_enabled()),
    "asks-for-inference": lambda: Asks(lambda x: not torch.is_inference_mode_enabled()),
    "asks-its-child": AsksItsChild,
}  # fmt: skip
OTHERS = {
    "asks-for-a-tensor": lambda: Asks(lambda x: isinstance(x, torch.Tensor)),
    "asks-whether-tensor": lambda: Asks(torch.is_tensor),
    "asks-for-the-class": lambda: Asks(lambda x: type(x) is torch.Tensor),
    "plain": Block, "asserts": Asserts, "fills-what-it-is-given": FillsWhatItIsGiven,
    "adds-noise": AddsNoise,
    "drops-paths": DropsPaths, "keeps-what-it-saw": KeepsWhatItSaw,
    "kept-what-it-saw": lambda: used_before(KeepsWhatItSaw),
    "filled-containers": lambda: used_before(FillsContainers),
    "stored-a-feature": lambda: used_before(StoresAFeature),
    "norm-act": PreActWithNormAct, "iterates": Iterates, "calls-without": CallsWithout,
    "caches": Caches, "traced": traced, "traced-in-training": traced_in_training,
    "mixed-modes": mixed_modes,
}  # fmt: skip
