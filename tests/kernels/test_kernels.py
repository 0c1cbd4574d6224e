"""The Triton kernels beyond the ops' contract: tiles, both paths of a convolution, launches."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from judge import judge
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast.autograd import running_stats
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime import tuning_tables
from resnet_fast.spec import chain, reference
from resnet_fast.spec.tolerance import assert_close

if backends.triton_module()[0] is None:  # not installed, or older than 3.4
    pytest.skip(backends.triton_module()[1], allow_module_level=True)

from resnet_fast import kernels
from resnet_fast.kernels import (
    config_select,
    conv,
    conv_dgrad,
    conv_plan,
    conv_train,
    conv_wgrad,
    launch,
    reduce_partials,
)
from resnet_fast.verify.op_cases import (
    CONVOLUTIONS,
    CONVS,
    EMPTY_CONV,
    POINTWISE,
    Conv,
    Draw,
    op_of,
    projection,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    """Descriptors take fp32 where tf32 is allowed."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.fixture
def choose(monkeypatch):
    """choose(i): every kernel runs with configuration i of those it could, modulo their number."""

    def take(i):
        def nth(kernel, key, configs, rule, x, start, why=""):
            taken.append((kernel, len(configs)))
            return configs[i % len(configs)]

        monkeypatch.setattr(config_select, "choose", nth)
        return taken

    taken = []
    return take


CONV_SHAPES = {  # more than one tile every way, none of them full
    "1x1": Conv((3, 72, 9, 7), 136, (1, 1)),
    "3x3": Conv((2, 24, 13, 15), 72, (3, 3), padding=(1, 1)),
    "3x3-stride2": Conv((2, 64, 14, 10), 40, (3, 3), (2, 2), (1, 0)),
    "dilated": Conv((2, 16, 11, 13), 72, (3, 3), padding=(2, 3), dilation=(2, 3)),
    "stem": Conv((2, 3, 31, 29), 72, (7, 7), (2, 2), (3, 3)),
    "grouped": Conv((2, 48, 9, 7), 272, (3, 3), padding=(1, 1), groups=2),
    "groups of 3": Conv((1, 6, 13, 11), 272, (3, 3), padding=(1, 1), groups=2),
}
BY_POINTERS = ("stem", "grouped", "groups of 3")  # descriptors take none of them


@pytest.mark.slow
@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("name", CONV_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.leave_out(cases=lambda case: case.name in BY_POINTERS and case.tma)
def test_every_configuration_of_a_convolution(choose, dtype, name, tma):
    args = CONVOLUTIONS["conv_bn_act:bias-residual"](
        Draw(dtype, torch.channels_last, DEVICE), CONV_SHAPES[name]
    )
    x, w, bias, weight, shift, mean, var, residual, relu, eps, *geometry = args
    geometry = chain.Conv(*map(tuple, geometry[:3]), geometry[3])
    fusion = conv.Fusion(
        *reference.bn_fold(x, [bias, weight, shift, mean, var], [eps]), residual=residual, relu=relu
    )
    for i in itertools.count():
        taken = choose(i)
        judge(
            "conv_bn_act", args, f"{name} configuration {i}",
            lambda: conv.conv_fused(x, w, geometry, fusion, tma=tma)[0],
        )  # fmt: skip
        if i + 1 >= taken[-1][1]:
            break
    assert {kernel for kernel, _ in taken} == {"conv_affine_act_tma" if tma else "conv_affine_act"}
    assert len(taken) == taken[0][1] > 1


PROJECTED = {  # the convolution, and stride and channels of the residual's projection
    "1x1": (CONV_SHAPES["1x1"], 1, 24),
    "1x1-stride2": (CONV_SHAPES["1x1"], 2, 128),
    "3x3-stride2": (CONV_SHAPES["3x3"], 2, 64),
    "stride2": (CONV_SHAPES["3x3-stride2"], 1, 136),
}


def projected(name, dtype):
    """Arguments of conv_add_projection, and the fusion of one launch."""
    layer, stride, channels = PROJECTED[name]
    draw = Draw(dtype, torch.channels_last, DEVICE)
    args = projection(stride=stride, channels=channels)(draw, layer)
    scale, shift, source, w, source_scale, source_shift = args[2:8]
    w = w.contiguous(memory_format=torch.channels_last)
    source = conv_plan.Source(source, w, stride, source_scale, source_shift)
    return args, conv.Fusion(scale, shift, source=source)


@pytest.mark.parametrize("name", PROJECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_every_configuration_with_a_projection(choose, dtype, name):
    args, fusion = projected(name, dtype)
    geometry = chain.Conv(*map(tuple, args[9:12]), args[12])
    for i in itertools.count():
        taken = choose(i)
        judge(
            "conv_add_projection", args, f"{name} configuration {i}",
            lambda: conv.conv_fused(*args[:2], geometry, fusion, tma=True)[0],
        )  # fmt: skip
        if i + 1 >= taken[-1][1]:
            break
    assert {kernel for kernel, _ in taken} == {"conv_affine_act_tma"}
    assert len(taken) == taken[0][1] > 1


def test_a_projection_is_rounded_as_in_two_launches(monkeypatch):
    """One launch gives the bits of two: the projection is rounded to the dtype of y.

    Activations and filters are integers, so that their sums are exact in any order.
    """
    args, _ = projected("1x1-stride2", torch.float16)
    args = [(8 * t).round() if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in args]
    results = []
    for plan in (conv_plan.FUSED, conv_plan.LIBRARY):

        def choose(kernel, key, configs, *rest, plan=plan):
            return plan if kernel == "conv_add_projection" else configs[0]

        monkeypatch.setattr(config_select, "choose", choose)
        results.append(kernels.conv_add_projection(*args))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda args: args, "estimate"),
        (lambda args: [*args[:4], args[4][:, :, :-1], *args[5:]], "odd size"),
        (lambda args: [a.double() if torch.is_tensor(a) else a for a in args], "fp64"),
    ],
    ids=["even", "odd", "fp64"],
)
def test_plans_of_a_projection(monkeypatch, change, why):
    """One launch where descriptors can be used, else two; either gives the result."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(90, 132, "interpreter"))
    args = change(projected("1x1-stride2", torch.float16)[0])
    said = []

    def rule(kernel, key, configs, rule, x, start, reason=""):
        said.append((kernel, configs[rule], reason))
        return configs[rule]

    monkeypatch.setattr(config_select, "choose", rule)
    with Launches(monkeypatch) as launches:
        y = kernels.conv_add_projection(*args)
    plan, reason = next((plan, text) for kernel, plan, text in said if "projection" in kernel)
    assert why in reason
    assert len(launches.kernels) == (1 if plan == conv_plan.FUSED else 2)
    assert (why == "estimate") == (plan == conv_plan.FUSED)
    judge("conv_add_projection", args, why, lambda: y)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format],
                         ids=["channels_last", "nchw"])  # fmt: skip
@pytest.mark.parametrize(
    ("block", "channels", "size"),
    [(resnet_fast.BasicBlock, (16, 32), 2), (resnet_fast.Bottleneck, (16, 8), 2),
     (resnet_fast.BasicBlock, (4, 1), 6), (resnet_fast.PreActBottleneck, (16, 8), 5)],
    ids=["basic-one-pixel", "bottleneck-one-pixel", "one-channel", "pre-activation-odd"],
)  # fmt: skip
def test_small_blocks_with_a_projection(block, channels, size, layout):
    """Tensors that are dense in both formats."""
    torch.manual_seed(0)
    module = block(*channels, 2, impl="triton").to(DEVICE, memory_format=layout).eval()
    plain = resnet_fast.unfuse(module)
    x = torch.randn(2, channels[0], size, size, device=DEVICE).to(memory_format=layout)
    with torch.inference_mode():
        assert_close(module(x), plain(x), plain.double()(x.double()), "y")


def test_a_convolution_without_channels():
    x = torch.zeros(2, 0, 4, 4, dtype=torch.float16, device=DEVICE)
    w, scale = torch.zeros(8, 0, 3, 3, dtype=torch.float16, device=DEVICE), torch.ones(8)
    args = x, w, None, scale.to(DEVICE), scale.to(DEVICE), None, None, None, True, 0.0
    y = kernels.conv_bn_act(*args, [1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(y, torch.ones_like(y)) and y.shape == (2, 8, 4, 4)


def test_descriptors_take_no_3_channels():
    draw = Draw(torch.float16, torch.channels_last, DEVICE)
    x, w, *_ = CONVOLUTIONS["conv_bn_act"](draw, CONV_SHAPES["stem"])
    with pytest.raises(ValueError, match=r"^tma: .*channels or filters"):
        conv.conv_fused(x, w, chain.Conv((2, 2), (3, 3)), conv.Fusion(), tma=True)


def test_filters_of_a_projection_are_not_copied(monkeypatch):
    """1x1 filters are dense in both formats."""
    args, _ = projected("1x1", torch.float16)
    args[1], args[5] = (w.contiguous().view(w.shape) for w in (args[1], args[5]))
    monkeypatch.setattr(config_select, "choose", lambda kernel, key, configs, *rest: configs[0])
    with Launches(monkeypatch) as launches:
        kernels.conv_add_projection(*args)
    assert launches.kernels == ["conv_affine_act_tma_kernel"] and launches.calls == []


@pytest.mark.parametrize("tma", [None, False])
def test_pointers_take_no_projection(tma):
    """Rather than leave it out."""
    args, fusion = projected("1x1", torch.float16 if tma is False else torch.float64)
    with pytest.raises(ValueError, match=r"^fusion: a source needs descriptors \((fp64|tma=False)"):
        conv.conv_fused(*args[:2], chain.Conv(), fusion, tma=tma)


@pytest.mark.slow
@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("name", CONV_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16],
                         ids=["fp64", "fp32", "fp16"])  # fmt: skip
@pytest.mark.leave_out(
    cases=lambda case: case.tma and (case.name in BY_POINTERS or case.dtype == torch.float64)
)
def test_statistics_of_every_configuration(choose, monkeypatch, dtype, name, tma):
    """Tiles end where the images do not."""
    draw = Draw(dtype, torch.channels_last, DEVICE)
    args = CONVOLUTIONS["conv_fprop:stats"](draw, CONV_SHAPES[name])
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", "fused")
    monkeypatch.setattr(conv_train, "conv_fused", functools.partial(conv.conv_fused, tma=tma))
    for i in itertools.count():
        taken = choose(i)
        judge("conv_fprop", args, f"{name} {i}", lambda: kernels.conv_fprop(*args))
        if i + 1 >= taken[-1][1]:
            break
    kernel = "conv_moments" if tma else "conv_affine_act"
    assert {name for name, _ in taken} == {"conv_fprop", kernel}


@pytest.mark.parametrize("tma", [None, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("beside", ["relu", "scale", "residual"])
def test_statistics_are_of_the_convolution_alone(tma, beside):
    """Nothing is dropped without a word."""
    draw = Draw(torch.float16, torch.channels_last, DEVICE)
    x, w, *_ = CONVOLUTIONS["conv_fprop:stats"](draw, CONV_SHAPES["1x1"])
    fusion = conv_plan.STATS._replace(**{beside: True if beside == "relu" else x})
    with pytest.raises(ValueError, match="fusion: expected no norm, residual or ReLU with stats"):
        conv.conv_fused(x, w, chain.Conv(), fusion, tma=tma)


GRADIENT_SHAPES = {name: conv for name, conv in CONV_SHAPES.items() if name not in BY_POINTERS} | {
    "1x1-stride2": Conv((3, 64, 6, 8), 40, (1, 1), (2, 2)),
    "192-stride2": Conv((1, 192, 4, 6), 16, (3, 3), (2, 2), (1, 1)),  # no multiple of 128
    "96-stride2": Conv((2, 96, 4, 4), 16, (1, 1), (2, 2)),
    "odd-stride2": Conv((2, 8, 9, 7), 24, (2, 3), (2, 2), (0, 1)),
}


def with_plan(monkeypatch, plan, tma):
    """conv_bprop by `plan`, its kernels by descriptors where they can or by pointers."""

    def plans(x, w, conv, grad_in):
        able = conv_plan.refuse_gradients(x, w, conv) is None
        return conv_plan.Plans((plan if able else conv_plan.PLANS[-1],), 0, "the test's")

    monkeypatch.setattr(conv_train, "backward_plans", plans)
    if not tma:
        for module in (conv_dgrad, conv_wgrad):
            monkeypatch.setattr(module, "refuse_tma", lambda *_: "by pointers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tma", "variant"),
    [
        (torch.float32, True, "residual-masked"),
        (torch.float16, True, "residual-masked"),
        (torch.float16, True, "bare"),
        (torch.float64, False, "residual-masked"),
        (torch.float32, False, "residual-masked"),
    ],
    ids=["fp32", "fp16", "fp16-bare", "fp64-pointers", "fp32-pointers"],
)
@pytest.mark.parametrize("name", GRADIENT_SHAPES)
@pytest.mark.leave_out(
    cases=lambda case: (case.variant == "bare" and case.name != "3x3")
    or (
        case.tma
        and (case.name == "odd-stride2" or (case.name, case.dtype) == ("96-stride2", torch.float16))
    )
)
def test_gradients_in_a_launch_each(choose, monkeypatch, name, dtype, tma, variant):
    """ReLU's gradient and sums on store, in every configuration."""
    shape = GRADIENT_SHAPES[name]
    args = CONVOLUTIONS[f"conv_bprop:{variant}"](Draw(dtype, torch.channels_last, DEVICE), shape)
    with_plan(monkeypatch, conv_train.PLANS[0], tma)
    for i in itertools.count():
        taken = choose(i)
        judge("conv_bprop", args, f"{name} {i}", lambda: kernels.conv_bprop(*args))
        sizes = {kernel: size for kernel, size in taken if kernel.startswith("conv_")}
        if i + 1 >= max(sizes.values()):
            break
    assert set(sizes) == {"conv_bprop", "conv_dgrad", "conv_wgrad"}


@pytest.mark.parametrize("plan", conv_train.PLANS, ids=lambda p: "".join(map(str, p)))
@pytest.mark.parametrize("variant", ["residual-masked", "kept", "frozen-input", "only-dx",
                                     "only-dw"])  # fmt: skip
def test_every_plan_of_the_gradients(monkeypatch, plan, variant):
    """Whoever does what, the results are the same."""
    with_plan(monkeypatch, plan, True)
    for name in ("1x1", "3x3-stride2"):
        draw = Draw(torch.float32, torch.channels_last, DEVICE)
        args = CONVOLUTIONS[f"conv_bprop:{variant}"](draw, GRADIENT_SHAPES[name])
        judge("conv_bprop", args, name, lambda args=args: kernels.conv_bprop(*args))


def test_no_box_reaches_into_the_other_parity(monkeypatch):
    """At stride 2 the channels of both parities are neighbours: a tile's are those of one."""
    args = CONVOLUTIONS["conv_bprop:only-dx"](
        Draw(torch.float32, torch.channels_last, DEVICE), GRADIENT_SHAPES["192-stride2"]
    )
    with_plan(monkeypatch, conv_train.PLANS[0], True)
    widths = []

    def choose(kernel, key, configs, rule, x, start, why=""):
        if kernel == "conv_dgrad":
            widths.extend(config[1] for config in configs)
        return configs[rule]

    monkeypatch.setattr(config_select, "choose", choose)
    kernels.conv_bprop(*args)
    assert widths and all(192 % width == 0 for width in widths)


@pytest.mark.slow
def test_gradients_of_fp32_filters(monkeypatch):
    """16-bit activations beside fp32 filters: the gradient is summed and stored in fp32."""
    with_plan(monkeypatch, conv_train.PLANS[0], True)
    args = CONVOLUTIONS["conv_bprop"](
        Draw(torch.float16, torch.channels_last, DEVICE), GRADIENT_SHAPES["3x3"]
    )
    args[1] = args[1].float()
    judge("conv_bprop", args, "fp32 filters", lambda: kernels.conv_bprop(*args))
    dw = kernels.conv_bprop(*args)[1]
    assert dw.dtype == torch.float32 and not torch.equal(dw, dw.half().float())


def test_asking_for_a_plan(monkeypatch):
    """RESNET_FAST_TRITON_CONV: ours alone, the library's alone, or by table and rule."""
    args = CONVOLUTIONS["conv_bprop"](
        Draw(torch.float32, torch.channels_last, DEVICE), GRADIENT_SHAPES["1x1"]
    )

    def kernels_of(asked):
        monkeypatch.setenv("RESNET_FAST_TRITON_CONV", asked)
        with monkeypatch.context() as patch, Launches(patch) as launches:
            kernels.conv_bprop(*args)
        return launches

    ours = {"conv_dgrad_kernel", "conv_wgrad_kernel"}
    for asked in ("auto", "fused"):
        launches = kernels_of(asked)
        assert ours < set(launches.kernels) and not any("conv" in c for c in launches.calls)
    launches = kernels_of("library")
    assert not ours & set(launches.kernels)
    assert sum("convolution_backward" in call for call in launches.calls) == 1
    with pytest.raises(ValueError, match="RESNET_FAST_TRITON_CONV: expected auto, fused or libr"):
        kernels_of("cudnn")


@pytest.mark.parametrize("variant", [v for v in CONVOLUTIONS if op_of(v) == "conv_bn_act"])
def test_inference_by_the_library(monkeypatch, variant):
    """Its convolution and one pass of ours, whatever is there of norm, bias and residual."""
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", "library")
    for layout in (torch.channels_last, torch.contiguous_format):
        args = CONVOLUTIONS[variant](Draw(torch.float32, layout, DEVICE), CONVS["3x3-stride2"])
        with monkeypatch.context() as patch, Launches(patch) as launches:
            judge("conv_bn_act", args, variant, lambda args=args: kernels.conv_bn_act(*args))
        assert not any("conv" in name for name in launches.kernels)
        bare = variant == "conv_bn_act:bare"
        assert launches.kernels.count("bn_act_fwd_kernel") == (0 if bare else 1)
        empty = CONVOLUTIONS[variant](Draw(torch.float32, layout, DEVICE), EMPTY_CONV)
        assert kernels.conv_bn_act(*empty).numel() == 0


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("name", ["3x3", "1x1-stride2", "grouped"])
def test_inference_by_cudnn(monkeypatch, name, residual):
    """With folded filters; PyTorch on a CPU convolves in place of cuDNN."""
    called = []

    def relu(x, w, bias, *geometry):
        return add_relu(x, w, 0.0, 1.0, bias, *geometry)

    def add_relu(x, w, z, alpha, bias, *geometry):
        called.append(w.dtype == bias.dtype == x.dtype)
        assert w.is_contiguous(memory_format=torch.channels_last)
        return torch.relu(torch.conv2d(x, w, bias, *geometry) + alpha * z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu, raising=False)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu, raising=False)
    monkeypatch.setattr(config_select, "choose", lambda kernel, *args: conv_plan.CUDNN)
    variant = "conv_bn_act:fp32-filters" if residual else "conv_bn_act"
    draw = Draw(torch.float16, torch.channels_last, DEVICE)
    args = CONVOLUTIONS[variant](draw, CONVS[name])
    judge("conv_bn_act", args, name, lambda: kernels.conv_bn_act(*args))
    assert called and all(called)


def test_many_norms_take_several_launches(monkeypatch):
    """A launch has room for the arguments of MOST norms; every norm is folded once."""
    monkeypatch.setattr(sys.modules["resnet_fast.kernels.bn_fold"], "MOST", 3)
    args = POINTWISE["bn_fold"](Draw(torch.float32, torch.channels_last, DEVICE), (2, 200, 3, 3))
    judge("bn_fold", args, "4 norms", lambda: kernels.bn_fold(*args))
    with Launches(monkeypatch) as launches:
        kernels.bn_fold(*args)
    assert launches.kernels == ["bn_fold_kernel"] * 2


def test_a_refusal_of_cudnn_is_slow(monkeypatch):
    """It is infinitely slow; any other error ends the search."""

    def start(config):
        raise RuntimeError(config)

    monkeypatch.setattr(tuning_tables, "microseconds", lambda run: run())
    for said in ("GET was unable to find an engine to execute", "cuDNN error: NOT_SUPPORTED"):
        assert config_select._microseconds(start, said) == math.inf
    with pytest.raises(RuntimeError, match="illegal memory access"):
        config_select._microseconds(start, "an illegal memory access was encountered")


def test_plans_of_inference():
    """cuDNN's own fused launch is offered in 16 bits with a norm and a ReLU, and never by rule."""
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in
            ((256, 512, 7, 7), (512, 512, 3, 3)))  # fmt: skip
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    on_gpu = SimpleNamespace(is_cuda=True, **{name: getattr(x, name) for name in dir(x) if name in (
        "shape", "size", "dtype", "device", "element_size", "stride", "is_contiguous", "data_ptr",
        "numel", "dim")})  # fmt: skip
    layer, ones = chain.Conv(padding=(1, 1)), torch.ones(512)
    for fusion, offered in ((conv.Fusion(ones, ones), True), (conv.Fusion(), False),
                            (conv.Fusion(ones, ones, relu=False), False)):  # fmt: skip
        found = conv_plan.forward_plans(on_gpu, w, layer, fusion, training=False)
        assert (conv_plan.CUDNN in found.plans) == offered
        assert found.plans[found.rule] != conv_plan.CUDNN and found.plans[-1] == conv_plan.LIBRARY


NHWC = torch.channels_last
IN_TRAINING = {  # x, w, padding, groups, memory format, dtype: plan and reason
    "memory-bound": ((256, 64, 56, 56), (256, 64, 1, 1), 0, 1, NHWC, torch.bfloat16, True, "estim"),
    "3x3": ((256, 512, 7, 7), (512, 512, 3, 3), 1, 1, NHWC, torch.bfloat16, False, "estimate"),
    "small": ((2, 256, 4, 4), (256, 256, 3, 3), 1, 1, NHWC, torch.bfloat16, True,
              "estimate 18 us by Triton, 20 us by cuDNN"),
    "stem": ((256, 3, 224, 224), (64, 3, 7, 7), 3, 1, NHWC, torch.float16, True, "few channels"),
    "NCHW-stem": ((256, 3, 224, 224), (64, 3, 7, 7), 3, 1, torch.contiguous_format, torch.float16,
                  False, "no tensor descriptors: NCHW"),
    "groups": ((8, 128, 14, 14), (128, 4, 3, 3), 1, 32, NHWC, torch.bfloat16, False, "no tensor"),
    "depthwise": ((8, 4, 56, 56), (4, 1, 3, 3), 1, 4, NHWC, torch.bfloat16, False, "no tensor"),
    "8-channels": ((8, 8, 56, 56), (64, 8, 3, 3), 1, 1, NHWC, torch.bfloat16, True, "estimate"),
    "fp64": ((8, 128, 14, 14), (128, 128, 3, 3), 1, 1, NHWC, torch.float64, True, "one launch"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TRAINING)
def test_plans_of_training(monkeypatch, name):
    """On a Hopper without a table: by estimate, or by what is known of cuDNN."""
    shape, filters, padding, groups, fmt, dtype, fused, why = IN_TRAINING[name]
    hopper = launch.Target(90, 132, "Hopper")
    monkeypatch.setattr(conv_plan, "target", lambda x: hopper)
    x, w = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, filters))
    x, w = (t.contiguous(memory_format=fmt) for t in (x, w))
    layer = chain.Conv(padding=(padding, padding), groups=groups)
    found = conv_plan.forward_plans(x, w, layer, conv_plan.STATS, training=True)
    assert found.plans[found.rule] == (conv_plan.FUSED if fused else conv_plan.LIBRARY)
    assert found.why.startswith(why)
    if name == "stem":
        found = conv_plan.forward_plans(x, w, layer, conv_plan.Fusion(), training=False)
        assert found.why == "one launch"
        monkeypatch.setattr(conv_plan, "target", lambda x: launch.Target(80, 108, "Ampere"))
        found = conv_plan.forward_plans(x, w, layer, conv_plan.STATS, training=True)
        assert found.plans[found.rule] == conv_plan.LIBRARY


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_alone_for_gradients(monkeypatch, capability):
    """Where the rule takes cuDNN, for 25 taps or without descriptors: with passes all the same."""
    monkeypatch.setattr(conv_plan, "target", lambda x: launch.Target(capability, 132, "a GPU"))
    x, w = (torch.empty(8, 64, 14, 14, device="meta"), torch.empty(64, 64, 5, 5, device="meta"))
    x, w = (t.bfloat16().contiguous(memory_format=NHWC) for t in (x, w))
    case = x, w, chain.Conv(padding=(2, 2)), conv_plan.GradIn()
    found = conv_plan.backward_plans(*case)
    assert found.plans[found.rule] == conv_plan.PLANS[-1]
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", "fused")
    found = conv_plan.backward_plans(*case)
    assert found.plans[found.rule] == conv_plan.PLANS[0]


GRADIENTS = {  # x, w, what dgrad's epilogue does, dtype: plan and reason
    "memory-bound": ((256, 64, 56, 56), (256, 64, 1, 1), "sums", torch.bfloat16, (1, 1), "estim"),
    "residual": ((256, 1024, 14, 14), (256, 1024, 1, 1), "residual", torch.bfloat16, (1, 0), "est"),
    "3x3": ((256, 512, 7, 7), (512, 512, 3, 3), "sums", torch.float16, (0, 0), "estimate: dgrad "),
    "small": ((2, 256, 4, 4), (256, 256, 3, 3), "sums", torch.bfloat16, (1, 1),
              "estimate: dgrad 18 us by Triton, 20 us by cuDNN"),
    "fp32": ((256, 512, 7, 7), (512, 512, 3, 3), "sums", torch.float32, (1, 1), "one launch each"),
    "fp64": ((256, 512, 7, 7), (512, 512, 3, 3), "sums", torch.float64, (1, 1), "one launch each"),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_plans_of_gradients(monkeypatch, name):
    """On a Hopper without a table: each gradient by estimate."""
    shape, filters, epilogue, dtype, plan, why = GRADIENTS[name]
    monkeypatch.setattr(conv_plan, "target", lambda x: launch.Target(90, 132, "Hopper"))
    monkeypatch.setattr(conv_plan, "precision", lambda x: "tf32")
    x, w = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, filters))
    x, w = (t.contiguous(memory_format=NHWC) for t in (x, w))
    vector = torch.empty(shape[1], device="meta")
    grad_in = conv_plan.GradIn(*[vector] * 4)
    if epilogue == "residual":
        grad_in = conv_plan.GradIn(residual=x)
    layer = chain.Conv(padding=(filters[2] // 2,) * 2)
    found = conv_plan.backward_plans(x, w, layer, grad_in)
    assert found.plans[found.rule] == plan and found.why.startswith(why)


@pytest.mark.parametrize("more", [0, 3])
def test_sums_of_many_tiles(more):
    """More tiles than one launch sums; the last fold is full, or not."""
    torch.manual_seed(0)
    partial = torch.randn(2, 2 * reduce_partials.SUMS_AT_ONCE + more, 40)
    rstd, scale = torch.rand(40), torch.rand(40)
    found = reduce_partials.merge_sums(partial.to(DEVICE), rstd.to(DEVICE), scale.to(DEVICE), 9)
    exact = partial.double().sum(1) * torch.stack([torch.ones(40), rstd])
    b_c = reference.bn_bwd_finalize(*exact, scale.double(), rstd.double(), 9)
    for actual, expected in zip(found, (*exact, *b_c), strict=False):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-6, atol=1e-3)
    assert [t.numel() for t in found] == [40] * 4 + [0] * 3


def test_statistics_of_splits_far_apart():
    """The first split's mean is far from the others: a second pass corrects rounding."""
    torch.manual_seed(0)
    splits, pixels, channels = 300, 64, 40
    n = torch.full((splits, 1), float(pixels))
    n[-1] = pixels - 5
    mean, m2 = torch.randn(splits, channels), torch.rand(splits, channels)
    mean[0] += 1e5
    partial = torch.stack([n.expand_as(mean), mean, torch.zeros_like(mean), m2])
    found = merged(partial, int(n.sum()))
    n, mean, m2 = n.double(), mean.double(), m2.double()
    exact = (n * mean).sum(0) / n.sum()
    spread = m2.sum(0) + (n * (mean - exact).square()).sum(0)
    torch.testing.assert_close(found[0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1], spread, rtol=1e-6, atol=0)


def merged(partial, values):
    """mean, m2 of moments in double; scale, shift and rstd must be those of them."""
    weight, bias = torch.rand(2, partial.size(2), device=DEVICE)
    mean, m2, *norm = reduce_partials.merge_tiles(partial.to(DEVICE), values, weight, bias, 1e-5)
    expected = reference.bn_finalize(mean, m2, values, weight, bias, 1e-5)
    for actual, other in zip(norm, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-6, atol=1e-6)
    return mean.double().cpu(), m2.double().cpu()


def test_statistics_of_many_tiles():
    """More tiles than one program merges, a mean that is large, against the exact moments."""
    torch.manual_seed(0)
    tiles, pixels, channels = 700, 8, 5
    v = (torch.randn(tiles, pixels, channels) + 1000).double()
    v[-1, 3:] = float("nan")  # the last tile has 3 pixels
    n = torch.full((tiles, channels), float(pixels))
    n[-1] = 3
    mean = v.nanmean(1).float()
    rest = (v.nanmean(1) - mean).float()
    m2 = (v - v.nanmean(1, keepdim=True)).square().nansum(1).float()
    found = merged(torch.stack([n, mean, rest, m2]), tiles * pixels - 5)
    whole = v.reshape(-1, channels)[: tiles * pixels - 5]
    exact = whole.mean(0), (whole - whole.mean(0)).square().sum(0)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_statistics_of_two_to_the_31_values():
    """As many programs as an H200 runs, of 2^23 values each."""
    torch.manual_seed(0)
    mean = 1000 + 1e-3 * torch.randn(256, 8)
    rest, m2 = 1e-5 * torch.randn(256, 8), 2.0**23 * (1 + 0.1 * torch.randn(256, 8))
    n = torch.full_like(mean, 2.0**23)
    found = merged(torch.stack([n, mean, rest, m2]), 2**31)
    n, at, m2 = n.double(), mean.double() + rest.double(), m2.double()
    exact = (n * at).sum(0) / 2.0**31
    spread = m2.sum(0) + (n * (at - exact).square()).sum(0)
    torch.testing.assert_close(found[0], exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(found[1], spread, rtol=1e-6, atol=0)


WALKS = {  # values [pixels, channels] of the input, which a filter of the identity copies
    "first step": lambda v: v,
    "mean 1000": lambda v: v + 1000,
    "constant": lambda v: torch.full_like(v, 1000.7),
    "first tile apart": lambda v: v + 1000 * (torch.arange(len(v))[:, None] < 64),
    "first pixel apart": lambda v: v + 1e5 * (torch.arange(len(v))[:, None] == 0),
    "drift": lambda v: v + torch.arange(len(v))[:, None],
}


@pytest.mark.parametrize("values", WALKS)
@pytest.mark.parametrize("config", [(128, 32, 64, 8, 3, 1), (64, 32, 64, 4, 3, 1)],
                         ids=["128x32", "64x32"])  # fmt: skip
def test_statistics_of_a_walk(monkeypatch, values, config):
    """Programs of 14 or 27 tiles: a mean within 1e-6 deviations, a variance within the bound of
    `conv_moments_kernel`, and the same bits twice.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(conv_plan, "MOMENTS_CONFIGS", (config,))
    torch.manual_seed(0)
    v = WALKS[values](torch.randn(3 * 32 * 36, 32))
    x = v.reshape(3, 32, 36, 32).permute(0, 3, 1, 2).to(DEVICE)
    eye = torch.eye(32, device=DEVICE)[:, :, None, None]
    eye = eye.contiguous(memory_format=torch.channels_last)
    z, partial = conv.conv_fused(x, eye, chain.Conv(), conv_plan.STATS)
    assert partial.size(1) == 2 and partial[0].sum(0).eq(len(v)).all()
    mean, m2 = merged(partial, len(v))
    stored = z.double().permute(1, 0, 2, 3).flatten(1).cpu()
    exact = stored.mean(1)
    spread = (stored - exact[:, None]).square().sum(1)
    deviation = (spread / len(v)).sqrt()
    assert ((mean - exact).abs() <= 1e-7 * exact.abs() + 1e-6 * deviation).all()
    tiles = 1 + len(v) / (2 * config[0])
    torch.testing.assert_close(m2, spread, rtol=3e-7 * tiles, atol=1e-12)
    again = conv.conv_fused(x, eye, chain.Conv(), conv_plan.STATS)[1]
    assert torch.equal(again, partial)


@pytest.mark.parametrize("values", WALKS)
def test_statistics_of_a_walk_of_short_tiles(monkeypatch, values):
    """Boxes that end beyond the images; the first has all its pixels, the last a few."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(conv_plan, "MOMENTS_CONFIGS", ((64, 32, 64, 4, 3, 1),))
    torch.manual_seed(0)
    v = WALKS[values](torch.randn(65 * 9 * 9, 32))
    x = v.reshape(65, 9, 9, 32).permute(0, 3, 1, 2).to(DEVICE)
    w = torch.zeros(32, 32, 3, 3, device=DEVICE)
    w[:, :, 1, 1] = torch.eye(32)
    w = w.contiguous(memory_format=NHWC)
    z, partial = conv.conv_fused(x, w, chain.Conv(padding=(1, 1)), conv_plan.STATS)
    assert torch.equal(z, x) and partial.size(1) == 2 and partial[0].sum(0).eq(len(v)).all()
    mean, m2 = merged(partial, len(v))
    exact = v.double().mean(0)
    spread = (v.double() - exact).square().sum(0)
    deviation = (spread / len(v)).sqrt()
    assert ((mean - exact).abs() <= 1e-7 * exact.abs() + 1e-6 * deviation).all()
    torch.testing.assert_close(m2, spread, rtol=3e-7 * (1 + len(v) / 2 / 16), atol=1e-12)


LARGE = (3, 72, 19, 23)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format],
                         ids=["channels_last", "NCHW"])  # fmt: skip
@pytest.mark.parametrize(
    "variant",
    ["bn_stats", "bn_act:dual", "bn_act_bwd_reduce:dual", "bn_act_bwd_apply:residual",
     "bn_relu_max_pool", "max_pool_bwd", "global_avg_pool", "image_stats", "gated_act",
     "gated_act_bwd_reduce", "gated_act_bwd_apply"],
)  # fmt: skip
def test_every_configuration_of_a_memory_bound_kernel(choose, variant, layout):
    """Over a tensor of many tiles, none of them full, and several splits of a reduction."""
    args = POINTWISE[variant](Draw(torch.float32, layout, DEVICE), LARGE)
    function = getattr(kernels, op_of(variant))
    for i in itertools.count():
        taken = choose(i)
        judge(op_of(variant), args, f"{variant} configuration {i}", lambda: function(*args))
        if i + 1 >= taken[-1][1]:
            break
    assert len(taken) == taken[0][1] > 1


@pytest.mark.parametrize("m", [16, 64, 128])
@pytest.mark.parametrize("size", [(1, 56, 56), (256, 56, 56), (256, 14, 14), (32, 7, 7), (1, 7, 7),
                                  (3, 13, 29), (1, 1, 802816)])  # fmt: skip
def test_box(m, size):
    """Powers of two whose product is the tile's, and no other such box covers with fewer."""
    box = conv_plan.box_of(m, *size)

    def count(box):
        return math.prod(-(-n // b) for n, b in zip(size, box, strict=True))

    assert math.prod(box) == m and all(b & (b - 1) == 0 for b in box)
    sides = [1 << i for i in range(m.bit_length())]
    others = [b for b in itertools.product(sides, repeat=3) if math.prod(b) == m]
    assert count(box) == min(map(count, others))


def test_boxes_waste_nothing_at_the_sizes_of_resnet():
    for size in (56, 28, 14, 7):
        box = conv_plan.box_of(128, 256, size, size)
        assert 256 % box[0] == size % box[1] == size % box[2] == 0


def test_rule():
    """The largest tile that still fills the GPU; narrow filters and small memory exclude tiles."""
    configs = conv_plan.eligible(conv_plan.CONFIGS, 64, 227 << 10)
    assert max(c[1] for c in configs) == 64
    small = conv_plan.eligible(conv_plan.CONFIGS, 512, 99 << 10)
    assert small and conv_plan.CONFIGS[0] not in small
    wide = conv_plan.eligible(conv_plan.CONFIGS, 512, 227 << 10)
    assert wide[conv_plan.pick(wide, 802816, 512, 132)] == conv_plan.CONFIGS[0]
    assert conv_plan.pick(wide, 49, 64, 132) == len(wide) - 1


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(config_select, "_chosen", {})
    return tmp_path


def chosen(key=("k", 3), configs=((1, 1), (2, 2), (3, 3))):
    config_select._chosen.clear()
    return config_select.choose("kernel", key, configs, 1, torch.empty(0), lambda config: None)


def test_table_of_tiles(cache):
    """The user's table, then the shipped one, then the rule; a configuration of old is no more."""
    user = tuning_tables.user_table("tiles", "interpreter")
    assert user == cache / "user" / "tiles" / "interpreter.json"
    assert chosen() == (2, 2)
    shipped = tuning_tables.shipped_table("tiles", "interpreter")
    tuning_tables.write(shipped, "kernel", "k 3", {"config": [3, 3], "us": 7.0})
    assert chosen() == (3, 3)
    tuning_tables.write(user, "kernel", "k 3", {"config": [1, 1], "us": 5.0})
    tuning_tables.write(user, "kernel", "other", {"config": [2, 2], "us": 5.0})
    assert chosen() == (1, 1)
    assert json.loads(user.read_text())["kernel"]["k 3"] == {"config": [1, 1], "us": 5.0}
    assert chosen(configs=((4, 4), (5, 5))) == (5, 5)
    assert chosen(key=("else",)) == (2, 2)
    assert {path.suffix for path in user.parent.iterdir()} == {".json", ".lock"}
    for damaged in ("{", '{"kernel": {"k 3": {"config": [1, [1]]}}}'):
        user.write_text(damaged)
        with pytest.warns(RuntimeWarning, match=r"interpreter\.json: not a valid tuning table \("):
            assert chosen() == (3, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert chosen() == (3, 3) and chosen(key=("other",)) == (2, 2)


def test_what_is_compiled_is_what_would_run(cache):
    """A table's configuration for the target, else the rule's; all of them where all are asked."""
    target = launch.Target(90, 132, "interpreter")
    user = tuning_tables.user_table("tiles", "interpreter")
    with launch.compile_for(target, print, every=False):
        assert chosen() == (2, 2)
        tuning_tables.write(user, "kernel", "k 3", {"config": [3, 3], "us": 7.0})
        assert chosen() == (3, 3)
        assert not config_select._chosen
    with launch.compile_for(launch.Target(90, 132, "another"), print, every=False):
        assert chosen() == (2, 2)
    started = []
    with launch.compile_for(target, print):
        args = "kernel", ("k", 3), ((1, 1), (2, 2)), 1, torch.empty(0), started.append
        started.append(config_select.choose(*args))
    assert started == [(1, 1), (2, 2)]


def test_search(cache, monkeypatch):
    """Every configuration timed once, the fastest taken and written down."""
    times = {(1, 1): 9.0, (2, 2): float("inf"), (3, 3): 4.0}
    monkeypatch.setattr(config_select, "_microseconds", lambda start, config: times[config])
    monkeypatch.setattr(config_select, "_searches", lambda x: True)
    assert chosen() == (3, 3)
    table = json.loads(tuning_tables.user_table("tiles", "interpreter").read_text())
    assert table == {"kernel": {"k 3": {"config": [3, 3], "us": 4.0}}}
    monkeypatch.setattr(config_select, "_microseconds", None)  # what is written is not timed again
    assert chosen() == (3, 3)


def test_no_search_while_a_graph_is_captured(cache, monkeypatch):
    """The rule's configuration runs, and the next time is asked anew."""
    with monkeypatch.context() as patch:
        patch.setattr(config_select, "_searches", lambda x: True)
        patch.setattr(tuning_tables, "capturing", lambda: True)
        patch.setattr(config_select, "_microseconds", None)
        assert chosen() == (2, 2)
        assert not config_select._chosen
        assert not tuning_tables.user_table("tiles", "interpreter").exists()
    assert chosen() == (2, 2) and config_select._chosen


def test_no_search_unless_asked(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.delenv("RESNET_FAST_AUTOTUNE", raising=False)
    assert not config_select._searches(on_gpu)
    monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    assert config_select._searches(on_gpu) and not config_select._searches(torch.empty(0))
    assert tuning_tables.slug("NVIDIA H200") == "nvidia-h200"


def test_refusals():
    assert "there is no Triton kernel for nothing" == kernels.refusal("nothing", "cpu", torch.float)
    assert "floating-point" in kernels.refusal("bn_act", "cpu", torch.int32)
    assert "not on xpu" in kernels.refusal("bn_act", "xpu", torch.float32)
    if launch.INTERPRETING:
        assert "not support bf16" in kernels.refusal("bn_act", "cpu", torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"impl='triton' cannot run add_relu.*support bf16"):
            x = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
            resnet_fast.add_relu(x, x, impl="triton")
    for dtype in (torch.float32, torch.bfloat16):  # "auto" on a CPU is never the interpreter
        assert backends.chosen("bn_act", "auto", "cpu", dtype) != "triton"


class Launches(TorchDispatchMode):
    """Counts the launches of Triton kernels and the calls of PyTorch that would be one."""

    FREE = (
        "view", "detach", "permute", "slice", "unsqueeze", "t", "alias", "empty", "as_strided",
        "flatten", "expand", "squeeze", "_unsafe_view", "reshape", "new_empty", "empty_strided",
        "max_pool2d",  # what it is made of is counted
    )  # fmt: skip

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels, self.calls = [], []
        for module in (m for name, m in sys.modules.items() if "resnet_fast.kernels." in name):
            if hasattr(module, "launch") and callable(module.launch):
                monkeypatch.setattr(module, "launch", self.count(module.launch))

    def count(self, start):
        def counted(kernel, *args, **options):
            self.kernels.append(getattr(kernel, "fn", kernel).__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                start(kernel, *args, **options)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")
        if name[0] == "aten" and name[2] not in self.FREE:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (lambda: resnet_fast.Bottleneck(32, 8), 3),
        (lambda: resnet_fast.Bottleneck(16, 8, 2), 4),
        (lambda: resnet_fast.BasicBlock(8, 8), 2),
        (lambda: resnet_fast.BasicBlock(8, 16, 2), 3),
        (lambda: resnet_fast.Bottleneck(32, 16, 2), 3),
        (lambda: resnet_fast.BasicBlock(32, 32, 2), 2),
        (lambda: resnet_fast.ConvBNAct2d(8, 16, 3), 1),
    ],
    ids=["bottleneck", "bottleneck-projection", "basic", "basic-projection",
         "bottleneck-descriptors", "basic-descriptors", "conv"],
)  # fmt: skip
def test_launches_of_a_block(monkeypatch, block, expected):
    module = block().to(DEVICE, memory_format=torch.channels_last).eval()
    module.impl = "triton"
    x = torch.randn(2, next(module.parameters()).size(1), 6, 6, device=DEVICE)
    x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode(), Launches(monkeypatch) as launches:
        module(x)
    fold, *convs = launches.kernels
    assert fold == "bn_fold_kernel" and len(convs) == expected and launches.calls == []
    assert all(name.startswith("conv_affine_act") for name in convs)


CONV_STATS = "conv_moments_kernel"
VECTORS = {"merge_tiles_kernel", "merge_sums_kernel", "fold_kernel"}


@pytest.mark.parametrize(
    ("block", "convs"),
    [
        (lambda: resnet_fast.Bottleneck(32, 8), 3),
        (lambda: resnet_fast.Bottleneck(64, 32, 2), 4),
        (lambda: resnet_fast.BasicBlock(8, 8), 2),
        (lambda: resnet_fast.BasicBlock(32, 32, 2), 3),
    ],
    ids=["bottleneck", "bottleneck-projection", "basic", "basic-projection"],
)
def test_launches_of_a_training_step(monkeypatch, block, convs):
    """Forward a launch a convolution and one for each BN with its ReLU; backward two a convolution.

    Running statistics take one more, unless a dispatch mode, such as the one that counts here, is
    to see PyTorch's ops. Beside them only vectors of channels and sums are touched, and for each
    convolution dz and its input are made once.
    """
    module = block().to(DEVICE, memory_format=torch.channels_last)
    module.impl = "triton"
    x = torch.randn(2, next(module.parameters()).size(1), 8, 8, device=DEVICE)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    monkeypatch.setattr(running_stats, "_updater", lambda *_: running_stats._by_triton)
    with Launches(monkeypatch) as launches:
        y = module(x)
        forward, launches.kernels = launches.kernels, []
        y.backward(torch.ones_like(y))
    large = Counter(name for name in forward if name not in VECTORS)
    norms = len(module.parts().norms) - 1
    assert large.pop("bn_act_fwd_kernel") == norms and large.pop("update_running_kernel") == 1
    assert large.total() == convs and large.keys() <= {CONV_STATS, "conv_affine_act_kernel"}
    backward = [name for name in launches.kernels if name not in VECTORS]
    assert backward.count("conv_dgrad_kernel") == backward.count("conv_wgrad_kernel") == convs
    assert backward.count("bn_act_bwd_reduce_kernel") == 1
    passes = Counter(backward)
    assert passes["bn_act_bwd_apply_kernel"] == convs
    assert passes["bn_act_fwd_kernel"] == norms - 1
    assert len(backward) == 3 * convs + norms, backward
    assert not any("conv" in call or "foreach" in call for call in launches.calls), launches.calls


@pytest.mark.slow
def test_launches_of_resnet50(monkeypatch):
    """One fold of all norms, two pads of the stem, 53 convolutions of which four projections run in
    the launch of another, two pools, the classifier.
    """
    net = resnet_fast.ResNet(
        resnet_fast.Bottleneck, [3, 4, 6, 3], num_classes=5, planes=8, impl="triton"
    )
    net.to(DEVICE, memory_format=torch.channels_last).eval()
    x = torch.randn(1, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad(), Launches(monkeypatch) as launches:
        net(x)
    assert len(launches.kernels) == 54 and launches.kernels.count("bn_fold_kernel") == 1
    names = {call.split(".")[1] for call in launches.calls}
    assert names <= {"addmm", "linear"} and len(launches.calls) <= 1


def test_net_equals_its_plain_twin():
    net = resnet_fast.ResNet(resnet_fast.BasicBlock, [1, 1], num_classes=5, planes=8, impl="triton")
    net.to(DEVICE, memory_format=torch.channels_last).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    plain = resnet_fast.unfuse(net)
    assert type(plain.avgpool) is nn.AdaptiveAvgPool2d
    x = torch.randn(2, 3, 40, 36, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert_close(net(x), plain(x), plain.double()(x.double()), "logits")


@pytest.mark.parametrize("block", [resnet_fast.Bottleneck, resnet_fast.PreActBasicBlock],
                         ids=["bottleneck", "pre-activation"])  # fmt: skip
def test_one_fold_for_the_whole_net(monkeypatch, block):
    """The norms of all blocks folded in one launch give the bits of a fold per block."""
    torch.manual_seed(0)
    net = resnet_fast.ResNet(block, [2, 1], num_classes=5, planes=8, impl="triton")
    net.to(DEVICE, memory_format=torch.channels_last).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 40, 36, device=DEVICE)
    folds = {}
    for whole in (True, False):
        with torch.inference_mode(), monkeypatch.context() as patch:
            if not whole:
                patch.setattr(resnet_fast.models.resnet, "run_inference", lambda *args: None)
            launches = Launches(patch)
            with launches:
                y = net(x)
        folds[whole] = launches.kernels.count("bn_fold_kernel"), y
    assert torch.equal(folds[True][1], folds[False][1])
    preactivation = block is resnet_fast.PreActBasicBlock
    assert folds[True][0] == 1 + preactivation  # the head is a chain of its own
    assert folds[False][0] == 1 + 3 + preactivation


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format],
                         ids=["channels_last", "nchw"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16],
                         ids=["fp64", "fp32", "fp16"])  # fmt: skip
@pytest.mark.parametrize(
    "layer",
    [Conv((2, 3, 31, 29), 24, (7, 7), (2, 2), (3, 3)),
     Conv((1, 1, 9, 14), 8, (3, 5), (1, 4), (0, 2)),
     Conv((2, 4, 8, 6), 17, (2, 3), (3, 2), (1, 1)), Conv((3, 2, 5, 9), 8, (5, 2), (1, 2), (2, 0)),
     Conv((2, 3, 9, 1), 8, (3, 3), (1, 2), (1, 1)), Conv((2, 3, 1, 1), 8, (1, 2), (1, 2), (0, 1))],
    ids=["stem", "grey", "four", "two", "column", "pixel"],
)  # fmt: skip
def test_few_channels_as_windows(monkeypatch, layer, dtype, layout):
    """Windows of several sizes against fp64, and one more launch for each operand."""
    args = CONVOLUTIONS["conv_bn_act:folded-bias"](Draw(dtype, layout, DEVICE), layer)
    with Launches(monkeypatch) as launches:
        kernels.conv_bn_act(*args)
    windows = layer.stride[1] * 4 * dtype.itemsize % 16 == 0 and dtype != torch.float64
    assert launches.kernels.count("pad_pixels_kernel") == 2 * windows
    judge("conv_bn_act", args, "windows", lambda: kernels.conv_bn_act(*args))


def compiling(*arguments):
    """Python with the compiler in place of the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )


def run_offline(*arguments):
    """`python -m bench kernels`, compiling."""
    return compiling("-m", "bench", "kernels", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_compile_without_a_gpu(arch, tmp_path):
    """The rule's configurations in bf16: nothing spills, convolutions use the tensor cores."""
    path = tmp_path / "kernels.json"
    done = run_offline("--quick", "--arch", arch, "--dtype", "bf16", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    convs = [row for row in found if row["kernel"].startswith("conv")]
    assert len(convs) >= 4 and len(found) >= 18
    assert {row["tensor_cores"] for row in convs} == {"HGMMA" if arch == "sm_90" else "HMMA"}
    assert all(row["local"] == 0 and row["registers"] > 8 for row in found)
    for row in convs:  # the stem has 3 channels, which are no 16 bytes
        assert ("TMA" in row["loads"]) == (arch == "sm_90" and "7x7" not in row["case"])


@pytest.mark.slow
def test_parts_in_processes_of_their_own():
    """Two dtypes at once give the rows of both."""
    options = ("--quick", "--arch", "sm_90", "--only", "bn_finalize", "--jobs", "2")
    done = run_offline(*options, "--dtype", "bf16,fp64")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("bn_finalize")]
    assert [line.split()[1] for line in rows] == ["bf16", "fp64"]


@pytest.mark.slow
def test_a_spill_is_found():
    """A tile far too large for its warps fails the command's verdict."""
    script = (
        "import torch\n"
        "from triton.runtime import driver\n"
        "from bench import kernels as bench\n"
        "from resnet_fast.kernels import conv_plan, launch\n"
        "target = launch.Target(90, 132, 'sm_90')\n"
        "driver.set_active(bench.OfflineDriver(90))\n"
        "conv_plan.CONFIGS = ((256, 128, 32, 4, 2),)\n"
        "layer = bench.LAYERS['3x3@56']\n"
        "_, start = next(bench.conv_cases('3x3', bench.LAYERS['3x3@28'], torch.bfloat16))\n"
        "asked = []\n"
        "with launch.compile_for(target, lambda *what: asked.append(what)):\n"
        "    start()\n"
        "kernel, _, *rest = asked[0]\n"
        "print(bench.compile_one(kernel, *rest, 'bf16', target).failure)\n"
    )
    done = compiling("-c", script)
    assert done.stdout.startswith("spills "), done.stdout + done.stderr


def test_helpers_read_no_global():
    """Else a kernel's key in Triton's cache depends on what was compiled before (Triton 3.6)."""
    script = (
        "import sys\n"
        "from triton.runtime import JITFunction\n"
        "from resnet_fast import kernels\n"
        "modules = [m for n, m in sys.modules.items() if n.startswith(kernels.__name__)]\n"
        "found = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]\n"
        "for f in found:\n"
        "    assert f.cache_key and not f.used_global_vals, (f, f.used_global_vals)\n"
        "print(len(found))\n"
    )
    done = compiling("-c", script)
    assert done.returncode == 0 and int(done.stdout) > 30, done.stdout + done.stderr


@pytest.mark.slow
def test_command_errors():
    assert "expected names like sm_80" in run_offline("--arch", "90").stderr
    assert "--dtype: expected some of" in run_offline("--dtype", "int8").stderr
    assert "--jobs: expected at least 1" in run_offline("--jobs", "0").stderr
    done = subprocess.run(
        [sys.executable, "-m", "bench", "kernels"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


def test_every_op_has_a_kernel():
    assert sorted(kernels.OPS) == sorted(ops.NAMES)
