"""Random configurations of native ops and blocks on the CPU against plain PyTorch.

    python -m tests.fuzz --minutes 10 --seed 0     every instruction set and every way to convolve
    python -m tests.fuzz --one 1234                that case again, here, as the environment says

A case is drawn from its seed alone. Its results are judged by `spec.tolerance`, and by the
pattern of what is not finite: NaN where all plain runs (both layouts, fp64) have it, none where
none has; the same for infinities. A case also fails if only one side raises, if a second run has
other bits, if an input is written to, or if its process dies. Status 1 if one failed.

EXCEPTIONS lists the results that are not compared; the summary counts them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import blocks
from resnet_fast.dispatch import backends
from resnet_fast.models.resnet import ResNet
from resnet_fast.spec import tolerance
from resnet_fast.verify.check import GRADIENT, Setting, Values
from resnet_fast.verify.modules import evaluate, randomize, round_to
from resnet_fast.verify.settle import Kinks, settle

EXCEPTIONS = {
    "tie": "gradients by value where no bias keeps every ReLU clear of zero, or rounding to 16 "
    "bits may decide one or a max-pool's winner: either side is right",
    "luck": "a rounding error up to twice what is allowed, or of three values or fewer, that other "
    "values of the case do not show: the plain runs happened to be near",
    "winograd": "NaN, where x has infinities or overflows, from Winograd's products, which "
    "subtract what they read (README, Limits)",
    "infinite parameter": "NaN beside it in dx, which has three coefficients a channel",
    "denormal": "values below the normal ones, of which 16 bits make zeros, or a bias",
}
ISAS = {  # with what makes PyTorch and oneDNN stay within them too, as on such a CPU
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx_bf16": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"},
}
WAYS = ("auto", "tiles", "winograd", "onednn")
SIZES = (1, 2, 3, 5, 7, 8, 11, 13, 16, 17)
CHANNELS = (1, 2, 3, 5, 7, 8, 13, 16, 31, 32, 33, 48, 64, 96)
TILED = (32, 64, 96)
DTYPES = ("fp32", "fp32", "fp32", "fp64", "bf16", "bf16")
MODES = ("train", "train", "train, infer", "frozen", "infer", "infer", "infer")
LAYS = ("same", "same", "same", "nchw", "channels_last", "transposed", "sliced", "offset")
VALUES = ("normal",) * 10 + ("mean", "mean", "nan", "inf", "-inf", "denormal", "huge", "constant",
                             "zeros")  # fmt: skip
POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e30, "denormal": 1e-39}
LUCKY, FEW, DRAWS = 2.0, 3, 3


class Mismatch(Exception):
    """Native differs from plain PyTorch."""


@dataclass(frozen=True)
class Case:
    """All that a seed decides, but for the values of tensors."""

    seed: int
    kind: str
    args: tuple
    options: dict
    size: tuple[int, int, int, int]
    residual: bool
    dtype: str
    mode: str
    layout: str
    lay: str
    values: str
    poisoned: str  # a kind of value that one parameter or statistic gets; "" for none
    threads: int
    draw: int = field(default=0, compare=False)


class Op(nn.Module):
    """A function of `resnet_fast.functional` with its operands as a module; plain, or native."""

    native = False

    def __init__(
        self, name, c, k=1, taps=(1, 1), stride=1, padding=0, dilation=1, groups=1, bias=False,
        affine="both", track=True, eps=1e-5, momentum=0.1, relu=True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.relu = name, relu
        if name == "conv_bn_act":
            self.conv = nn.Conv2d(c, k, taps, stride, padding, dilation, groups, bias=bias)
        if name.endswith("bn_act"):
            channels = k if name == "conv_bn_act" else c
            self.bn = nn.BatchNorm2d(channels, eps, momentum, affine != "", track)
            if affine in ("weight", "bias"):
                setattr(self.bn, "bias" if affine == "weight" else "weight", None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.name == "global_avg_pool":
            if self.native:
                return resnet_fast.functional.global_avg_pool(x, impl="native")
            return F.adaptive_avg_pool2d(x, 1)
        if self.name == "add_relu":
            if self.native:
                return resnet_fast.add_relu(x, residual, impl="native")
            return F.relu(x + residual)
        if not self.native:
            h = self.bn(self.conv(x) if self.name == "conv_bn_act" else x)
            h = h if residual is None else h + residual
            return F.relu(h) if self.relu else h
        bn = self.bn
        training = bn.training or bn.running_mean is None
        if bn.training and bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        options = {"residual": residual, "training": training, "momentum": bn.momentum,
                   "eps": bn.eps, "relu": self.relu, "impl": "native"}  # fmt: skip
        vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        if self.name == "bn_act":
            return resnet_fast.bn_act(x, *vectors, **options)
        conv = self.conv
        return resnet_fast.conv_bn_act(
            x, conv.weight, *vectors, bias=conv.bias, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, **options,
        )  # fmt: skip


class SoundConv2d(nn.Conv2d):
    """PyTorch's convolution where it is sound. oneDNN 3.x, which PyTorch calls, writes out of
    bounds where windows lie in the padding alone and for dw of strided single taps, and its dw in
    bf16 of one or two columns with a stride is uninitialized. So the padding is made before, the
    pixels are gathered, and that bf16 convolution is computed in fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        reach = [d * (t - 1) + 1 for d, t in zip(self.dilation, self.kernel_size, strict=True)]
        padding = self.padding
        if any(p >= r for p, r in zip(padding, reach, strict=True)):
            x, padding = F.pad(x, (padding[1], padding[1], padding[0], padding[0])), (0, 0)
        narrow = x.size(3) <= 2 and self.stride[1] > 1
        stride = self.stride
        if self.kernel_size == (1, 1) and stride != (1, 1):
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        geometry = stride, padding, self.dilation, self.groups
        short = torch.is_autocast_enabled("cpu") or x.dtype == torch.bfloat16
        if not (narrow and short):
            return F.conv2d(x, self.weight, self.bias, *geometry)
        with torch.autocast("cpu", enabled=False):
            values = [t if t is None else t.bfloat16().float() for t in (x, self.weight, self.bias)]
            return F.conv2d(*values, *geometry).bfloat16()


class Laid(nn.Module):
    """`module` on its input in other memory: the same values with other strides."""

    def __init__(self, module: nn.Module, lay: str) -> None:
        super().__init__()
        self.module, self.lay = module, lay

    def forward(self, x: Tensor, *residual: Tensor) -> Tensor:
        laid = lay(x, self.lay)
        bits = laid.detach().clone()
        y = self.module(laid, *residual)
        if not torch.equal(bits.nan_to_num(7.0), laid.detach().nan_to_num(7.0)):
            raise Mismatch("x was written to")
        return y

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args, **kwargs):
        return self.module.named_buffers(*args, **kwargs)


def lay(x: Tensor, how: str) -> Tensor:
    """x in the memory that `how` of LAYS says."""
    if x.numel() == 0 or how == "same":
        return x
    if how == "nchw":
        return x.contiguous()
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "sliced":
        return F.pad(x, (2, 1, 1, 0), value=7.0)[:, :, 1:, 2:-1]
    between = torch.full((3,), 7.0, dtype=x.dtype)
    return torch.cat((between, x.contiguous().flatten(), between))[3:-3].view(x.shape)


def draw(seed: int, small: bool = False) -> Case:
    """The case of `seed`."""
    r = random.Random(seed)
    kind = r.choice(("conv_bn_act",) * 6 + ("bn_act",) * 2 + ("add_relu", "global_avg_pool") +
                    ("ConvBNAct2d", "BasicBlock", "Bottleneck", "PreActBasicBlock",
                     "PreActBottleneck", "stem", "resnet"))  # fmt: skip
    channels = r.choice((CHANNELS, TILED))
    c, k = r.choice(channels), r.choice(channels)
    n, h, w = r.choice((1, 1, 2, 2, 3)), r.choice(SIZES), r.choice(SIZES)
    if small:
        h, w = min(h, 8), min(w, 8)
    residual, options, args = False, {}, ()
    relu = r.random() < 0.75
    if kind in ("conv_bn_act", "bn_act"):
        n = r.choice((0, n, n, n, n, n))
        options = {
            "affine": r.choice(("both", "both", "weight", "bias", "")), "relu": relu,
            "eps": r.choice((1e-5, 1e-5, 1e-3, 1e-8, 1.0)),
            "momentum": r.choice((0.1, 0.0, 1.0, 0.3)), "track": r.random() < 0.9,
        }  # fmt: skip
        residual = r.random() < 0.4
    if kind == "conv_bn_act":
        square, tall, wide = r.choice((1, 3, 5)), r.randint(1, 7), r.randint(1, 7)
        taps = (tall, wide) if r.random() < 0.3 else (square, square)
        pairs = {"stride": (1, 3), "dilation": (1, 3), "padding": (0, 1 + max(taps))}
        geometry = {"stride": 1, "dilation": 1, "padding": tuple(t // 2 for t in taps)}
        for name, (low, high) in pairs.items():
            if r.random() < 0.4:
                geometry[name] = r.randint(low, high), r.randint(low, high)
        both = [g for g in range(1, min(c, k) + 1) if c % g == k % g == 0]
        groups = r.choice(both) if r.random() < 0.2 else 1
        args = (c, k, taps)
        options |= geometry | {"groups": groups, "bias": r.random() < 0.25}
    elif kind in ("bn_act", "add_relu", "global_avg_pool"):
        args, residual = (c,), residual or kind == "add_relu"
    elif kind == "ConvBNAct2d":
        args = (c, k, r.randint(1, 7), r.randint(1, 3), r.choice((None, None, r.randint(0, 8))),
                r.choice((1, 1, 2)))  # fmt: skip
        options, residual = {"relu": relu}, r.random() < 0.4
    elif kind == "stem":
        c, k = r.choice((1, 3, 3, 4, 32)), r.choice((7, 8, 16, 32, 64))
        taps, pool = r.choice((1, 3, 5, 7)), r.choice((2, 3, 3, 5))
        args = (c, k, taps, r.randint(1, 3), r.randint(0, taps - 1), r.random() < 0.3,
                pool, r.randint(1, 3), r.randint(0, pool // 2))  # fmt: skip
        h, w = h + 6, w + 6
    elif kind == "resnet":
        block = r.choice(("BasicBlock", "Bottleneck", "PreActBasicBlock", "PreActBottleneck"))
        args = (block, r.choice(((1,), (1, 1), (2, 1))))
        options = {
            "planes": r.choice((8, 16, 32)), "stem": r.choice(("imagenet", "cifar")),
            "shortcut": r.choice((None, None, "zero_pad", "projection", "none")),
        }  # fmt: skip
        c, h, w = 3, h + 8, w + 8
    else:
        planes, expansion = r.choice((2, 3, 5, 8, 16, 32)), 4 if "Bottle" in kind else 1
        shortcut = r.choice(("identity", "projection", "zero_pad", "none", None))
        stride = 1 if shortcut == "identity" else r.randint(1, 3)
        if shortcut == "identity" or c > planes * expansion or r.random() < 0.3:
            c = planes * expansion
        args = (c, planes, stride)
        options = {"shortcut": shortcut, "dilation": r.choice((1, 1, 1, 2))}
        options |= {"groups": 4, "base_width": 32} if expansion == 4 and planes % 4 == 0 else {}
    values = r.choice(VALUES)
    poisoned = r.choice(tuple(POISONS)) if values == "normal" and r.random() < 0.15 else ""
    modes = MODES if kind != "add_relu" else ("train", "infer")
    return Case(
        seed, kind, args, options, (n, c, h, w), residual, r.choice(DTYPES), r.choice(modes),
        r.choice(("nchw", "channels_last", "channels_last")), r.choice(LAYS), values, poisoned,
        r.randint(1, 3),
    )  # fmt: skip


def build(case: Case, generator: torch.Generator) -> nn.Module:
    """The plain module of a case, with its values."""
    args, options = case.args, case.options
    if case.kind == "stem":
        c, k, taps, stride, padding, bias, *pool = args
        conv = nn.Conv2d(c, k, taps, stride, padding, bias=bias)
        plain = nn.Sequential(conv, nn.BatchNorm2d(k), nn.ReLU(), nn.MaxPool2d(*pool))
    elif case.kind == "resnet":
        plain = ResNet(getattr(blocks, args[0]), args[1], 5, **options, fused=False)
    elif hasattr(blocks, case.kind):
        plain = getattr(blocks, case.kind)(*args, **options)
    else:
        plain = Op(case.kind, *args, **options)
    with torch.no_grad():
        for value in plain.parameters():  # whatever the global generator is
            fan = max(1, value[0].numel()) if value.dim() > 1 else 1
            value.normal_(0, fan**-0.5, generator=generator)
        tracked = [m for m in plain.modules()
                   if isinstance(m, nn.BatchNorm2d) and m.affine and m.running_mean is not None
                   and m.weight is not None and m.bias is not None]  # fmt: skip
        for norm in tracked:
            randomize(norm, generator)
        if case.poisoned:
            convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
            barred = []
            if case.poisoned == "huge":  # a bias: PyTorch adds it, and what it is added to is lost
                barred = [conv.bias for conv in convs]
            if case.poisoned in ("inf", "-inf"):  # 0·inf of zeros that pad is NaN or is left out
                barred = [conv.weight for conv in convs if max(conv.padding) > 0]
                if any(conv.bias is not None for conv in convs):  # inf·bias is part of the shift
                    barred += [m.weight for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
            values = [
                v for v in (*plain.parameters(), *plain.buffers())
                if v.is_floating_point() and all(v is not other for other in barred)
            ]  # fmt: skip
            if values:
                chosen = random.Random(case.seed).choice(values).view(-1)
                place = torch.randint(len(chosen), (), generator=generator) if len(chosen) else 0
                chosen[place : place + 1] = POISONS[case.poisoned]
    return plain


def image(case: Case, generator: torch.Generator) -> Tensor:
    """x of a case."""
    x, kind = torch.randn(case.size, generator=generator), case.values
    if kind in ("mean", "denormal", "huge"):
        return {"mean": x + 1000, "denormal": x * 1e-39, "huge": x * 1e30}[kind]
    if kind in ("constant", "zeros"):
        return torch.full_like(x, 3.25 if kind == "constant" else 0.0)
    if kind in POISONS and x.numel():
        x.view(-1)[torch.randint(x.numel(), (2,), generator=generator)] = POISONS[kind]
    return x


def twin(plain: nn.Module) -> nn.Module:
    """`plain` with convolutions that are sound."""
    plain = copy.deepcopy(plain)
    for module in plain.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = SoundConv2d
    return plain


def native(plain: nn.Module, case: Case) -> nn.Module:
    """`plain` by native kernels."""
    if isinstance(plain, Op):
        module = copy.deepcopy(plain)
        module.native = True
    else:
        module = resnet_fast.fuse(plain, impl="native")
        for part in module.modules():
            if hasattr(part, "keep_activations"):
                part.keep_activations = case.seed % 4 == 0
    return Laid(module, case.lay)


def attempt(run) -> tuple[Values | None, str]:
    """What `run` returns, or the error that it raises."""
    try:
        return run(), ""
    except Mismatch:
        raise
    except (RuntimeError, ValueError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def check(case: Case) -> Counter:
    """Run a case; how often each of EXCEPTIONS was made use of. Raises Mismatch."""
    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(7919 * case.seed + case.draw)
    plain, x = build(case, generator), image(case, generator)
    setting = Setting("native", "cpu", case.dtype, case.layout)
    round_to(plain, setting.exact_dtype)
    x = x.to(setting.exact_dtype).float()
    inputs, reference = [x], twin(plain)
    try:
        with torch.no_grad():
            probe = copy.deepcopy(reference).train(case.mode.startswith("train"))
            shape = (x if case.kind == "add_relu" else probe(x)).shape
    except (RuntimeError, ValueError):
        shape = (1,)
    dy, beside = (torch.randn(shape, generator=generator) for _ in range(2))
    if case.residual:
        inputs.append(beside.to(setting.exact_dtype).float())
    dy = dy.to(setting.exact_dtype)
    settled = settle_case(case, reference, inputs)
    plain.load_state_dict(reference.state_dict())
    first = torch.float32 if case.dtype == "fp64" else setting.torch_dtype

    def run(module: nn.Module, where: Setting, dtype: torch.dtype) -> Values:
        return evaluate(module, inputs, dy, where, dtype, case.mode)

    with Kinks() as exact_kinks:
        wide, error = attempt(lambda: run(reference, setting, torch.float64))
    actual, raised = attempt(lambda: run(native(plain, case), setting, setting.torch_dtype))
    if bool(error) != bool(raised):
        raise Mismatch(f"plain: {error or 'runs'}; native: {raised or 'runs'}")
    if error:
        return Counter(raised=1)
    other = setting.other_layout
    with Kinks() as kinks:
        same = [run(reference, setting, first)]
    same.append(run(reference, other, setting.torch_dtype))
    if case.dtype == "bf16" and case.kind != "add_relu":  # whose sum has the right sign
        settled = settled and exact_kinks.outlast(kinks)
    if case.dtype == "fp64":  # nothing is wider: sums by other numbers of threads tell its error
        for threads in {1, 2, 3} - {case.threads}:
            torch.set_num_threads(threads)
            same.append(run(reference, other, torch.float64))
        torch.set_num_threads(case.threads)

    @functools.cache
    def others() -> list[Values]:
        """What else plain PyTorch gives, by other numbers of threads and by oneDNN."""
        runs: list[Values] = []
        for where in (setting, other):
            runs += tolerance.plain_runs(functools.partial(run, reference, where, first))
        return runs

    again = run(native(plain, case), setting, setting.torch_dtype)
    used = Counter()
    if actual.keys() != wide.keys():
        raise Mismatch(f"results: {sorted(actual.keys() ^ wide.keys())} are on one side alone")
    for name, value in actual.items():
        if not torch.equal(value.nan_to_num(7.0), again[name].nan_to_num(7.0)):
            raise Mismatch(f"{name}: a second run has other bits")
        by_value = settled or not name.startswith(GRADIENT)
        used["tie"] += not by_value
        lost = case.dtype == "bf16" or case.options.get("bias") or case.kind == "stem"
        if case.values == "denormal" and lost:
            used["denormal"] += by_value
            by_value = False
        excuse = excuse_of(case, name)
        beside, rules = [v[name] for v in same], (wide[name], by_value, bool(excuse))
        try:
            excused = judge(name, value, beside, *rules)
        except Mismatch:
            excused = judge(name, value, beside + [v[name] for v in others()], *rules)
        if excused:
            used[excuse] += 1
    used["nonfinite"] = not all(v.isfinite().all() for v in wide.values())
    return used


def settle_case(case: Case, reference: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether every ReLU of `reference` is clear of zero, its biases moved for it."""
    if case.mode == "infer":
        return True
    if case.values != "normal" or case.poisoned:
        return False
    wide = copy.deepcopy(reference).train(case.mode.startswith("train")).double()
    try:
        settled = settle(wide, *(t.double() for t in inputs), dtype=Setting(
            "native", "cpu", case.dtype, case.layout).torch_dtype)  # fmt: skip
    except (AttributeError, IndexError, TypeError, RuntimeError, ValueError):  # no bias, no image
        return False
    reference.load_state_dict({k: v for k, v in wide.state_dict().items()})
    return settled


def excuse_of(case: Case, name: str) -> str:
    """Which of EXCEPTIONS lets a result be NaN where plain PyTorch is not; "" if none does."""
    infinite = ("inf", "-inf", "huge")
    if case.poisoned in infinite and name.startswith(GRADIENT):
        return "infinite parameter"
    isa, way = backends.build_info()["isa_active"], os.environ.get("RESNET_FAST_CPU_CONV", "auto")
    widened = ("bf16",) if isa in ("avx2", "avx512") else ()  # large filters in fp32 arithmetic
    convolves = case.kind not in ("bn_act", "add_relu", "global_avg_pool")
    by_winograd = isa != "baseline" and convolves and case.dtype in ("fp32", *widened)
    if case.values in infinite and by_winograd and way in ("auto", "winograd"):
        return "winograd"
    return ""


def judge(
    name: str, actual: Tensor, same: list[Tensor], wide: Tensor, by_value: bool = True,
    nan_allowed: bool = False,
) -> bool:  # fmt: skip
    """Raise Mismatch where `actual` is not a result that plain PyTorch could give.

    Returns whether it has NaN where plain PyTorch has none, and `nan_allowed`.
    """
    if actual.shape != wide.shape:
        raise Mismatch(f"{name}: shape {tuple(actual.shape)}, expected {tuple(wide.shape)}")
    references = [*same, wide]
    nans = torch.stack([t.isnan() for t in references])
    finite = torch.stack([t.isfinite() for t in references])
    infinite = torch.stack([t.isinf() for t in references])
    made = actual.isnan() & ~nans.any(0)
    excused = nan_allowed and bool(made.any())
    for what, wrong in {
        "NaN swallowed": ~actual.isnan() & nans.all(0),
        "NaN made": made & (not nan_allowed),
        "an infinity made": actual.isinf() & finite.all(0),
        "an infinity lost": actual.isfinite() & infinite.all(0),
    }.items():
        if wrong.any():
            raise Mismatch(f"{name}: {what} in {int(wrong.sum())} of {wrong.numel()}")
    there = actual.isfinite() & finite.all(0)
    if not by_value or not there.any():
        return excused
    verdict = tolerance.compare(
        actual[there], [t[there] for t in same], wide[there].double(),
        gradient=name.startswith(GRADIENT),
    )  # fmt: skip
    if not verdict.ok:
        mismatch = Mismatch(f"{name}: {verdict}")
        mismatch.ratio = verdict.error / verdict.allowed if verdict.allowed else math.inf
        if there.sum() <= FEW:  # the plain error of a single value may be of any size
            mismatch.ratio = min(mismatch.ratio, LUCKY)
        raise mismatch
    return excused


def one(case: Case) -> Counter:
    """`check`, which rounding may fail by luck: not again with other values."""
    try:
        return check(case)
    except Mismatch as mismatch:
        if getattr(mismatch, "ratio", math.inf) > LUCKY:
            raise
        for other in range(1, DRAWS + 1):
            try:
                check(replace(case, draw=other))
            except Mismatch:
                raise mismatch from None
        return Counter(luck=1)


def work(args: argparse.Namespace) -> None:
    """A worker: its cases one by one, a line of JSON before and after each."""
    end = time.monotonic() + args.seconds
    for seed in range(args.seed, args.seed + args.count):
        if time.monotonic() > end:
            return
        print(json.dumps({"begins": seed}), flush=True)
        case = draw(seed, args.small)
        try:
            used, failed = one(case), None
        except Mismatch as mismatch:
            used, failed = Counter(), str(mismatch)
        print(json.dumps({"seed": seed, "used": used, "failed": failed}), flush=True)


@dataclass
class Tally:
    """What became of the cases of one instruction set and way to convolve."""

    isa: str
    way: str
    cases: int = 0
    used: Counter = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)


def environment_of(isa: str, way: str) -> dict[str, str]:
    """What a process of such cases starts with."""
    return {"RESNET_FAST_CPU_ISA": isa, "RESNET_FAST_CPU_CONV": way} | ISAS[isa]


def run_pair(isa: str, way: str, args: argparse.Namespace) -> Tally:
    """Workers for one pair, a new one after each that dies."""
    tally = Tally(isa, way)
    environment = os.environ | environment_of(isa, way)
    end, seed, last = time.monotonic() + args.seconds, args.seed, args.seed + args.count
    while seed < last and time.monotonic() < end:
        command = [sys.executable, *args.interpreter, "--worker", f"--seed={seed}",
                   f"--count={last - seed}", f"--seconds={end - time.monotonic()}"]  # fmt: skip
        command += ["--small"] if args.small else []
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        seed = None
        for line in worker.stdout:
            told = json.loads(line)
            if "begins" in told:
                seed = told["begins"]
                continue
            tally.cases += 1
            tally.used.update(told["used"])
            if told["failed"]:
                tally.failed.append((seed, told["failed"]))
            seed = None
        status = worker.wait()
        if seed is None:
            if status != 0:
                raise RuntimeError(f"a worker for {isa}, {way} does not start: status {status}")
            break
        tally.cases += 1
        tally.failed.append((seed, f"the process died: status {status}"))
        seed += 1
    return tally


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__.splitlines()[0])
    words.add_argument("--minutes", type=float, help="to run for, all pairs together")
    words.add_argument("--seed", type=int, default=0, help="of the first case")
    words.add_argument("--count", type=int, help="cases a pair; without --minutes 100")
    words.add_argument("--one", type=int, help="run the case of this seed, here")
    words.add_argument("--isa", choices=ISAS, help="this instruction set alone")
    words.add_argument("--conv", choices=WAYS, help="this way to convolve alone")
    words.add_argument("--jobs", type=int, default=2, help="processes at a time")
    words.add_argument("--small", action="store_true", help="images of at most 8 pixels")
    words.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    words.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    words.set_defaults(interpreter=["-m", "tests.fuzz"])
    return words


def pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The instruction sets that this CPU has, each with every way to convolve that it has: the
    baseline has no tiles, and oneDNN alone.
    """
    all_isas = list(ISAS)
    most = all_isas.index(backends.build_info()["isa_detected"])
    isas = [args.isa] if args.isa else all_isas[: most + 1]
    ways = {isa: ("auto",) if isa == "baseline" else WAYS for isa in isas}
    return [(isa, way) for isa in isas for way in ([args.conv] if args.conv else ways[isa])]


def run_all(args: argparse.Namespace) -> list[Tally]:
    """Every pair; with a time, as much of it for each."""
    todo = pairs(args)
    if args.minutes is not None:
        args.seconds = 60 * args.minutes * min(args.jobs, len(todo)) / len(todo)
    args.count = args.count or (10**9 if args.minutes is not None else 100)
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda pair: run_pair(*pair, args), todo))


def main(words: list[str] | None = None) -> int:
    args = parser().parse_args(words)
    if args.worker:
        work(args)
        return 0
    if args.one is not None:
        case = draw(args.one, args.small)
        print(json.dumps(asdict(case)))
        print(dict(one(case)))
        return 0
    tallies = run_all(args)
    for tally in tallies:
        used = ", ".join(f"{count} {name}" for name, count in sorted(tally.used.items()) if count)
        print(f"{tally.isa:12} {tally.way:9} {tally.cases:6} cases, {len(tally.failed)} mismatches"
              f"{', ' + used if used else ''}")  # fmt: skip
    for tally in tallies:
        for seed, why in tally.failed:
            again = f"python -m tests.fuzz --one {seed}{' --small' if args.small else ''}"
            print(f"\n{why}\n  {json.dumps(asdict(draw(seed, args.small)))}")
            environment = environment_of(tally.isa, tally.way)
            print(" ", *(f"{name}={value}" for name, value in environment.items()), again)
    cases, failed = sum(t.cases for t in tallies), sum(len(t.failed) for t in tallies)
    print(f"\n{cases} cases, {failed} mismatches. Exceptions (counted above):")
    for name, why in EXCEPTIONS.items():
        print(f"  {name}: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
