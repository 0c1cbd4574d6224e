"""The fused modules against their plain twins: same children, same results, same side effects."""

import copy
import functools
import pickle

import pytest
import torch
import twins
from calls import OPS, same_dtype
from torch import nn

from resnet_fast import (
    BasicBlock,
    Bottleneck,
    ConvBNAct2d,
    PreActBasicBlock,
    PreActBottleneck,
    blocks,
    fuse,
    modules,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODULES = {  # name → a builder, input channels
    "conv": (functools.partial(ConvBNAct2d, 3, 24, 7, 2), 3),
    "conv-linear": (functools.partial(ConvBNAct2d, 8, 12, 3, dilation=2, groups=4, relu=False), 8),
    "basic": (functools.partial(BasicBlock, 16, 16), 16),
    "basic-projection": (functools.partial(BasicBlock, 8, 24, 2), 8),
    "basic-zero-pad": (functools.partial(BasicBlock, 8, 16, 2, shortcut="zero_pad"), 8),
    "basic-plain": (functools.partial(BasicBlock, 8, 16, 2, shortcut="none"), 8),
    "bottleneck": (functools.partial(Bottleneck, 16, 4), 16),
    "bottleneck-projection": (functools.partial(Bottleneck, 12, 6, 2), 12),
    "bottleneck-grouped": (functools.partial(Bottleneck, 32, 8, groups=4, base_width=16), 32),
    "bottleneck-dilated": (functools.partial(Bottleneck, 16, 4, dilation=2), 16),
    "bottleneck-zero-pad": (functools.partial(Bottleneck, 8, 4, 2, shortcut="zero_pad"), 8),
    "bottleneck-plain": (functools.partial(Bottleneck, 8, 3, shortcut="none"), 8),
    "preact-basic": (functools.partial(PreActBasicBlock, 16, 16), 16),
    "preact-basic-projection": (functools.partial(PreActBasicBlock, 8, 24, 2), 8),
    "preact-basic-zero-pad": (
        functools.partial(PreActBasicBlock, 8, 16, 2, shortcut="zero_pad"),
        8,
    ),
    "preact-bottleneck": (functools.partial(PreActBottleneck, 16, 4), 16),
    "preact-bottleneck-projection": (functools.partial(PreActBottleneck, 8, 4, 2), 8),
    "preact-bottleneck-plain": (functools.partial(PreActBottleneck, 8, 3, shortcut="none"), 8),
}
MODULE = pytest.mark.parametrize("name", MODULES)
FORMATS = (torch.contiguous_format, torch.channels_last)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BLOCKS = pytest.mark.parametrize(
    "name", ["conv", "basic", "bottleneck-projection", "preact-basic-projection"]
)


def build(name, impl, training=True, dtype=torch.float32, layout=None, size=(3, 5, 7)):
    """A module and x of `dtype`, its affine parameters and statistics not trivial."""
    make, channels = MODULES[name]
    module, layout = make(impl=impl.name), layout or torch.contiguous_format
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias)
            nn.init.normal_(child.running_mean, 0.0, 0.3)
            nn.init.uniform_(child.running_var, 0.5, 1.5)
    n, h, w = size
    x = torch.randn(n, channels, h, w).to(dtype)
    module = module.train(training).to(impl.device, dtype, memory_format=layout)
    return module, x.to(impl.device).contiguous(memory_format=layout)


def compare(module, x, dy, **inputs):
    """A step of a module, of its twin in the same dtype and of its twin in fp64, judged."""
    plain = twins.plain(module)
    exact = copy.deepcopy(plain).double()
    wide = {name: value.double() for name, value in inputs.items()}
    exact = twins.module_step(exact, x.double(), dy.double(), **wide)
    narrow = same_dtype(x.dtype)
    same = twins.module_step(
        plain.to(narrow), x.to(narrow), dy.to(narrow),
        **{name: value.to(narrow) for name, value in inputs.items()},
    )  # fmt: skip
    actual = twins.module_step(module, x, dy, **inputs)
    twins.judge(actual, same, exact)
    return actual


def gradient_like(module, x):
    """A dy for module(x)."""
    with torch.no_grad():
        y = copy.deepcopy(twins.plain(module))(x)
    return torch.randn(y.shape).to(y)


@MODES
@MODULE
@pytest.mark.leave_out(
    cases=lambda case: (
        case.impl.interpreted and case.dtype == torch.float64 and case.name != "basic"
    )
)
def test_matches_plain(impl, dtype, layout, name, training):
    """y, dx, every parameter's gradient and every buffer, the whole module in `dtype`."""
    impl.need(dtype, *OPS)
    module, x = twins.settled(lambda: build(name, impl, training, dtype, layout), dtype)
    y = compare(module, x, gradient_like(module, x))["y"]
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)


@MODES
@pytest.mark.parametrize("of_x", FORMATS)
@pytest.mark.parametrize("of_model", FORMATS)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 32])
def test_memory_format_of_the_result(impl, channels, kernel_size, of_model, of_x, training):
    """Plain PyTorch's: channels_last where the model or x is; one channel too, by its strides."""
    impl.need(torch.float32, *OPS)
    plain = blocks.ConvBNAct2d(channels, 32, kernel_size).to(impl.device, memory_format=of_model)
    x = torch.randn(2, channels, 8, 8).to(impl.device, memory_format=of_x)
    fused = fuse(copy.deepcopy(plain), impl=impl.name).train(training)
    with torch.set_grad_enabled(training):
        expected, y = plain.train(training)(x), fused(x)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)



@pytest.mark.parametrize(
    ("training", "keep"),
    [(True, False), (True, True), (False, False)],
    ids=["train", "train-keep", "eval"],
)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@MODULE
def test_autocast(impl, layout, name, narrow, training, keep):
    """fp32 parameters beside 16-bit activations: results and dtypes of the twin under autocast.

    A block's x is 16 bits wide, as it comes from the layer before; a first convolution's is fp32.
    """
    impl.need(narrow, *OPS)
    first = name.startswith("conv")

    def draw():
        module, x = build(name, impl, training, layout=layout)
        return module, x.to(narrow).to(torch.float32 if first else narrow)

    module, x = twins.settled(draw, narrow)
    module.keep_activations = keep

    def run(module, x, dy):
        leaf = x.clone().requires_grad_()

        def forward():
            with torch.autocast(impl.device, narrow):
                return module(leaf)

        leaves = {"x": leaf, **dict(module.named_parameters())}
        return twins.step(forward, leaves, dy.to(narrow), dict(module.named_buffers()))

    dy = gradient_like(module, x.float()).to(narrow).float()
    plain = twins.plain(module)
    exact = copy.deepcopy(plain).double()
    exact = twins.module_step(exact, x.double(), dy.double())
    actual = run(module, x, dy)
    twins.judge(actual, run(plain, x, dy), exact, narrow)
    assert actual["y"].dtype == narrow and actual["y"].is_contiguous(memory_format=layout)


@MODES
@MODULE
def test_no_grad(impl, name, training):
    """Without a graph: the same y, and in training the same running statistics."""
    impl.need(torch.float32, *OPS)
    module, x = build(name, impl, training)
    plain = twins.plain(module)
    exact = copy.deepcopy(plain).double()
    found = []
    for each, value in ((module, x), (plain, x), (exact, x.double())):
        with torch.no_grad():
            found.append({"y": each(value), **dict(each.named_buffers())})
    twins.judge(*found)


def test_conv_with_residual(impl, layout):
    impl.need(torch.float32, *OPS)
    module = ConvBNAct2d(4, 8, 3, impl=impl.name).to(memory_format=layout)
    x = torch.randn(2, 4, 7, 5).contiguous(memory_format=layout)
    residual = torch.randn(2, 8, 7, 5).contiguous(memory_format=layout)
    compare(module, x, torch.randn(2, 8, 7, 5), residual=residual)


def freeze_one(module):
    norm_of(module, 0).eval()


def freeze_last(module):
    norm_of(module, -1).eval().requires_grad_(False)


def freeze_all(module):
    for norm in norms_of(module):
        norm.eval()


def cumulative(module):
    for norm in norms_of(module):
        norm.momentum = None


def untracked(module):
    for norm in norms_of(module):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def tracking_off(module):
    """Statistics that are there but not followed in training."""
    for norm in norms_of(module):
        norm.track_running_stats = False


def not_affine(module):
    for norm in norms_of(module):
        norm.weight = norm.bias = None


def other_eps(module):
    for i, norm in enumerate(norms_of(module)):
        norm.eps, norm.momentum = 10.0 ** (i - 5), 0.3


def with_bias(module):
    """Biases on every convolution that a normalization follows."""
    parts = module.parts()
    for i, conv in enumerate(parts.convs):
        if parts.norms[i + 1] is not None:
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
    if parts.projection_norm is not None:
        parts.projection.bias = nn.Parameter(torch.randn(parts.projection.out_channels))


def frozen_with_bias(module):
    with_bias(module)
    freeze_all(module)


def norms_of(module):
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def norm_of(module, i):
    return norms_of(module)[i]


CHANGES = [freeze_one, freeze_last, freeze_all, cumulative, untracked, tracking_off,
           not_affine, other_eps, with_bias, frozen_with_bias]  # fmt: skip


@MODES
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@BLOCKS
@pytest.mark.leave_out(cases=lambda case: case.name != "conv" and case.impl.interpreted)
def test_changed_children(impl, name, change, training):
    """Children keep their own settings: three steps that add up in statistics, then inference."""
    impl.need(torch.float64, *OPS)
    module, _ = build(name, impl, training, torch.float64)
    change(module.float())
    module.double()
    plain = twins.plain(module)
    for _ in range(3):
        x = torch.randn(2, MODULES[name][1], 6, 5, dtype=torch.float64)
        expected, actual = twins.module_step(plain, x), twins.module_step(module, x)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            if value is None:
                assert actual[key] is None, key
            else:
                torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


@MODULE
def test_same_children(name):
    """State dicts load strictly both ways, and copies and pickles keep the options."""
    make, _ = MODULES[name]
    module = make(impl="reference", keep_activations=True)
    plain = twins.plain(module)
    assert list(plain.state_dict()) == list(module.state_dict())
    plain.load_state_dict(make().state_dict(), strict=True)
    module.load_state_dict(plain.state_dict(), strict=True)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert clone.impl == "reference" and clone.keep_activations
    assert "impl='reference'" in repr(module)


@pytest.mark.parametrize("downsample", ["own", "given"])
def test_given_downsample(impl, downsample):
    """torchvision's way of passing the projection in."""
    projection = None
    if downsample == "given":
        projection = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    module = BasicBlock(8, 16, 2, projection, impl=impl.name)
    x = torch.randn(2, 8, 7, 7)
    compare(module, x, torch.randn(2, 16, 4, 4))


def test_zero_pad(impl):
    """Option A: every second pixel of x, and zeros in the new channels at the end."""
    module = BasicBlock(3, 5, 2, shortcut="zero_pad", impl=impl.name).eval()
    nn.init.zeros_(module.bn2.weight)
    x = torch.randn(2, 3, 7, 6)
    y = module(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2].relu()) and not y[:, 3:].any()


@BLOCKS
def test_one_value_per_channel(impl, name):
    module, _ = build(name, impl)
    x = torch.randn(1, MODULES[name][1], 1, 1)
    for each in (module, twins.plain(module)):
        with pytest.raises(ValueError, match="xpected more than 1 value per channel when train"):
            each(x)
    assert module.eval()(x).shape == twins.plain(module)(x).shape


@MODES
@BLOCKS
def test_empty_batch(impl, layout, name, training):
    impl.need(torch.float32, *OPS)
    module, x = build(name, impl, training, layout=layout, size=(0, 7, 5))
    plain = twins.plain(module)
    expected, actual = twins.module_step(plain, x), twins.module_step(module, x)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("training", [True, False])
def test_a_sliced_pixel_and_a_residual(impl, training):
    """x is dense in no format and its copy in both: the residual goes with what results."""
    impl.need(torch.float32, *OPS)
    module = ConvBNAct2d(33, 2, 6, 2, 7, impl=impl.name).to(impl.device).train(training)
    x = torch.randn(2, 35, 2, 3, device=impl.device)
    x = x.contiguous(memory_format=torch.channels_last)[:, 1:-1, 1:, 2:]
    plain = twins.plain(module)
    residual = torch.randn_like(plain(x))
    torch.testing.assert_close(module(x, residual), plain(x, residual), rtol=1e-4, atol=1e-5)


def test_one_norm_in_two_places(impl):
    """Its statistics follow both batches in turn: a launch of several would have them race."""
    impl.need(torch.float32, *OPS)
    module = BasicBlock(8, 8, impl=impl.name)
    module.bn2 = module.bn1
    module.to(impl.device, memory_format=torch.channels_last)
    plain = twins.plain(module)
    x = torch.randn(3, 8, 5, 4, device=impl.device).to(memory_format=torch.channels_last)
    module(x)
    plain(x)
    assert module.bn1.num_batches_tracked == 2
    torch.testing.assert_close(module.bn1.running_mean, plain.bn1.running_mean)
    torch.testing.assert_close(module.bn1.running_var, plain.bn1.running_var)


def test_a_chain_is_made_once():
    """Of equal children; a bad value of a child is an error all the same."""
    block = Bottleneck(16, 8, 2, impl="reference")

    def chain():
        return modules._chain_of(block.parts(), block.shortcut, block.impl, False)[0]

    first = chain()
    assert chain() is first
    block.bn1.eps = 1e-3
    assert chain() != first and chain().norms[1].eps == 1e-3
    block.bn1.eps = 1e-5
    block.bn2.eval()
    assert chain() != first and not chain().norms[2].batch_stats
    block.bn2.train()
    assert chain() is first
    for eps in ([1e-5], "1e-5", True):
        block.bn1.eps = eps
        with pytest.raises(ValueError, match="eps: expected a finite number"):
            block(torch.randn(2, 16, 6, 5))
