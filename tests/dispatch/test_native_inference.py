"""Whole nets and blocks in one native call: the same bits as op by op, and when it steps aside."""

import copy
import functools
import gc
import pickle
import weakref
from types import FunctionType

import emulation
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast.dispatch import backends, native_inference
from resnet_fast.spec.layers import Parts

NETS = {
    "bottlenecks": ("Bottleneck", {}),
    "basic, zero-pad": ("BasicBlock", {"shortcut": "zero_pad"}),
    "projections": ("BasicBlock", {"shortcut": "projection"}),
    "plain": ("BasicBlock", {"shortcut": "none"}),
    "pre-activation": ("PreActBottleneck", {}),
    "pre-activation, zero-pad": ("PreActBasicBlock", {"shortcut": "zero_pad"}),
    "groups": ("Bottleneck", {"groups": 4, "width_per_group": 16}),
    "dilation": ("Bottleneck", {"replace_stride_with_dilation": [True]}),
    "one channel": ("BasicBlock", {"planes": 1}),
}


def net(name, dtype=torch.float32, layout=torch.channels_last, impl="auto", **options):
    block, more = NETS[name]
    torch.manual_seed(1)
    options = {"planes": 32, "stem": "imagenet", "impl": impl, **more, **options}
    model = resnet_fast.ResNet(getattr(resnet_fast, block), [2, 2], 10, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval().to(dtype, memory_format=layout)


def image(dtype=torch.float32, layout=torch.channels_last, n=3):
    return torch.randn(n, 3, 37, 46).to(dtype).contiguous(memory_format=layout)


@pytest.fixture
def asked(monkeypatch):
    """What `native_inference.infer` gave, call by call."""
    given = []

    def watched(*args):
        given.append(native_inference.infer(*args))
        return given[-1]

    monkeypatch.setattr(resnet_fast.modules, "infer", watched)
    return given


def op_by_op(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(resnet_fast.modules, "infer", lambda *args: None)
        patch.setattr(resnet_fast.models.resnet, "infer_again", lambda *args: None)
        return run()


@pytest.mark.parametrize("name", NETS)
def test_same_bits(impl, dtype, layout, name, asked, monkeypatch):
    """One call for all of the net before its pooling; x is as it was."""
    if impl.name != "native" or impl.device != "cpu":
        pytest.skip("the call is native's, and here it is run on the CPU")
    impl.need(dtype, "conv_bn_act")
    model, x = net(name, dtype, layout, impl.name), image(dtype, layout)
    before = x.clone()
    with torch.inference_mode():
        y = model(x)
        assert torch.equal(y, op_by_op(monkeypatch, lambda: model(x)))
        assert asked[0] is not None and torch.equal(x, before)
        head = 2 if hasattr(model, "bn_last") else 1
        assert len(asked) == head, "nothing but the head is left"


@pytest.mark.parametrize(("depth", "norms", "folds"), [(2, 13, 1), (16, 69, 2)])
def test_all_norms_in_a_launch(impl, depth, norms, folds, asked, monkeypatch):
    """On a GPU a launch beside those of convolutions and pools folds up to 60 norms."""
    if not impl.emulated:
        pytest.skip("the emulator counts launches")
    torch.manual_seed(1)
    model = resnet_fast.ResNet(
        resnet_fast.BasicBlock, [1, depth, depth], 10, planes=8, stem="imagenet", impl="native"
    )
    model.eval().to(torch.bfloat16, memory_format=torch.channels_last)
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == norms
    x = image(torch.bfloat16)

    def run():
        before = emulation.launches()
        return model(x), emulation.launches() - before

    with torch.inference_mode():
        y, launches = run()
        assert asked.pop() is not None and launches == folds + 2, "and the pools"
        alone, launches = op_by_op(monkeypatch, run)
        assert launches == norms + 2 and torch.equal(y, alone)


@pytest.mark.parametrize("name", NETS)
def test_a_block_alone(name, asked, monkeypatch):
    """A block by itself; its input is the caller's."""
    block = net(name).layer2[0]
    x = torch.randn(2, block.conv1.in_channels, 9, 12).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        y = block(x)
        assert torch.equal(y, op_by_op(monkeypatch, lambda: block(x)))
        assert asked.pop() is not None and torch.equal(x, before)


def test_with_a_residual_it_is_not_asked(asked):
    layer = resnet_fast.ConvBNAct2d(8, 8, 3).eval()
    x = torch.randn(2, 8, 9, 12)
    with torch.no_grad():
        layer(x)
        assert asked.pop() is not None
        layer(x, x)
    assert not asked


def hook_block(model):
    model.layer2[1].register_forward_hook(lambda module, args, y: y * 2)


def hook_stage(model):
    model.layer1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def own_forward(model):
    model.layer1[0].forward = lambda x: x[:, :1].expand(-1, 128, -1, -1)


def another_impl(model):
    model.layer1[1].impl = "reference"


def train_a_norm(model):
    model.layer2[0].bn2.train()


def no_statistics(model):
    model.layer1[0].bn1.running_mean = model.layer1[0].bn1.running_var = None


def a_pool_of_another_kind(model):
    model.maxpool = torch.nn.AvgPool2d(2)


@pytest.mark.parametrize(
    "change",
    [hook_block, hook_stage, own_forward, another_impl, train_a_norm, no_statistics,
     a_pool_of_another_kind],
)  # fmt: skip
def test_it_steps_aside(change, asked, monkeypatch):
    """Where a net is more than its chains, the result is what its modules give one by one."""
    model, x = net("bottlenecks"), image()
    with torch.no_grad():
        plain = model(x)
        change(model)
        asked.clear()
        y = model(x)
        assert not torch.equal(y, plain) or change is another_impl
        whole = net("bottlenecks").layer2[1].out_channels
        assert asked[0] is None or asked[0].size(1) < whole, "the stem, or a block, alone"
        torch.testing.assert_close(y, op_by_op(monkeypatch, lambda: model(x)))


class Ops(TorchDispatchMode):
    """The ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gradients_and_modes(asked):
    """Where a gradient is wanted, or a dispatch mode looks on: op by op."""
    model, x = net("bottlenecks"), image()
    assert model(x).requires_grad
    with torch.no_grad(), Ops() as ops:
        model(x)
    assert asked and all(given is None for given in asked)
    assert sum("conv_bn_act" in name for name in ops.names) == 15
    model.requires_grad_(False)
    model(x)
    assert asked[-1] is not None, "nothing wants a gradient"


@pytest.mark.slow
def test_compilers_see_the_ops():
    """`torch.compile` and `torch.export` get a graph of ops, not one that hides them."""
    model, x = net("bottlenecks"), image()
    seen = []

    def backend(graph, example):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend=backend)(x)
        exported = torch.export.export(model, (x,))
    seen += [str(node.target) for node in exported.graph.nodes]
    assert sum("conv_bn_act" in name for name in seen) == 2 * 15
    assert not any("infer_chains" in name for name in seen)
    torch.testing.assert_close(y, model(x))


def test_autocast(monkeypatch):
    model, x = net("bottlenecks"), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, op_by_op(monkeypatch, lambda: model(x)))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda model, x: (model, x[:, :2]), "weight: expected 2 input channels"),
        (lambda model, x: (model.double(), x), "weight: expected x's dtype"),
        (lambda model, x: (model, x[0]), "x: expected 4 dimensions"),
    ],
)
def test_errors_are_those_of_the_ordinary_way(change, names):
    model, x = change(net("bottlenecks"), image())
    with torch.no_grad(), pytest.raises(ValueError, match=names):
        model(x)


def test_weights_that_change(monkeypatch):
    """Packed filters follow, as op by op."""
    model, x = net("bottlenecks"), image()
    with torch.no_grad():
        before = model(x)
        model.layer1[0].conv2.weight.mul_(1.5)
        model.layer2[1].bn1.running_var.add_(1)
        after = model(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, op_by_op(monkeypatch, lambda: model(x)))


def attribute(path, value):
    """A change that assigns value, or its result for the module if it is a function."""

    def change(model, patch):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, name, value(module) if isinstance(value, FunctionType) else value)

    return change


def hook(path):
    def change(model, patch):
        model.get_submodule(path).register_forward_hook(lambda module, args, y: y * 2)

    return change


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "option": attribute("conv1.stride", (1, 1)),
    "option that is not fused": attribute("layer2.0.conv2.padding_mode", "circular"),
    "eps": attribute("layer1.1.bn2.eps", 0.5),
    "filter": attribute("layer1.0.conv2.weight", lambda m: torch.nn.Parameter(2 * m.weight)),
    "bias": attribute("layer1.0.conv2.bias", lambda m: torch.nn.Parameter(torch.ones(32))),
    "statistics": attribute("layer2.1.bn1.running_var", lambda m: 2 * m.running_var),
    "dictionary": attribute(
        "layer1.0.conv2._parameters",
        lambda m: {"weight": torch.nn.Parameter(2 * m.weight), "bias": None},
    ),
    "attributes": attribute("conv1.__dict__", lambda m: {**vars(m), "stride": (1, 1)}),
    "child": attribute("layer2.0.downsample.1", torch.nn.BatchNorm2d(256).eval()),
    "block": attribute("layer1.1", torch.nn.Identity()),
    "class": attribute("layer1.0.conv2.__class__", Doubled),
    "class's forward": lambda model, patch: patch.setattr(
        torch.nn.Conv2d,
        "forward",
        lambda self, x: 2 * self._conv_forward(x, self.weight, self.bias),
    ),
    "stem's forward": attribute("conv1.forward", lambda m: lambda x: 2 * type(m).forward(m, x)),
    "hook": hook("layer1.0.bn1"),
    "pool": attribute("avgpool", torch.nn.AdaptiveMaxPool2d(1)),
    "pool's hook": hook("avgpool"),
    "pool's forward": lambda model, patch: patch.setattr(
        resnet_fast.modules.GlobalAvgPool2d, "forward", lambda self, x: x.amax((2, 3), keepdim=True)
    ),
    "last layer": attribute("fc", torch.nn.Linear(256, 10)),
    "last layer's filter": attribute("fc.weight", lambda m: torch.nn.Parameter(2 * m.weight)),
    "last layer's hook": hook("fc"),
    "last layer's forward": lambda model, patch: patch.setattr(
        torch.nn.Linear, "forward", lambda self, x: 2 * x[:, :10]
    ),
    "hook of all": lambda model, patch: (
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, y: 2 * y if isinstance(module, torch.nn.ReLU) else y
        ).remove
    ),
    "plain": lambda model, patch: model.switch(False),
    "mode": attribute("layer1.0.bn1.training", True),
    "implementation": attribute("layer2.0.impl", "reference"),
}
CLOSE_TO = {"plain", "implementation"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_calls(name, monkeypatch):
    """A second call repeats the first without reading the modules, unless one has changed."""
    model, x = net("bottlenecks"), image()
    again = functools.partial(native_inference.infer_again, model, x, "auto")
    with torch.no_grad():
        before = model(x)
        assert torch.equal(again(), before) and torch.equal(model(x), before)
        undo = CHANGES[name](model, monkeypatch)
        try:
            assert again() is None
            first, second = model(x), model(x)
            alone = op_by_op(monkeypatch, lambda: model(x))
            torch.testing.assert_close(first, alone)
            torch.testing.assert_close(second, alone)
        finally:
            if undo is not None:
                undo()
        if name in CLOSE_TO:
            torch.testing.assert_close(first, before)
        else:
            assert not torch.allclose(first, before, rtol=1e-3)


def test_what_could_change_unseen_is_not_repeated():
    """An option in a list, a class whose methods may read anything, a tensor's own attributes."""
    x, last = image(), torch.nn.Parameter(torch.zeros(10))
    last.owner = None
    changes = {
        "layer1.0.conv2.padding": [1, 1],
        "layer1.0.conv2.__class__": Own,
        "fc.bias": last,
    }
    for path, value in changes.items():
        model = net("bottlenecks")
        attribute(path, value)(model, None)
        with torch.no_grad():
            model(x)
            assert native_inference.infer_again(model, x, "auto") is None


class Own(torch.nn.Conv2d):
    pass


def test_repeated_for_other_inputs(monkeypatch):
    """Of another size or dtype, with autocast, and with a gradient of the last layer alone."""
    model = net("bottlenecks").requires_grad_(False)
    model.fc.requires_grad_()
    model(image())
    for x in (image(n=1), torch.randn(2, 3, 64, 32)):
        assert native_inference.infer_again(model, x, "auto") is not None
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        found = model.fc.weight.grad.clone()
        model.zero_grad()
        alone = op_by_op(monkeypatch, lambda x=x: model(x))
        alone.sum().backward()
        assert torch.equal(y, alone) and torch.equal(found, model.fc.weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = native_inference.infer_again(model, x, "auto")
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, op_by_op(monkeypatch, lambda: model(x)))
    with pytest.raises(ValueError, match="weight: expected 2 input channels"):
        model(x[:, :2])


def test_a_repeated_call_keeps_nothing_alive():
    model, x = net("bottlenecks"), image()
    with torch.no_grad():
        y = model(x)
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert all(torch.equal(twin(x), y) for twin in twins)
    del twins
    gone = weakref.ref(model), weakref.ref(model.layer1[0].conv2.weight)
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)


CONV = torch.nn.Conv2d(3, 4, 1, bias=False)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, program, eps: program.pop(),
        lambda tensors, program, eps: tensors.pop(),
        lambda tensors, program, eps: tensors.append(None),
        lambda tensors, program, eps: eps.pop(),
        lambda tensors, program, eps: program.__setitem__(0, 0),
        lambda tensors, program, eps: program.__setitem__(0, 10**12),
        lambda tensors, program, eps: program.__setitem__(0, 2**62),
        lambda tensors, program, eps: tensors.__setitem__(0, None),
        lambda tensors, program, eps: tensors.__setitem__(0, torch.zeros(4)),
        lambda tensors, program, eps: program.__setitem__(1, 3),
        lambda tensors, program, eps: program.__setitem__(1, 1),
        lambda tensors, program, eps: tensors.__setitem__(4, torch.zeros(3)),  # a mean alone
        lambda tensors, program, eps: tensors.__setitem__(9, None),  # no variance
        lambda tensors, program, eps: program.__setitem__(5, 0),  # a stride
        lambda tensors, program, eps: program.__setitem__(11, 0),  # groups
    ],
)
@pytest.mark.parametrize("pool", [None, torch.nn.MaxPool2d(1)], ids=["", "pool"])
def test_a_program_that_is_none(pool, spoil):
    """An error, whatever the lists hold."""
    if backends.native_module()[0] is None:
        pytest.skip("native is not built")
    tensors, program, eps = [], [], []
    parts = Parts((CONV,), (None, torch.nn.BatchNorm2d(4).eval()), True, "none", pool=pool)
    assert native_inference._write(parts, program, tensors, eps)
    run, x = torch.ops.resnet_fast_native.infer_chains, torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        assert run(x, tensors, program, eps).shape == (2, 4, 5, 5)
        spoil(tensors, program, eps)
        with pytest.raises((ValueError, RuntimeError), match=r"infer_chains|conv_bn_act"):
            run(x, tensors, program, eps)
