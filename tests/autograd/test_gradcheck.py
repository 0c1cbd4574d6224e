"""Gradients against finite differences in double: every Function, chain and block."""

import functools

import pytest
import torch
import twins
from chain_cases import CHAINS, draw, leaves, rebuild, with_options
from torch.func import functional_call

import resnet_fast
from resnet_fast import functional

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCKS = {
    "BasicBlock": (resnet_fast.BasicBlock, 4, 4),
    "Bottleneck": (resnet_fast.Bottleneck, 4, 1),
    "PreActBasicBlock": (resnet_fast.PreActBasicBlock, 4, 4),
    "PreActBottleneck": (resnet_fast.PreActBottleneck, 4, 1),
}
SHORTCUTS = {  # name → (stride, output planes over input planes)
    "identity": (1, 1),
    "projection": (2, 2),
    "zero_pad": (2, 2),
    "none": (2, 1),
}


def normal(*shape, layout=torch.contiguous_format):
    value = torch.randn(shape, dtype=torch.float64)
    value = value.contiguous(memory_format=layout) if len(shape) == 4 else value
    return value.requires_grad_()


def gradcheck(impl, run, values, fast_mode=False):
    """torch's gradcheck of run(*values), where launches take long along one direction.

    That is fast_mode's idea taken to its end: of φ(t) = run(values + t·directions) the derivative
    at 0, with random directions for all values at once, needs three launches for two a value.
    """
    if not impl.interpreted:
        return torch.autograd.gradcheck(run, values, fast_mode=fast_mode)
    directions = [torch.randn_like(value) for value in values]
    fixed = [value.detach() for value in values]

    def along(t):
        return run(*(v + t * d for v, d in zip(fixed, directions, strict=True)))

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.gradcheck(along, (t,), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
def test_conv_bn_act(impl, layout, training, bias, residual, relu):
    impl.need(torch.float64, "bn_act", "conv_fprop", "conv_bprop")
    running = torch.randn(4).double(), torch.rand(4).double() + 0.5

    def run(module, x, w, weight, shift, *rest):
        rest = list(rest)
        options = {
            "residual": rest.pop() if residual else None,
            "bias": rest.pop() if bias else None,
            "training": training,
            "relu": relu,
            "padding": 1,
            "stride": (1, 2),
            "impl": impl.name,
        }
        return module.conv_bn_act(x, w, weight, shift, *running, **options)

    def inputs():
        w = normal(4, 2, 3, 3, layout=layout)
        rest = [normal(4)] * bias + [normal(2, 4, 4, 2, layout=layout)] * residual
        return [normal(2, 2, 4, 3, layout=layout), w, normal(4), normal(4), *rest]

    args = twins.away_from_kink(inputs, functools.partial(run, twins))
    assert gradcheck(impl, functools.partial(run, resnet_fast), args)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
def test_bn_act(impl, layout, training, residual, relu):
    impl.need(torch.float64, "bn_act")
    running = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def run(module, x, weight, shift, res=None):
        return module.bn_act(
            x, weight, shift, *running,
            residual=res, training=training, relu=relu, impl=impl.name,
        )  # fmt: skip

    def inputs():
        acts = [normal(2, 3, 3, 5, layout=layout) for _ in range(1 + residual)]
        return [acts[0], normal(3), normal(3), *acts[1:]]

    args = twins.away_from_kink(inputs, functools.partial(run, twins))
    assert gradcheck(impl, functools.partial(run, resnet_fast), args)


def test_add_relu(impl, layout):
    impl.need(torch.float64, "add_relu")

    def inputs():
        return [normal(2, 3, 3, 5, layout=layout) for _ in range(2)]

    args = twins.away_from_kink(inputs, twins.add_relu)
    run = functools.partial(resnet_fast.add_relu, impl=impl.name)
    assert gradcheck(impl, run, args)


CHAINS_OF_ALL = (
    "conv-norm-pool", "norm-conv-relu", "basic-projection", "bottleneck-grouped",
    "preact-projection",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.leave_out(
    cases=lambda case: case.impl.interpreted and case.chain not in map(CHAINS.get, CHAINS_OF_ALL)
)
@pytest.mark.parametrize(
    ("keep", "bias"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["recompute", "keep", "bias", "keep-bias"],
)
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
def test_chain(impl, layout, chain, bias, keep):
    impl.need(torch.float64, "bn_act", "conv_fprop", "conv_bprop")
    chain = with_options(chain, impl.name, keep)
    running = [None] * len(chain.all_norms)

    def run(module, drawn, *values):
        x, residual, tensors = rebuild(*drawn, values)
        return module.run_chain(chain, x, tensors, residual, running)

    def inputs():
        drawn = draw(chain, layout, bias=bias, seed=torch.initial_seed())
        return [drawn, *leaves(*drawn)]

    drawn, *values = twins.away_from_kink(inputs, functools.partial(run, twins))
    expected = run(twins, drawn, *values)
    actual = run(functional, drawn, *values)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(run(functional, drawn, *values), expected)
    fused = functools.partial(run, functional, drawn)
    assert gradcheck(impl, fused, values, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "keep"),
    [(True, False), (True, True), (False, False)],
    ids=["train", "train-keep", "eval"],
)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.leave_out(cases=lambda case: case.shortcut != "projection" and case.impl.interpreted)
def test_block(impl, layout, kind, shortcut, training, keep):
    impl.need(torch.float64, "bn_act", "conv_fprop", "conv_bprop")
    block, inplanes, planes = BLOCKS[kind]
    stride, growth = SHORTCUTS[shortcut]

    def build():
        module = block(
            inplanes, planes * growth, stride,
            shortcut=shortcut, impl=impl.name, keep_activations=keep,
        )  # fmt: skip
        module = module.double().to(memory_format=layout).train(training)
        return module, normal(2, inplanes, 5, 4, layout=layout)

    module, x = twins.away_from_kink(build, lambda module, x: twins.plain(module)(x))
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    values = [x, *module.parameters()]
    assert gradcheck(impl, run, values, fast_mode=True)
