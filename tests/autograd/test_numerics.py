"""Where arithmetic is hard: statistics far from zero, constants, and many steps of training."""

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from calls import OPS, Call, same_dtype
from torch import nn

import resnet_fast
from resnet_fast.spec import reference
from resnet_fast.spec.tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def mean_1000(x):
    """Every channel has mean 1000 and std 1: E[x²] − E[x]² would lose all digits in fp32."""
    return x + 1000.0


def means_apart(x):
    """Channels of mean 1, 10, 100, 1000 and 1 again."""
    return x + 10.0 ** torch.arange(x.size(1)).remainder(PARTS).view(1, -1, 1, 1)


def first_outlier(x):
    """The first pixel is far from the rest."""
    x = x.clone()
    x[0, :, 0, 0] = 3000.0
    return x


def first_image_zero(x):
    """One image of zeros beside images of mean 1000."""
    x = x + 1000.0
    x[0] = 0.0
    return x


def constant(x):
    return torch.full_like(x, 3.7)


def tiny(x):
    return x * 1e-6 + 1e-3


PARTS = 4
INPUTS = [mean_1000, means_apart, first_outlier, first_image_zero, constant, tiny]
SIZES = {"7x7": (3, 20, 7, 7), "many-pixels": (4, 16, 67, 65), "c65": (8, 65, 9, 9)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", INPUTS, ids=[make.__name__ for make in INPUTS])
def test_statistics(impl, dtype, layout, make, size):
    """mean and m2, the channels of one size together."""
    impl.need(dtype, "bn_stats")
    x = make(torch.randn(SIZES[size])).to(dtype).contiguous(memory_format=layout)
    found = torch.ops.resnet_fast.bn_stats(x.to(impl.device), impl.name)
    same, exact = reference.bn_stats(x.to(same_dtype(dtype))), reference.bn_stats(x.double())
    for name, *values in zip(("mean", "m2"), found, same, exact, strict=True):
        for part in range(PARTS):
            assert_close(*(v[part::PARTS] for v in values), f"{name} of part {part}")
    assert (found[1] >= 0).all()


FAR = [mean_1000, first_outlier, first_image_zero, tiny]


@pytest.mark.parametrize("make", FAR, ids=[make.__name__ for make in FAR])
def test_bn_far_from_zero(impl, layout, make):
    """y, gradients and running statistics of such channels, as good as PyTorch's.

    (Constant channels are left to their statistics: there y is the mean's last bit times 1/√eps.)
    """
    impl.need(torch.float32, *OPS)
    call = Call("bn-residual", layout, training=True)
    call.options["relu"] = False
    call.tensors["x"] = make(call.tensors["x"])
    call.judge(impl, resnet_fast)


@pytest.mark.slow
def test_statistics_do_not_depend_on_threads(impl, layout):
    """The same bits with one thread and with two."""
    if impl.name == "reference":
        pytest.skip("PyTorch's own sums may depend on the threads")
    impl.need(torch.float32, *OPS)
    call = Call("bn-residual", layout, training=True)
    call.tensors["x"] = torch.randn(4, 5, 61, 67)
    call.tensors["residual"] = torch.randn(4, 5, 61, 67)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(call.step(resnet_fast, torch.float32, impl.name, impl.device))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


class Net(nn.Module):
    """A little of everything, for ten classes."""

    def __init__(self, impl, keep_activations=False):
        super().__init__()
        options = {"impl": impl, "keep_activations": keep_activations}
        self.stem = resnet_fast.ConvBNAct2d(3, 8, 3, **options)
        self.basic = resnet_fast.BasicBlock(8, 8, **options)
        self.bottleneck = resnet_fast.Bottleneck(8, 4, 2, **options)
        self.padded = resnet_fast.BasicBlock(16, 24, 2, shortcut="zero_pad", **options)
        self.preact = resnet_fast.PreActBasicBlock(24, 24, **options)
        self.last = resnet_fast.PreActBottleneck(24, 8, 2, **options)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        for block in (self.stem, self.basic, self.bottleneck, self.padded, self.preact, self.last):
            x = block(x)
        return self.fc(x.mean((2, 3)))


def curve(net, x, target, steps=20):
    """Losses of SGD with momentum, the last one in eval mode, and the state of the net after it."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    net.eval()
    with torch.no_grad():
        losses.append(F.cross_entropy(net(x), target))
    return torch.stack(losses), net.state_dict()


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_training_curve(impl, layout, keep):
    """Twenty steps in double: every loss, parameter and statistic as the reference's."""
    impl.need(torch.float64, *OPS)
    impl.need_speed()
    net = Net(impl.name, keep).double().to(impl.device, memory_format=layout)
    x = torch.randn(16, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=layout)
    target = torch.arange(16) % 10
    expected, state = curve(twins.plain(net), x, target)
    losses, actual = curve(net, x, target)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert losses[-2] < 0.5 * losses[0]
    for name, value in state.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.leave_out(cases=lambda case: case.impl.interpreted)
def test_training_curve_fp32(impl, layout):
    """The first losses in fp32 stay as near to double's as plain PyTorch's do."""
    impl.need(torch.float32, *OPS)
    net = Net(impl.name).to(impl.device, memory_format=layout)
    n, steps = 16, 5
    x = torch.randn(n, 3, 16, 16).contiguous(memory_format=layout)
    target = torch.arange(n) % 10
    plain = twins.plain(net)
    exact, _ = curve(copy.deepcopy(plain).double(), x.double(), target, steps)
    same, _ = curve(plain, x, target, steps)
    losses, _ = curve(net, x, target, steps)
    assert_close(losses, same, exact, "losses")


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("value", [-float("inf"), float("nan"), 1e30])
def test_statistics_of_what_is_not_finite(impl, layout, value, momentum):
    """Running statistics are infinite or NaN where PyTorch's are, batch after batch."""
    if impl.name == "triton" or impl.emulated or impl.device != "cpu":
        pytest.skip("GPUs sum in another order, PyTorch's own kernels too: NaN for infinity")
    impl.need(torch.float32, *OPS)
    module = resnet_fast.ConvBNAct2d(8, 32, 1, impl=impl.name, momentum=momentum)
    module.conv.bias = torch.nn.Parameter(torch.zeros(32))
    plain = twins.plain(module)
    for batch in range(3):
        x = torch.randn(3, 8, 17, 16).contiguous(memory_format=layout)
        if batch == 1:
            x[1, 2, 3, 4] = value
        for net in (module, plain):
            net.zero_grad()
            net(x).sum().backward()
        for mine, theirs in zip(module.buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert torch.equal(mine.isinf(), theirs.isinf())
        same = module.conv.bias.grad.isnan() == plain.conv.bias.grad.isnan()
        assert same.all()
        assert (module.conv.bias.grad.nan_to_num(0.0) == 0).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_bias_that_is_not_finite(impl, layout, value):
    """It cancels in batch statistics, but for the NaN that it makes in PyTorch."""
    impl.need(torch.float32, *OPS)
    module = resnet_fast.ConvBNAct2d(8, 32, 3, impl=impl.name).to(impl.device)
    module.conv.bias = torch.nn.Parameter(torch.randn(32, device=impl.device))
    with torch.no_grad():
        module.conv.bias[3] = value
    x = torch.randn(2, 8, 5, 4, device=impl.device).contiguous(memory_format=layout)
    expected, actual = twins.module_step(twins.plain(module), x), twins.module_step(module, x)
    for name, wanted in expected.items():
        assert torch.equal(actual[name].isnan(), wanted.isnan()), name
