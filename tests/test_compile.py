"""torch.compile(fullgraph=True) forward and backward, and torch.export."""

import shutil

import pytest
import torch
import twins
from calls import CASES, OPS, away_from_kink

import resnet_fast


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BLOCKS = {
    "ConvBNAct2d": lambda impl: resnet_fast.ConvBNAct2d(8, 12, 3, 2, impl=impl),
    "BasicBlock": lambda impl: resnet_fast.BasicBlock(8, 8, impl=impl),
    "BasicBlock-zero-pad": lambda impl: resnet_fast.BasicBlock(
        8, 16, 2, shortcut="zero_pad", impl=impl
    ),
    "Bottleneck": lambda impl: resnet_fast.Bottleneck(8, 4, 2, impl=impl),
    "PreActBasicBlock": lambda impl: resnet_fast.PreActBasicBlock(8, 16, 2, impl=impl),
    "PreActBottleneck": lambda impl: resnet_fast.PreActBottleneck(8, 2, impl=impl),
}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def same_graph(case):
    """Whether `case` is compiled as it is for other implementations, whose ops are the same."""
    return case.impl.interpreted or case.impl.name == "reference"


ONCE = pytest.mark.leave_out(cases=same_graph)


def check_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.leave_out(cases=lambda case: same_graph(case) and case.kind != "Bottleneck")
@MODES
@pytest.mark.parametrize("kind", BLOCKS)
def test_block(impl, kind, training):
    """Compiled without a graph break: y, gradients and running statistics as without compiling."""
    impl.need(torch.float32, *OPS)
    layout = torch.channels_last
    module = BLOCKS[kind](impl.name).train(training).to(impl.device, memory_format=layout)
    x = torch.randn(2, 8, 7, 5, device=impl.device).contiguous(memory_format=layout)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = twins.module_step(module, x)
    module.load_state_dict(state)
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    check_same(twins.module_step(module, x, run=compiled), expected)


@pytest.mark.leave_out(cases=lambda case: same_graph(case) and case.case != "conv-bias-residual")
@pytest.mark.parametrize("case", CASES)
def test_function(impl, case):
    impl.need(torch.float32, *OPS)
    call = away_from_kink(case, training=True)
    expected = call.step(resnet_fast, torch.float32, impl.name, impl.device)
    run = call.run
    compiled = torch.compile(
        lambda leaves, running: run(resnet_fast, leaves, running, impl.name),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    call.run = lambda module, leaves, running, name=None: compiled(leaves, running)
    check_same(call.step(resnet_fast, torch.float32), expected)


def test_autocast(impl):
    impl.need(torch.bfloat16, *OPS)
    module = resnet_fast.Bottleneck(8, 2, impl=impl.name)
    x = torch.randn(2, 8, 7, 5, device=impl.device)

    def run(x):
        with torch.autocast(impl.device, torch.bfloat16):
            return module(x)

    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = twins.module_step(module, x, run=run)
    module.load_state_dict(state)
    module.zero_grad()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = twins.module_step(module, x, run=compiled)
    assert actual["y"].dtype == torch.float32, "the shortcut's, as in plain PyTorch"
    check_same(actual, expected)


@ONCE
@pytest.mark.slow
def test_dynamic_batch(impl):
    """One graph serves every batch size."""
    impl.need(torch.float32, *OPS)
    module = resnet_fast.Bottleneck(8, 4, 2, impl=impl.name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            x = torch.randn(batch, 8, 7, 5, device=impl.device)
            module.zero_grad()
            y = compiled(x)
            y.sum().backward()
            assert y.shape == (batch, 16, 4, 3)


@ONCE
@pytest.mark.slow
def test_inductor(impl):
    """The default backend, once: code is generated around the ops."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")
    impl.need(torch.float32, *OPS)
    module = resnet_fast.BasicBlock(4, 8, 2, impl=impl.name)
    plain = twins.plain(module)
    x = torch.randn(2, 4, 6, 6)

    def run(block, x):
        leaf = x.clone().requires_grad_()
        compiled = torch.compile(lambda v: torch.tanh(block(v * 2.0)).square(), fullgraph=True)
        function = compiled if block is module else lambda v: torch.tanh(block(v * 2.0)).square()
        return twins.step(
            lambda: function(leaf), {"x": leaf, **dict(block.named_parameters())},
            None, dict(block.named_buffers()),
        )  # fmt: skip

    check_same(run(module, x), run(plain, x))


def test_export(impl, layout):
    """torch.export of an eval block: one graph, batch dynamic, the same y."""
    impl.need(torch.float32, *OPS)
    module = resnet_fast.Bottleneck(8, 4, 2, impl=impl.name).eval().to(memory_format=layout)
    x = torch.randn(2, 8, 7, 5).contiguous(memory_format=layout)
    with torch.no_grad():
        program = torch.export.export(
            module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
        )
        names = {str(node.target) for node in program.graph.nodes}
        assert "resnet_fast.conv_bn_act.default" in names
        for batch in (2, 7):
            x = torch.randn(batch, 8, 7, 5).contiguous(memory_format=layout)
            torch.testing.assert_close(program.module()(x), module(x))
