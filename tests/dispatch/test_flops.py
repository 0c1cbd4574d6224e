"""`FlopCounterMode` counts of the fused functions and blocks what it counts of the plain ones."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import twins
from chain_cases import CHAINS, draw
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import resnet_fast
from resnet_fast.dispatch import cost_model, ops
from resnet_fast.functional import add_relu, bn_act, conv_bn_act, global_avg_pool, run_chain

ROOT = Path(__file__).parents[2]
GEOMETRY = {  # filters, options of the convolution
    "3x3": ((6, 4, 3, 3), {"padding": 1}),
    "strided": ((6, 4, 3, 3), {"stride": 2, "padding": (1, 0)}),
    "grouped": ((6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((8, 1, 3, 3), {"groups": 4}),
    "dilated": ((6, 4, 3, 3), {"dilation": 2, "padding": 2}),
    "1x1": ((6, 4, 1, 1), {"stride": 2}),
}


def flops(run):
    """What the counter counts of run() and of the backward pass of its result, if it has one."""
    with FlopCounterMode(display=False) as counter:
        y = run()
        if y.requires_grad:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs", ["nothing", "x", "w", "both"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", GEOMETRY)
def test_convolution(name, training, needs):
    shape, options = GEOMETRY[name]
    x = torch.randn(2, 4, 9, 8, requires_grad=needs in ("x", "both"))
    w = torch.randn(shape, requires_grad=needs in ("w", "both"))
    v = torch.ones(len(w))

    def count(function):
        return flops(lambda: function(x, w, v, v, v, v, training=training, **options))

    assert count(conv_bn_act) == count(twins.conv_bn_act) > 0


def test_what_is_no_convolution_counts_nothing():
    x, v = torch.randn(2, 4, 6, 6, requires_grad=True), torch.ones(4)
    assert flops(lambda: bn_act(x, v, v, v.clone(), v.clone(), training=True)) == 0
    assert flops(lambda: add_relu(x, x)) == 0
    assert flops(lambda: global_avg_pool(x.detach())) == 0


@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name, gradients):
    chain = CHAINS[name]
    x, residual, tensors = draw(chain, torch.channels_last, torch.float32)
    running = [None] * len(chain.all_norms)

    def count(function):
        with torch.set_grad_enabled(gradients):
            return flops(lambda: function(chain, x, tensors, residual, running))

    assert count(run_chain) == count(twins.run_chain)


def test_a_projection_in_one_op():
    """Both convolutions, in the counter and in the cost model."""
    x, w, source = torch.randn(2, 4, 3, 5), torch.randn(6, 4, 3, 3), torch.randn(2, 7, 6, 10)
    rest = (None, None, source, torch.randn(6, 7, 1, 1), None, None, True,
            [1, 1], [1, 1], [1, 1], 1, [2, 2])  # fmt: skip
    expected = 2 * (2 * 6 * 3 * 5) * (4 * 9 + 7)
    assert flops(lambda: ops.conv_add_projection(x, w, *rest, "reference")) == expected
    assert cost_model.work("conv_add_projection", (x, w, *rest)).flop == expected


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model(training):
    """In inference nothing wants a gradient; in training the images do not."""
    x = torch.randn(2, 3, 32, 32)
    fused, plain = (
        resnet_fast.create_model("small_resnet", fused=fused)
        .train(training)
        .requires_grad_(training)
        for fused in (True, False)
    )
    assert flops(lambda: fused(x)) == flops(lambda: plain(x)) > 0


def test_every_op_has_a_formula():
    assert all(getattr(torch.ops.resnet_fast, name) in flop_registry for name in ops.NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["resnet_fast", "torch.utils.flop_counter"])
def test_order_of_imports(first):
    """Whichever comes first; and the package alone does not import the counter."""
    code = f"""
import sys, {first}, resnet_fast
print("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
import torch
v = torch.ones(2)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    resnet_fast.conv_bn_act(torch.ones(1, 2, 1, 1), torch.ones(2, 2, 1, 1), v, v, v, v)
print(counter.get_total_flops())
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(first != "resnet_fast"), "8"]
