"""conv_bn_act, bn_act and add_relu against PyTorch's own calls, in every dtype and layout."""

import pytest
import torch
import twins
from calls import CASES, OPS, Call, away_from_kink, same_dtype

import resnet_fast
from resnet_fast.layout import memory_format

pytestmark = pytest.mark.usefixtures("poisoned_memory")

STATISTICS = pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
CASE = pytest.mark.parametrize("case", CASES)
RESIDUAL_CASE = pytest.mark.parametrize("case", ["conv-bias-residual", "bn-residual", "add"])


@STATISTICS
@CASE
def test_matches_pytorch(impl, dtype, layout, case, training):
    """y, every gradient and the running statistics; y keeps x's format."""
    impl.need(dtype, *OPS)
    call = away_from_kink(case, layout, training, dtype)
    y = call.judge(impl, resnet_fast)["y"]
    assert y.is_contiguous(memory_format=layout)


@CASE
def test_inference(impl, dtype, layout, case):
    """Without gradients a frozen norm takes another path; it gives the same y and no graph."""
    impl.need(dtype, *OPS)
    call = Call(case, layout, dtype=dtype)
    with torch.no_grad():
        y = call.run(resnet_fast, *call.make(dtype, impl.device), impl.name)
        exact = call.run(twins, *call.make(torch.float64))
        same = call.run(twins, *call.make(same_dtype(dtype)))
    assert y.grad_fn is None and y.is_contiguous(memory_format=layout)
    twins.judge({"y": y}, {"y": same}, {"y": exact})


VIEWS = {  # gaps, overlaps and orders that are dense in neither format: x → view of x's shape
    "sliced-channels": lambda x: torch.cat([x, x], 1)[:, : x.size(1)],
    "sliced-pixels": lambda x: torch.cat([x, x], 3)[..., ::2].copy_(x),
    "sliced-nhwc": lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[
        :, : x.size(1)
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch-last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("case", ["conv-bias-residual", "bn-residual", "add"])
def test_views(impl, case, view):
    """x, residual and dy with gaps or odd strides: what PyTorch computes from the same values."""
    impl.need(torch.float32, *OPS)
    call = away_from_kink(case, training=case != "add")

    def strided(module, dtype, make, name=None):
        leaves, running = call.make(dtype)
        views = {**leaves, "x": make(leaves["x"]), "residual": make(leaves["residual"])}
        dy = make(call.dy.to(dtype))
        return twins.step(lambda: call.run(module, views, running, name), leaves, dy, running)

    exact = call.step(twins, torch.float64)
    same = call.step(twins, torch.float32)
    twins.judge(strided(resnet_fast, torch.float32, VIEWS[view], impl.name), same, exact)


@CASE
def test_expanded_inputs(impl, case):
    """x of stride 0 over the batch, and the gradient of it."""
    impl.need(torch.float32, *OPS)

    def one_image(call):
        call.tensors["x"] = call.tensors["x"][:1]
        size = CASES[case][1]["x"][0]
        call.run = lambda module, leaves, *rest: Call.run(
            call, module, {**leaves, "x": leaves["x"].expand(size, -1, -1, -1)}, *rest
        )

    call = away_from_kink(case, change=one_image)
    call.judge(impl, resnet_fast)


@STATISTICS
@CASE
def test_expanded_gradient(impl, case, training):
    """y.sum().backward() hands over a dy of stride 0."""
    impl.need(torch.float32, *OPS)
    call = away_from_kink(case, training=training)
    call.tensors = {name: value + 0.25 for name, value in call.tensors.items()}
    found = []
    for module, dtype, name in (
        (resnet_fast, torch.float32, impl.name),
        (twins, torch.float32, None),
        (twins, torch.float64, None),
    ):
        leaves, running = call.make(dtype)
        weights = torch.linspace(0.5, 2.0, leaves["x"].size(0), dtype=dtype).view(-1, 1, 1, 1)
        y = call.run(module, leaves, running, name)
        y.backward(weights.expand(y.shape))
        found.append({f"d{key}": leaf.grad for key, leaf in leaves.items()})
    twins.judge(*found)


@RESIDUAL_CASE
def test_aliased_residual(impl, case, layout):
    """The residual is x itself: both gradients add up."""
    impl.need(torch.float32, *OPS)

    def alias(call):
        if "weight" in call.tensors:
            call.tensors["weight"] = torch.randn(8, 8, 1, 1)
            call.tensors["bias"] = torch.randn(8)
            for name in ("bn_weight", "bn_bias"):
                call.tensors[name] = call.tensors[name][:8]
            call.running = {name: value[:8] for name, value in call.running.items()}
        del call.tensors["residual"]
        call.run = lambda module, leaves, *rest: Call.run(
            call, module, {**leaves, "residual": leaves["x"]}, *rest
        )

    call = away_from_kink(case, layout, training=True, change=alias)
    call.judge(impl, resnet_fast)


@STATISTICS
@CASE
def test_empty_batch(impl, layout, case, training):
    """No images: an empty y, zero gradients, and running statistics as PyTorch leaves them."""
    impl.need(torch.float32, *OPS)
    call = Call(case, layout, training)
    for name in ("x", "residual"):
        if name in call.tensors:
            call.tensors[name] = call.tensors[name][:0]
    expected = call.step(twins, torch.float32)
    actual = call.step(resnet_fast, torch.float32, impl.name, impl.device)
    assert actual["y"].shape == expected["y"].shape and actual["y"].numel() == 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("case", ["conv-bias-residual", "bn"])
def test_one_value_per_channel(impl, case):
    """The error PyTorch raises, in training alone."""
    call = Call(case, training=True)
    for name in ("x", "residual"):
        if name in call.tensors:
            call.tensors[name] = call.tensors[name][:1, :, :1, :1]
    for module in (twins, resnet_fast):
        with pytest.raises(ValueError, match=r"xpected more than 1 value per channel when train"):
            call.run(module, *call.make(torch.float32), impl.name)
    call.options["training"] = False
    call.judge(impl, resnet_fast)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_momentum(impl, momentum):
    impl.need(torch.float32, *OPS)
    call = away_from_kink("conv-bias-residual", training=True)
    call.options["momentum"] = momentum
    call.judge(impl, resnet_fast)


@CASE
def test_without_affine_or_running_statistics(impl, case):
    """bn_weight, bn_bias None are 1 and 0; running statistics None: the batch's, always."""
    if case == "add":
        pytest.skip("add_relu has no normalization")
    impl.need(torch.float32, *OPS)

    def strip(call):
        for name in ("bn_weight", "bn_bias"):
            del call.tensors[name]
        call.running = {}
        fixed = dict.fromkeys(("bn_weight", "bn_bias", "running_mean", "running_var"))
        call.run = lambda module, leaves, running, impl=None: Call.run(
            call, module, {**leaves, **fixed}, running, impl
        )

    call = away_from_kink(case, training=True, change=strip)
    call.judge(impl, resnet_fast)


def test_half_precision_parameters(impl):
    """A model in bf16 throughout: parameters and running statistics are bf16 too."""
    impl.need(torch.bfloat16, *OPS)
    call = Call("conv", training=True)
    leaves, running = call.make(torch.bfloat16)
    leaves = {name: value.detach().bfloat16().requires_grad_() for name, value in leaves.items()}
    running = {name: value.bfloat16() for name, value in running.items()}
    y = call.run(resnet_fast, leaves, running, impl.name)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(leaf.grad.dtype == torch.bfloat16 for leaf in leaves.values())
    assert all(value.dtype == torch.bfloat16 for value in running.values())


def test_ambiguous_formats_follow_the_filter():
    """One channel or one pixel fits both formats: y then has the filter's, as PyTorch's does."""
    x, w = torch.randn(2, 1, 5, 5), torch.randn(4, 1, 3, 3)
    nothing = (None,) * 4
    for layout in (torch.contiguous_format, torch.channels_last):
        filters = torch.randn(4, 3, 3, 3).to(memory_format=layout)
        image = torch.randn(2, 3, 5, 5).to(memory_format=layout)
        y = resnet_fast.conv_bn_act(image, filters, *nothing, training=True)
        assert memory_format(y) is layout
    assert memory_format(resnet_fast.conv_bn_act(x, w, *nothing)) is torch.contiguous_format
