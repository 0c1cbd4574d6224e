"""Wrong input raises an error that names the argument and what was expected."""

import math
import re

import numpy as np
import pytest
import torch
import twins
from torch import nn

import resnet_fast
from resnet_fast.dispatch import backends
from resnet_fast.functional import add_relu, bn_act, conv_bn_act, global_avg_pool
from resnet_fast.spec.chain import Chain, Conv, Norm, Pool

X = torch.randn(2, 4, 6, 6)
W = torch.randn(8, 4, 3, 3)
V4, V8 = torch.ones(4), torch.ones(8)
META = torch.device("meta")


def conv(x=X, weight=W, bn_weight=V8, bn_bias=V8, mean=V8, var=V8, **options):
    return conv_bn_act(x, weight, bn_weight, bn_bias, mean, var, **{"padding": 1, **options})


def norm(x=X, bn_weight=V4, bn_bias=V4, mean=V4, var=V4, **options):
    return bn_act(x, bn_weight, bn_bias, mean, var, **options)


CALLS = {  # name → call, start of the message, what the message says was expected and given
    "x-dimensions": (lambda: conv(X[0]), "x: expected 4 dimensions", "(4, 6, 6)"),
    "x-integer": (lambda: conv(X.int()), "x: expected one of float32", "int32"),
    "x-complex": (lambda: norm(X.cfloat()), "x: expected one of float32", "complex64"),
    "weight-dimensions": (lambda: conv(weight=W[0]), "weight: expected 4 dimensions", "(4, 3, 3)"),
    "weight-channels": (lambda: conv(weight=W[:, :3]), "weight: expected 4 input", "(8, 3, 3, 3)"),
    "weight-dtype": (lambda: conv(weight=W.double()), "weight: expected x's dtype float32", "64"),
    "weight-narrow": (lambda: conv(weight=W.bfloat16()), "weight: expected x's dtype", "bfloat16"),
    "weight-double-x": (lambda: conv(X.double()), "weight: expected x's dtype float64", "float32"),
    "weight-device": (lambda: conv(weight=W.to(META)), "weight: expected x's device cpu", "meta"),
    "bias-shape": (lambda: conv(bias=V4), "bias: expected shape (8,)", "(4,)"),
    "bias-device": (lambda: conv(bias=V8.to(META)), "bias: expected x's device cpu", "meta"),
    "bn_weight-shape": (lambda: conv(bn_weight=V4), "bn_weight: expected shape (8,)", "(4,)"),
    "bn_weight-dtype": (lambda: conv(bn_weight=V8.half()), "bn_weight: expected float32", "16"),
    "bn_bias-shape": (lambda: norm(bn_bias=V8), "bn_bias: expected shape (4,)", "(8,)"),
    "bn_bias-device": (lambda: norm(bn_bias=V4.to(META)), "bn_bias: expected x's device", "meta"),
    "running_mean-shape": (lambda: norm(mean=V8), "running_mean: expected shape (4,)", "(8,)"),
    "running_var-shape": (lambda: norm(var=V8), "running_var: expected shape (4,)", "(8,)"),
    "running_var-double": (lambda: norm(var=V4.double()), "running_var: expected float32", "64"),
    "running_var-missing": (lambda: norm(var=None), "running_var: expected a tensor of 4", ""),
    "running_mean-missing": (lambda: norm(mean=None), "running_mean", ""),
    "running_mean-missing-training": (
        lambda: norm(mean=None, training=True), "running_mean, running_var: expected both", "",
    ),
    "residual-shape": (
        lambda: conv(residual=X), "residual: expected the output's shape (2, 8, 6, 6)", "(2, 4, 6",
    ),
    "residual-broadcast": (
        lambda: add_relu(X, X[:1]), "residual: expected the output's shape (2, 4, 6, 6)", "(1, 4",
    ),
    "residual-device": (lambda: norm(residual=X.to(META)), "residual: expected x's device", "meta"),
    "residual-none": (lambda: add_relu(X, None), "residual: expected a torch.Tensor", "None"),
    "stride-zero": (lambda: conv(stride=0), "stride: expected at least 1", "(0, 0)"),
    "stride-three": (lambda: conv(stride=(1, 2, 3)), "stride: expected an integer or two", "(1, 2"),
    "stride-float": (lambda: conv(stride=1.5), "stride: expected an integer or two", "1.5"),
    "padding-negative": (lambda: conv(padding=-1), "padding: expected at least 0", "(-1, -1)"),
    "padding-same": (lambda: conv(padding="same"), "padding: expected an integer or two", "same"),
    "dilation-zero": (lambda: conv(dilation=(1, 0)), "dilation: expected at least 1", "(1, 0)"),
    "groups-divisor": (lambda: conv(groups=3), "groups: expected a divisor of 8 filters", "3"),
    "groups-zero": (lambda: conv(groups=0), "groups: expected a divisor of 8 filters", "0"),
    "kernel-too-large": (lambda: conv(X[:, :, :1, :1], padding=0), "x: 1x1 pixels are too", "3x3"),
    "impl-unknown": (lambda: conv(impl="cuda"), "impl: expected one of 'auto'", "cuda"),
    "impl-none": (lambda: add_relu(X, X, impl=None), "impl: expected one of 'auto'", "None"),
    "one-value": (
        lambda: norm(X[:1, :, :1, :1], training=True), "x: expected more than 1 value per channel",
        "(1, 4, 1, 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_call(name):
    call, start, says = CALLS[name]
    with pytest.raises(ValueError, match="^" + re.escape(start)) as error:
        call()
    assert says in str(error.value)


GOOD = {  # a call that runs, by names of arguments
    conv_bn_act: {
        "x": X, "weight": W, "bn_weight": V8, "bn_bias": V8, "running_mean": V8, "running_var": V8,
        "bias": V8, "residual": torch.zeros(2, 8, 6, 6), "stride": 1, "padding": 1, "dilation": 1,
        "groups": 1, "training": False, "momentum": 0.1, "eps": 1e-5, "relu": True, "impl": "auto",
    },
    bn_act: {
        "x": X, "bn_weight": V4, "bn_bias": V4, "running_mean": V4, "running_var": V4,
        "residual": X, "training": False, "momentum": 0.1, "eps": 1e-5, "relu": True,
        "impl": "auto",
    },
    add_relu: {"x": X, "residual": X, "impl": "auto"},
    global_avg_pool: {"x": X, "impl": "auto"},
}  # fmt: skip
TENSOR = [5, 1.5, True, "x", [1.0], np.ones(4, np.float32), X.to_sparse(), nn.ReLU(), V4.int()]
WHOLE = [None, 1.5, True, "1", (1, 1, 1), math.nan, np.ones(1), X, -1]
NUMBER = [None, True, "0.1", (0.1,), math.nan, math.inf, np.ones(1), X]
FLAG = [None, 0, 1.0, "False", (), np.ones(1), X]
WRONG = {  # argument → values that it must not have
    "x": [None, *TENSOR],
    "weight": [None, *TENSOR],
    **dict.fromkeys(("stride", "padding", "dilation", "groups"), WHOLE),
    **dict.fromkeys(("training", "relu"), FLAG),
    "momentum": NUMBER,
    "eps": [-1, -1e-5, *NUMBER],
    "impl": [None, 1, True, "cuda", ("auto",), np.ones(1), X],
}
TABLE = [
    pytest.param(function, name, value, id=f"{function.__name__}-{name}-{i}")
    for function, arguments in GOOD.items()
    for name in arguments
    for i, value in enumerate(WRONG.get(name, TENSOR))
    if not (name == "residual" and isinstance(value, torch.Tensor) and value.shape == X.shape)
]


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize(("function", "name", "value"), TABLE)
def test_every_wrong_argument_is_named(function, name, value, gradients):
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"^{name}: expected"):
        function(**{**GOOD[function], name: value})


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__name__)
def test_right_arguments_pass(function):
    """Also by the compiler, without a break in the graph."""
    torch.compiler.reset()
    run = torch.compile(function, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(**GOOD[function]), function(**GOOD[function]))


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("eps", 0, 0.0),
        ("eps", np.float32(0.5), 0.5),
        ("momentum", np.float64(0.5), 0.5),
        ("stride", np.int64(1), 1),
        ("stride", [1], 1),
        ("padding", [np.int32(1), 1], 1),
        ("groups", np.int64(1), 1),
    ],
)
def test_what_pytorch_takes_is_taken(name, value, same):
    actual, expected = (
        conv_bn_act(**{**GOOD[conv_bn_act], name: given}) for given in (value, same)
    )
    assert torch.equal(actual, expected)


BUILDS = {  # constructions that do not fit
    "identity-stride": (
        lambda: resnet_fast.BasicBlock(8, 8, 2, shortcut="identity"), "shortcut: 'identity' needs",
    ),
    "identity-channels": (
        lambda: resnet_fast.Bottleneck(8, 8, shortcut="identity"), "shortcut: 'identity' needs",
    ),
    "zero-pad-fewer": (
        lambda: resnet_fast.BasicBlock(8, 4, shortcut="zero_pad"), "shortcut: 'zero_pad' cannot",
    ),
    "shortcut-unknown": (
        lambda: resnet_fast.BasicBlock(8, 8, shortcut="skip"), "shortcut: expected one of",
    ),
    "downsample-kind": (
        lambda: resnet_fast.BasicBlock(8, 8, 2, nn.Conv2d(8, 8, 1, 2)), "downsample: expected",
    ),
    "downsample-preact": (
        lambda: resnet_fast.PreActBasicBlock(8, 8, 2, nn.Sequential(nn.AvgPool2d(2))),
        "downsample: expected",
    ),
    "downsample-identity": (
        lambda: resnet_fast.BasicBlock(8, 8, 1, nn.Conv2d(8, 8, 1), shortcut="none"),
        "downsample: needs",
    ),
    "norm-layer": (
        lambda: resnet_fast.BasicBlock(8, 8, norm_layer=lambda c: nn.GroupNorm(2, c)),
        "norm_layer: expected",
    ),
    "base-width": (lambda: resnet_fast.BasicBlock(8, 8, base_width=32), "base_width: expected 64"),
    "impl": (lambda: resnet_fast.ConvBNAct2d(8, 8, 3, impl="fast"), "impl: expected one of"),
    "chain-norms": (lambda: Chain((Conv(),), (None,)), "norms: expected 2 entries"),
    "chain-shortcut": (lambda: Chain((Conv(),), (None, Norm()), shortcut="x"), "shortcut: expect"),
    "chain-projection": (
        lambda: Chain((Conv(),), (None, Norm()), shortcut="projection"), "projection: expected",
    ),
    "chain-projection-norm": (
        lambda: Chain((Conv(),), (None, Norm()), projection_norm=Norm()), "projection_norm: expect",
    ),
    "norm-eps": (lambda: Norm(eps=-1e-5), "eps: expected a finite number of at least 0, got -1e"),
    "keep-activations": (
        lambda: resnet_fast.Bottleneck(64, 16, keep_activations=1),
        "keep_activations: expected True, False or 'auto', got 1",
    ),
    "keep-activations-model": (
        lambda: resnet_fast.ResNet(resnet_fast.Bottleneck, [1], keep_activations="always"),
        "keep_activations: expected True, False or 'auto', got 'always'",
    ),
    "norm-batch-stats": (lambda: Norm(batch_stats=1), "batch_stats: expected True or False"),
    "pool-kernel": (lambda: Pool(3, (2, 2)), "kernel: expected two integers, got 3"),
    "pool-stride": (lambda: Pool((3, 3), (0, 2)), "stride: expected at least 1, got (0, 2)"),
    "conv-stride": (lambda: shape_of(stride=2), "stride: expected two integers, got 2"),
    "conv-padding": (lambda: shape_of(padding="same"), "padding: expected two integers"),
    "conv-groups": (lambda: shape_of(groups="1"), "groups: expected a divisor of 8 filters, got"),
    "norm-group": (lambda: Norm(batch_stats=False, group=object()), "group: expected None"),
    "chain-projection-alone": (
        lambda: Chain((), (Norm(),), shortcut="projection", projection=Conv()),
        "projection: expected None",
    ),
}  # fmt: skip


def shape_of(**geometry):
    return Conv(**geometry).output_shape(X.shape, W.shape)


@pytest.mark.parametrize("name", BUILDS)
def test_construction(name):
    build, start = BUILDS[name]
    with pytest.raises(ValueError, match="^" + re.escape(start)):
        build()


def test_input_of_other_channels():
    with pytest.raises(ValueError, match=r"weight: expected 5 input channels"):
        resnet_fast.BasicBlock(4, 4)(torch.randn(2, 5, 6, 6))


def test_double_input_beside_fp32_parameters():
    module = resnet_fast.BasicBlock(4, 4)
    with pytest.raises(ValueError, match=r"weight: expected x's dtype float64"):
        module(X.double())


@pytest.mark.parametrize("change", [{"padding_mode": "reflect"}, {"padding": "same"}], ids=str)
def test_padding_is_not_ignored(change):
    """A child convolution this package cannot run is refused or run right, never as another."""
    module = resnet_fast.BasicBlock(4, 4, impl="reference").eval()
    module.conv1 = nn.Conv2d(4, 4, 3, bias=False, **{"padding": 1, **change})
    try:
        y = module(X)
    except ValueError as error:
        assert "padding" in str(error)
    else:
        torch.testing.assert_close(y, twins.plain(module)(X))


@pytest.mark.parametrize("name", ["native", "triton"])
def test_explicit_impl_says_why(name):
    """A choice that cannot be met raises with the backend's reason; auto goes on."""
    for dtype in (torch.float16, torch.float32):
        reason = backends.refusal(name, "bn_act", "cpu", dtype)
        if reason is None:
            continue
        x, vector = X.to(dtype), V4
        with pytest.raises(RuntimeError, match=re.escape(f"impl={name!r} cannot run")) as error:
            norm(x, vector, vector, vector, vector, impl=name)
        assert reason in str(error.value)
        norm(x, vector, vector, vector, vector, impl="auto")


def test_native_says_which_devices_it_has():
    if backends.native_module()[0] is None:
        pytest.skip(backends.native_module()[1])
    reason = backends.refusal("native", "bn_act", "cuda", torch.float32)
    assert reason is None or "built without CUDA" in reason
    assert "not on meta" in backends.refusal("native", "bn_act", "meta", torch.float32)
