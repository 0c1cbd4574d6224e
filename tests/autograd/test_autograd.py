"""The graph: what it saves, which gradients it gives, and how it fails."""

import pytest
import torch
import twins
from calls import CASES, OPS, away_from_kink
from chain_cases import CHAINS, draw, leaves, with_options
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast.functional import run_chain
from resnet_fast.spec.layout import memory_format

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCKS = {
    "BasicBlock": lambda **options: resnet_fast.BasicBlock(8, 16, 2, **options),
    "Bottleneck": lambda **options: resnet_fast.Bottleneck(16, 4, **options),
    "PreActBasicBlock": lambda **options: resnet_fast.PreActBasicBlock(16, 16, **options),
    "PreActBottleneck": lambda **options: resnet_fast.PreActBottleneck(8, 4, 2, **options),
}
BLOCK = pytest.mark.parametrize("kind", BLOCKS)


def block_and_input(kind, **options):
    """A block in fp32 and an x that keeps its ReLUs off the kink."""

    def draw():
        module = BLOCKS[kind](**options)
        return module, torch.randn(2, module.parts().convs[0].in_channels, 5, 4)

    return twins.away_from_kink(draw, lambda module, x: twins.plain(module)(x), 1e-5)


def saved_bytes(run, *modules):
    """Bytes that run()'s graph keeps alive, those of the modules' parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for m in modules for t in m.state_dict().values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.leave_out(cases=lambda case: case.impl.interpreted)
def test_saved_by_bottleneck(impl):
    """x, three raw conv outputs, four vectors a norm and one bit an element: 10.1a, plain 16a.

    In units of a = N·H·W·width, with x and z3 4a each: fused 4 + 1 + 1 + 4 + 4/32, and PyTorch
    x, z1, relu, z2, relu, z3, y = 4 + 1 + 1 + 1 + 1 + 4 + 4 and the norms' vectors.
    """
    impl.need(torch.float32, *OPS)
    module = resnet_fast.Bottleneck(64, 16, impl=impl.name)
    plain = twins.plain(module)
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    unit = 2 * 16 * 16 * 16 * 4
    vectors = 4 * 4 * (16 + 16 + 64)
    fused = saved_bytes(lambda: module(x), module)
    assert fused == 10 * unit + 4 * unit // 32 + vectors
    assert fused < 0.65 * saved_bytes(lambda: plain(x), plain)
    module.keep_activations = True
    assert saved_bytes(lambda: module(x), module) == fused + 2 * unit
    module.keep_activations = "auto"
    kept = x.is_cuda or impl.name == "triton"
    assert saved_bytes(lambda: module(x), module) == fused + 2 * unit * kept


def test_saved_by_add_relu(impl):
    """Only the mask: one bit an element."""
    impl.need(torch.float32, "add_relu")
    x, residual = (torch.randn(2, 8, 16, 8, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: resnet_fast.add_relu(x, residual, impl=impl.name)) == x.numel() // 8


def test_saved_by_bn_act(impl):
    """x, four vectors and the mask; the residual is not kept."""
    impl.need(torch.float32, "bn_act")
    x, residual = (torch.randn(2, 8, 16, 8, requires_grad=True) for _ in range(2))
    norm = torch.nn.BatchNorm2d(8)
    options = {"residual": residual, "training": True, "impl": impl.name}

    def run():
        return resnet_fast.bn_act(x, norm.weight, norm.bias, None, None, **options)

    kept = saved_bytes(run, norm)
    assert kept == 4 * x.numel() + 4 * 4 * 8 + x.numel() // 8


@BLOCK
def test_no_graph_without_gradients(impl, kind):
    impl.need(torch.float32, *OPS)
    module, x = block_and_input(kind, impl=impl.name)
    for training in (True, False):
        module.train(training)
        with torch.no_grad():
            y = module(x.requires_grad_())
        assert not y.requires_grad and y.grad_fn is None
        with torch.inference_mode():
            assert torch.equal(module(x.detach()), y)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@BLOCK
@pytest.mark.leave_out(cases=lambda case: case.kind != "BasicBlock" and case.impl.interpreted)
def test_each_gradient_alone(impl, kind, training):
    """Whatever subset wants gradients: those come out as with all, the others stay None."""
    impl.need(torch.float32, *OPS)
    module, x = block_and_input(kind, impl=impl.name)
    module.train(training)
    everything = twins.module_step(module, x)
    names = ["x", *dict(module.named_parameters())]
    subsets = [{name} for name in names] + [set(names) - {name} for name in names]
    subsets += [{n for n in names if "bn" in n}, {n for n in names if "conv" in n}]
    for subset in subsets:
        module.zero_grad()
        leaf = x.clone().requires_grad_("x" in subset)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in subset)
        module(leaf).sum().backward()
        grads = {"x": leaf.grad, **{n: p.grad for n, p in module.named_parameters()}}
        for name, grad in grads.items():
            if name in subset:
                torch.testing.assert_close(grad, everything[f"d{name}"], msg=f"{name} of {subset}")
            else:
                assert grad is None, f"{name} of {subset}"


@pytest.mark.parametrize("training", [True, False], ids=["batch", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_each_argument_alone(impl, case, training):
    """The same of the functions: residual, bias and affine parameters one by one."""
    impl.need(torch.float32, *OPS)
    call = away_from_kink(case, training=training)
    everything = call.step(twins, torch.float64)
    for wanted in call.tensors:
        leaves, running = call.make(torch.float64)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        call.run(resnet_fast, leaves, running, impl.name).backward(call.dy.double())
        for name, leaf in leaves.items():
            if name == wanted:
                torch.testing.assert_close(leaf.grad, everything[f"d{name}"], msg=name)
            else:
                assert leaf.grad is None, name


@BLOCK
def test_double_backward_raises(impl, kind):
    impl.need(torch.float32, *OPS)
    module, x = block_and_input(kind, impl=impl.name)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"not differentiable \(create_graph=True\)"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


@BLOCK
def test_backward_twice(impl, kind):
    """retain_graph gives the same gradients again; without it PyTorch's error comes."""
    impl.need(torch.float32, *OPS)
    module, x = block_and_input(kind, impl=impl.name)
    x.requires_grad_()
    y = module(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("changed", ["x", "conv1.weight", "conv2.weight"])
def test_inplace_change_is_noticed(impl, changed):
    """What was saved must not change before backward: PyTorch's version check says so."""
    impl.need(torch.float32, *OPS)
    module, x = block_and_input("BasicBlock", impl=impl.name)
    for block in (twins.plain(module), module):
        leaf = x.clone().requires_grad_()
        inner = leaf * 1.0
        loss = block(inner).sum()
        with torch.no_grad():
            {"x": inner, **dict(block.named_parameters())}[changed].mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("case", CASES)
def test_output_may_change_in_place(impl, case):
    """y is not saved: scaling it in place scales the gradient."""
    impl.need(torch.float32, *OPS)
    call = away_from_kink(case, training=True)
    expected = call.step(twins, torch.float64)
    leaves, running = call.make(torch.float64)
    y = call.run(resnet_fast, leaves, running, impl.name).mul_(2.0)
    y.backward(call.dy.double() / 2.0)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"], msg=name)


def test_add_relu_saves_no_input(impl):
    """As with torch.relu, x may change in place once y is made."""
    impl.need(torch.float32, "add_relu")
    leaf = torch.randn(2, 8, 5, 4, requires_grad=True)
    x, residual = leaf * 1.0, torch.randn(2, 8, 5, 4)
    for function in (twins.add_relu, resnet_fast.add_relu):
        y = function(x, residual, impl=impl.name)
        x.detach().zero_()
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert torch.equal(grad, (y > 0).float())
        x = leaf * 1.0


@BLOCK
def test_checkpoint(impl, kind):
    """torch.utils.checkpoint runs the forward twice: gradients as without."""
    impl.need(torch.float32, *OPS)
    module, x = block_and_input(kind, impl=impl.name)
    expected = twins.module_step(module, x)
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    checkpoint(module, leaf, use_reentrant=False).sum().backward()
    assert torch.equal(leaf.grad, expected["dx"])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, expected[f"d{name}"]), name


def gradients(chain, dtype=torch.float32, layout=torch.channels_last, run=run_chain):
    """dy and the gradient of every leaf of a drawn chain."""
    x, residual, tensors = draw(chain, layout, dtype, bias=True)
    y = run(chain, x, tensors, residual, [None] * len(chain.all_norms))
    torch.manual_seed(1)  # a compiler may have drawn
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype).contiguous(memory_format=layout)
    return dy, torch.autograd.grad(y, leaves(x, residual, tensors), dy)


def check_own_memory(dy, grads):
    """Each gradient, and dy, may change in place without the others."""
    everything = [dy, *grads]
    for i, grad in enumerate(everything):
        before = [other.clone() for other in everything[i + 1 :]]
        grad.fill_(torch.nan)
        for other, value in zip(everything[i + 1 :], before, strict=True):
            assert torch.equal(other, value)


SOME = pytest.mark.parametrize(
    "name",
    ["conv-norm-pool", "conv-bare", "conv-frozen-residual", "norm-linear-residual", "add-relu",
     "add", "basic", "basic-projection", "basic-projection-linear", "bottleneck",
     "preact-projection"],
)  # fmt: skip


@SOME
def test_gradients_have_memory_of_their_own(impl, name):
    """Also where two are equal: biases of the last norm and of the projection's, x and residual."""
    impl.need(torch.float32, *OPS)
    chain = with_options(CHAINS[name], impl.name)
    dy, grads = gradients(chain)
    expected = gradients(chain, torch.float64, run=twins.run_chain)[1]
    for grad, value in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), value, rtol=1e-3, atol=1e-3)
    check_own_memory(dy, grads)


@SOME
def test_compiled_gradients_have_memory_of_their_own(name):
    torch._dynamo.reset()
    chain = with_options(CHAINS[name], "reference")
    compiled = torch.compile(run_chain, fullgraph=True, backend="aot_eager")
    dy, grads = gradients(chain, run=compiled)
    assert all(map(torch.equal, grads, gradients(chain)[1]))
    check_own_memory(dy, grads)


UNPACKED = {  # what a hook makes of the strides of a saved tensor
    "contiguous": lambda t: t.contiguous(),  # as save_on_cpu(pin_memory=True)
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
}


@pytest.mark.parametrize("unpack", UNPACKED)
@SOME
@pytest.mark.leave_out(
    cases=lambda case: (
        case.impl.interpreted and case.name not in ("conv-norm-pool", "basic-projection")
    )
)
def test_saved_tensors_in_another_format(impl, layout, name, unpack):
    """Hooks may unpack what was saved, a pool's index and filters too, with other strides."""
    impl.need(torch.float32, *OPS)
    for keep in (False, True):
        chain = with_options(CHAINS[name], impl.name, keep)
        expected = gradients(chain, layout=layout)[1]
        with saved_tensors_hooks(lambda t: t, lambda t: UNPACKED[unpack](t.clone())):
            grads = gradients(chain, layout=layout)[1]
        for grad, value in zip(grads, expected, strict=True):
            assert torch.equal(grad, value)
            assert grad.dim() != 4 or memory_format(grad) == memory_format(value)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@BLOCK
def test_export_with_gradients_on(kind, strict):
    """torch.export records inference, also where parameters want gradients."""
    module, x = block_and_input(kind)
    module.eval()
    program = torch.export.export(module, (x,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert "resnet_fast.conv_bn_act.default" in names
    assert not any("conv_fprop" in name for name in names)
    torch.testing.assert_close(program.module()(x), twins.plain(module)(x))


def test_gradients_accumulate(impl):
    impl.need(torch.float32, *OPS)
    module, x = block_and_input("Bottleneck", impl=impl.name)
    once = twins.module_step(module, x)["dconv2.weight"].clone()
    assert torch.equal(twins.module_step(module, x)["dconv2.weight"], 2 * once)


def test_unused_output_needs_no_backward(impl):
    """A block whose y is not used in the loss gives no gradient, and no error."""
    impl.need(torch.float32, *OPS)
    module, x = block_and_input("Bottleneck", impl=impl.name)
    x.requires_grad_()
    module(x)
    x.square().sum().backward()
    assert torch.equal(x.grad, 2 * x) and module.conv1.weight.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("block", [resnet_fast.Bottleneck, resnet_fast.BasicBlock])
def test_same_bits_twice(impl, block):
    """Output, gradients and running statistics of the same training step, bit by bit."""

    def step():
        torch.manual_seed(0)
        module = block(64, 32, 2, impl=impl.name)
        module.to(impl.device, memory_format=torch.channels_last)
        x = torch.randn(3, 64, 14, 10, device=impl.device).to(memory_format=torch.channels_last)
        y = module(x.requires_grad_())
        y.square().sum().backward()
        return [y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))
