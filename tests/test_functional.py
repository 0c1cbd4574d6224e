"""conv_bn_act, bn_act and add_relu against PyTorch's own calls, in every dtype and layout."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import twins
from calls import CASES, OPS, Call, away_from_kink, same_dtype
from chain_cases import CHAINS, draw
from torch import fx, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

import resnet_fast
from resnet_fast import functional
from resnet_fast.functional import global_avg_pool, run_chain
from resnet_fast.spec.chain import Chain, Norm, NormParams, Running, Tensors
from resnet_fast.spec.layers import promotes
from resnet_fast.spec.layout import memory_format

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


NARROW = torch.bfloat16
MIXED = {  # name → a block, and dtypes of x and of a residual
    "basic": (lambda **o: resnet_fast.BasicBlock(8, 8, **o), torch.float32, None),
    "basic-fp16": (lambda **o: resnet_fast.BasicBlock(8, 8, **o), torch.float16, None),
    "basic-projection": (lambda **o: resnet_fast.BasicBlock(8, 16, 2, **o), torch.float32, None),
    "basic-zero-pad": (
        lambda **o: resnet_fast.BasicBlock(8, 16, 2, shortcut="zero_pad", **o), torch.float32, None,
    ),
    "preact": (lambda **o: resnet_fast.PreActBasicBlock(8, 8, **o), torch.float32, None),
    "preact-bottleneck": (lambda **o: resnet_fast.PreActBottleneck(8, 2, **o), torch.float32, None),
    "preact-projection": (
        lambda **o: resnet_fast.PreActBottleneck(8, 4, 2, **o), torch.float32, None,
    ),
    "conv-residual": (lambda **o: resnet_fast.ConvBNAct2d(8, 8, 3, **o), NARROW, torch.float32),
    "conv-residual-wide-x": (
        lambda **o: resnet_fast.ConvBNAct2d(8, 8, 3, **o), torch.float32, torch.float32,
    ),
    "conv-residual-narrow": (
        lambda **o: resnet_fast.ConvBNAct2d(8, 8, 3, **o), torch.float32, NARROW,
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MIXED)
def test_promotion_under_autocast(impl, name, training):
    """A norm before the convolutions and the addition take x as it is, as in plain PyTorch.

    The dtype of y is plain's, and y, gradients and running statistics are as exact.
    """
    impl.need(NARROW, *OPS)
    build, dtype, residual_dtype = MIXED[name]

    def make():
        module = build(impl=impl.name).to(memory_format=torch.channels_last)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)
                norm.momentum = None if training else 0.1
        x = torch.randn(2, 8, 5, 4).to(NARROW).to(dtype)
        return module.train(training), x.contiguous(memory_format=torch.channels_last)

    module, x = twins.settled(make, NARROW) if residual_dtype is None else make()
    residuals = {} if residual_dtype is None else {"residual": (x + 3.0).to(residual_dtype)}

    def run(module, *inputs):
        with torch.autocast(impl.device, NARROW):
            return module(*inputs)

    plain = twins.plain(module)
    exact = copy.deepcopy(plain).double()
    exact = twins.module_step(exact, x.double(), **{k: v.double() for k, v in residuals.items()})
    same = twins.module_step(plain, x, run=functools.partial(run, plain), **residuals)
    actual = twins.module_step(module, x, run=functools.partial(run, module), **residuals)
    twins.judge(actual, same, exact, NARROW)
    assert actual["y"].dtype == same["y"].dtype
    with torch.no_grad():
        assert run(module.eval(), x, *residuals.values()).dtype == same["y"].dtype


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain_promotion_under_autocast(name, bias):
    """y of every chain on fp32 x has plain's dtype; what was rounded to 16 bits is nothing more.

    Twice the rounding of the convolutions is allowed, by the first layers' wide input.
    """
    chain = CHAINS[name]
    x, residual, tensors = draw(chain, torch.channels_last, torch.float32, bias)
    running = [None] * len(chain.all_norms)
    with torch.no_grad():
        exact = twins.run_chain(chain, x, tensors, residual, running)
        with torch.autocast("cpu", NARROW):
            y = run_chain(chain, x, tensors, residual, running)
            plain = twins.run_chain(chain, x, tensors, residual, running)
    assert y.dtype == plain.dtype
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
    if chain.convs:
        wide = chain.norms[0] is not None or chain.shortcut == "identity"
        assert not promotes(chain, x)
        with torch.autocast("cpu", NARROW):
            assert promotes(chain, x) == wide and not promotes(chain, x.to(NARROW))
            assert not promotes(chain, x.double())


@pytest.mark.parametrize("narrow", ["x", "residual"])
@STATISTICS
@RESIDUAL_CASE
def test_residual_of_another_dtype(impl, case, training, narrow):
    """The addition promotes, under autocast and without."""
    impl.need(NARROW, *OPS)
    call = away_from_kink(case, training=training, dtype=NARROW)

    def step(module, dtypes, name=None, autocast=False):
        leaves, running = call.make(torch.float64 if dtypes is None else torch.float32)
        if dtypes is not None:
            leaves = {k: v.detach().to(dtypes.get(k, v.dtype)) for k, v in leaves.items()}
            leaves = {k: v.requires_grad_() for k, v in leaves.items()}

        def run():
            with torch.autocast(impl.device, NARROW, enabled=autocast):
                return call.run(module, leaves, running, name)

        return twins.step(run, leaves, None, running)

    exact = step(twins, None)
    for autocast in (False, True):
        dtypes = {narrow: NARROW}
        if "weight" in call.tensors and narrow == "x" and not autocast:
            dtypes |= dict.fromkeys(("weight", "bias"), NARROW)  # as PyTorch's conv2d needs
        same, actual = (
            step(twins, dtypes, None, autocast),
            step(resnet_fast, dtypes, impl.name, autocast),
        )
        twins.judge(actual, same, exact, NARROW)


class _Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def _dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v)))


def _watched(f, x, v):
    with _Names() as mode:
        y = f(x)
    assert {"batch_norm", "relu", "adaptive_avg_pool2d"} & set(mode.seen)
    return y


TRANSFORMS = {  # name → results of f at x, along or at v
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,)),
    "vjp": lambda f, x, v: (lambda y, back: back(y))(*torch.func.vjp(f, x)),
    "grad": lambda f, x, v: torch.func.grad(lambda x: f(x).square().sum())(x),
    "grad of grad": lambda f, x, v: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).square().sum())(x).square().sum()
    )(x),
    "vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "linearize": lambda f, x, v: torch.func.linearize(f, x)[1](v),
    "jacfwd": lambda f, x, v: torch.func.jacfwd(lambda t: f(x + t * v))(torch.zeros(())),
    "dual_level": _dual,
    "fx": lambda f, x, v: fx.symbolic_trace(f)(x),
    "jit.trace": lambda f, x, v: torch.jit.trace(f, (x,), check_trace=False)(v),
    "function mode": _watched,
}


@STATISTICS
@pytest.mark.parametrize("case", [*CASES, "pool"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, case, training):
    """Value, tangent or gradient, and running statistics, are those of PyTorch's own calls.

    What PyTorch cannot do (vmap over one set of running statistics) fails as it does there.
    """
    torch.manual_seed(0)
    call = Call("add" if case == "pool" else case, training=training)
    v = torch.randn_like(call.tensors["x"])

    def results(module):
        leaves, running = call.make(torch.float32)
        if transform == "jit.trace":  # PyTorch's refuses constants that want gradients
            leaves = {name: leaf.detach() for name, leaf in leaves.items()}
        x = leaves.pop("x").detach()

        def f(x):
            if case == "pool":
                return module.mean(x)
            return call.run(module.functions, {"x": x, **leaves}, running, "auto")

        try:
            found = TRANSFORMS[transform](f, x, v)
        except RuntimeError as error:
            return str(error).splitlines()[0]
        found = found if isinstance(found, tuple) else (found,)
        return [t.detach() for t in (*found, *running.values())]

    class Own:
        functions, mean = resnet_fast, staticmethod(global_avg_pool)

    class Plain:
        functions, mean = twins, staticmethod(lambda x: F.adaptive_avg_pool2d(x, 1))

    expected, actual = results(Plain), results(Own)
    if isinstance(expected, str):
        assert actual == expected and transform == "vmap" and training
        return
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_chain_under_jvp(name):
    chain = CHAINS[name]
    x, residual, tensors = draw(chain, torch.contiguous_format)
    v = torch.randn_like(x)
    running = [None] * len(chain.all_norms)

    def jvp(run):
        return torch.func.jvp(lambda x: run(chain, x, tensors, residual, running), (x,), (v,))

    found = jvp(run_chain), jvp(twins.run_chain)
    assert found[1][1].abs().max() > 0 and all(map(torch.equal, *found))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_in_forward_mode(momentum):
    """They follow the batch as `nn.BatchNorm2d`'s, and so does the count of batches."""
    norm = nn.BatchNorm2d(8, momentum=momentum)
    again = copy.deepcopy(norm)
    running = Running(momentum, again.num_batches_tracked)
    chain = Chain((), (Norm(),))
    params = NormParams(again.weight, again.bias, again.running_mean, again.running_var)
    tensors = Tensors((), (params, NormParams()))
    for _ in range(3):
        x, v = torch.randn(2, 3, 8, 5, 4)
        _dual(lambda x: norm(x).relu(), x, v)
        _dual(lambda x: run_chain(chain, x, tensors, None, (running, None)), x, v)
    for a, b in zip(norm.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_functions_run_fused_elsewhere(monkeypatch):
    """PyTorch's own ops run under transforms alone."""
    monkeypatch.setattr(functional, "plain_chain", None)
    call = Call("conv-bias-residual", training=True)
    assert call.run(resnet_fast, *call.make(torch.float32), "auto").requires_grad
    with pytest.raises(TypeError), forward_ad.dual_level():
        call.run(resnet_fast, *call.make(torch.float32), "auto")


def test_mean_of_many_pixels():
    """Sums of 12,544 values keep fp32's precision."""
    x = torch.full((2, 16, 112, 112), 0.1).to(memory_format=torch.channels_last)
    error = global_avg_pool(x).double() - x.double().mean((2, 3), keepdim=True)
    assert error.abs().max() < 2e-8
