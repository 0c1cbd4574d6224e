"""Packed filters of CPU inference: exact, never stale, and convolved where oneDNN itself errs."""

import gc
import mmap
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import twins
from torch.autograd import _unsafe_preserve_version_counter

import resnet_fast
from resnet_fast import ConvBNAct2d, modules
from resnet_fast.dispatch import backends, packed_filters

PARTS = 128  # Witness::kParts of csrc/cpu/witness.h
pytestmark = [
    pytest.mark.skipif(backends.native_module()[0] is None, reason="native is not built"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# --- NaN ---


def nan_cases():
    for c, k, taps, groups in [(3, 32, 7, 1), (8, 8, 3, 1), (20, 40, 1, 1), (64, 64, 3, 1),
                               (64, 64, 3, 4), (16, 16, 3, 16), (1, 8, 3, 1)]:  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in (torch.contiguous_format, torch.channels_last):
                yield pytest.param(c, k, taps, groups, dtype, layout)


@pytest.mark.parametrize("where", ["x", "weight", "running_var", "bias"])
@pytest.mark.parametrize(("c", "k", "taps", "groups", "dtype", "layout"), nan_cases())
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_nan_stays(c, k, taps, groups, dtype, layout, where, with_residual):
    """NaN where PyTorch has it, and nowhere else, through the ReLU of every way to convolve."""
    module = ConvBNAct2d(c, k, taps, groups=groups, impl="native").to(dtype).eval()
    x = torch.randn(2, c, 9, 10, dtype=dtype).contiguous(memory_format=layout)
    parts = {"x": x, **module.conv._parameters, **module.bn._buffers, **module.bn._parameters}
    with torch.no_grad():
        residual = torch.randn_like(module(x)) if with_residual else None
        broken = module.bn.bias if where == "bias" else parts[where]
        broken[(0,) * broken.dim()] = float("nan")
        y = module(x, residual)
        expected = twins.plain(module)(x, residual)
    assert expected.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_broken_network_says_so(layout):
    net = resnet_fast.create_model("resnet18", impl="native").eval()
    x = torch.randn(1, 3, 40, 40).contiguous(memory_format=layout)
    with torch.no_grad():
        assert net(x).isfinite().all()
        assert net(x.new_full(x.shape, float("nan"))).isnan().all()
        net.conv1.weight[5, 1, 2, 2] = float("nan")
        assert net(x).isnan().all()


# --- where oneDNN errs ---

ODD = """
import random, torch, torch.nn.functional as F, resnet_fast
rng = random.Random({seed})
for case in range(200):
    torch.set_num_threads(rng.choice([1, 3]))
    dtype = rng.choice([torch.float32, torch.bfloat16])
    taps = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
    dilation = rng.randint(1, 3), rng.randint(1, 3)
    padding = rng.randint(0, 5), rng.randint(0, 5)
    stride = rng.randint(1, 3), rng.randint(1, 3)
    groups = rng.choice([1, 1, 1, 2])
    c, k = (groups * rng.choice([1, 3, 16, 32, 64]) for _ in range(2))
    n, h, w = rng.randint(1, 3), rng.choice([1, 2, 7, 17]), rng.choice([1, 1, 2, 3, 8, 17])
    reach = [d * (t - 1) + 1 for d, t in zip(dilation, taps)]
    if h + 2 * padding[0] < reach[0] or w + 2 * padding[1] < reach[1]:
        continue
    layout = rng.choice([torch.contiguous_format, torch.channels_last])
    weight = torch.randn(k, c // groups, *taps, dtype=dtype)
    mean, var = torch.zeros(k), torch.ones(k)
    args = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    for _ in range(6):
        junk = torch.randn(rng.randint(100, 300000))
        x = torch.randn(n, c, h, w, dtype=dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            y = resnet_fast.conv_bn_act(
                x, weight, None, None, mean, var, relu=False, impl="native", **args)
        padded = F.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]))
        z = F.conv2d(padded, weight.double(), None, stride, 0, dilation, groups)
        tolerance = (1e-4 if dtype == torch.float32 else 3e-2) * (1 + z.abs().max())
        assert (y - z).abs().max() < tolerance, (x.shape, weight.shape, args, dtype, layout)
        leaf = weight.clone().requires_grad_()
        y = resnet_fast.conv_bn_act(
            x, leaf, None, None, mean, var, relu=False, impl="native", **args)
        y.sum().backward()
        exact = weight.double().requires_grad_()
        F.conv2d(padded, exact, None, stride, 0, dilation, groups).sum().backward()
        error = (leaf.grad - exact.grad).abs().max()
        assert error < (1e-3 if dtype == torch.float32 else 5e-2) * (1 + exact.grad.abs().max()), (
            "dw", x.shape, weight.shape, args, dtype, layout)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "limits"),
    [("auto", {}), ("onednn", {}), ("onednn", {"ONEDNN_MAX_CPU_ISA": "AVX2"})],
    ids=["auto", "onednn", "onednn-without-bf16"],
)
def test_shapes_that_onednn_gets_wrong(way, limits):
    """Dilated single taps, windows in the padding, single channels and columns: oneDNN 3.x crashes
    or errs, and takes bf16 on some CPUs alone; in a process of its own, which a crash would end.
    """
    environment = {**os.environ, "RESNET_FAST_CPU_CONV": way, "MALLOC_PERTURB_": "165", **limits}
    command = [sys.executable, "-X", "faulthandler", "-c", ODD.replace("{seed}", str(len(way)))]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_kernel_larger_than_its_input(impl, stride):
    impl.need(torch.float32)
    module = ConvBNAct2d(32, 32, 2, stride, 0, impl=impl.name).to(impl.device).eval()
    with pytest.raises((ValueError, RuntimeError), match=r"too few|can't be greater"):
        module(torch.randn(1, 32, 12, 1, device=impl.device))
    weight, one = torch.randn(32, 32, 2, 2), torch.ones(32)
    with pytest.raises(RuntimeError, match="too few pixels"):
        torch.ops.resnet_fast_native.conv_bn_act(
            torch.randn(1, 32, 12, 1), weight, None, one, one, one, one, None, True, 1e-5,
            (stride, stride), (0, 0), (1, 1), 1,
        )  # fmt: skip


@pytest.mark.parametrize("value", [2**31, 2**62])
@pytest.mark.parametrize("what", range(3))
def test_geometry_that_would_overflow(what, value):
    geometry = [(1, 1), (0, 0), (1, 1)]
    geometry[what] = (value, 1)
    with pytest.raises(RuntimeError, match="stride"):
        torch.ops.resnet_fast_native.conv_fprop(
            torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3), None, None, True, *geometry, 1
        )


# --- what the packed form depends on ---


def test_eps_is_told_apart_by_its_bits():
    x, weight = torch.randn(2, 32, 8, 8), torch.randn(32, 32, 3, 3)
    vectors = [torch.rand(32) * 1e-15 for _ in range(4)]
    with torch.no_grad():
        for eps in (1e-16, 4e-16, 1e5, 1e6, 1e-300, 2e-300):
            y = resnet_fast.conv_bn_act(x, weight, *vectors, eps=eps, impl="native")
            expected = twins.conv_bn_act(*(t.double() for t in (x, weight, *vectors)), eps=eps)
            torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4 * expected.max())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_onednn_switched_off_and_on(layout):
    net = resnet_fast.create_model("resnet18", impl="native").eval()
    x = torch.randn(1, 3, 40, 40).contiguous(memory_format=layout)
    with torch.no_grad():
        before = net(x)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", ["PreActBottleneck", "PreActBasicBlock", "Bottleneck"])
def test_bf16_after_training_on_zeros(block, layout):
    """Channels that were constant: their scale, 1/sqrt(eps), magnifies what rounding leaves."""
    module = getattr(modules, block)(32, 32, impl="native").to(dtype=torch.bfloat16)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = None
            torch.nn.init.uniform_(norm.bias)
    x = torch.zeros(2, 32, 7, 9, dtype=torch.bfloat16).contiguous(memory_format=layout)
    module.train()(x)
    module.eval()
    plain = twins.plain(module)
    with torch.no_grad():
        y, same, exact = module(x), plain(x), plain.double()(x.double())
    twins.judge({"y": y}, {"y": same}, {"y": exact})


# --- changes that PyTorch does not count ---


def randomized(c, k, taps, layout, dtype=torch.float32):
    module = ConvBNAct2d(c, k, taps, impl="native").to(dtype=dtype, memory_format=layout).eval()
    for vector in (*module.bn._parameters.values(), module.bn.running_mean, module.bn.running_var):
        torch.nn.init.uniform_(vector, 0.5, 1.5)
    torch.nn.init.uniform_(module.bn.bias, 4, 5)  # every channel outlives its ReLU
    return module, torch.randn(2, c, 6, 6, dtype=dtype).contiguous(memory_format=layout)


def prune_smallest(weight, share):
    level = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
    weight.mul_(weight.abs() > level)


CHANGES = {
    "prune a hundredth": lambda m, at: prune_smallest(m.conv.weight.data, 0.01),
    "prune a tenth": lambda m, at: prune_smallest(m.conv.weight.data, 0.1),
    "zero a filter": lambda m, at: m.conv.weight.data[at % len(m.conv.weight)].zero_(),
    "negate a filter": lambda m, at: m.conv.weight.data[at % len(m.conv.weight)].neg_(),
    "zero an input channel": lambda m, at: m.conv.weight.data[
        :, at % m.conv.weight.shape[1]].zero_(),
    "a patch of a hundredth": lambda m, at: m.conv.weight.data.view(-1)[
        (lo := at * 7919 % (m.conv.weight.numel() - m.conv.weight.numel() // 100)) :
        lo + m.conv.weight.numel() // 100].zero_(),
    "a running variance": lambda m, at: m.bn.running_var.numpy().__setitem__(
        at % len(m.bn.bias), 9.0),
    "a bias of a norm": lambda m, at: m.bn.bias.data.__setitem__(at % len(m.bn.bias), 9.0),
}  # fmt: skip
SHAPES = [(64, 64, 3), (256, 64, 1), (64, 256, 1), (3, 64, 7), (512, 16, 3), (256, 256, 3)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("c", "k", "taps"), SHAPES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.leave_out(
    cases=lambda case: (
        case.change == "a patch of a hundredth" and case.layout == torch.channels_last
    )
)
def test_seen_at_the_next_call(change, c, k, taps, layout):
    """The version counter stays, and the result follows, wherever the change is."""
    module, x = randomized(c, k, taps, layout)
    kept = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.no_grad():
        for at in range(0, 1000, 167):
            before = module(x)
            version = module.conv.weight._version
            CHANGES[change](module, at)
            assert module.conv.weight._version == version
            after = module(x)
            assert not torch.equal(after, before), at
            torch.testing.assert_close(after, twins.plain(module)(x), rtol=1e-3, atol=1e-3)
            module.load_state_dict(kept)


@pytest.mark.parametrize(("c", "k", "taps"), SHAPES)
def test_a_single_value_is_seen_within_a_bound(c, k, taps):
    module, x = randomized(c, k, taps, torch.channels_last)
    with torch.no_grad():
        for place in range(4):
            before = module(x)
            at = (k - 1) * place // 3, (c - 1) * place // 3, taps // 2, taps // 2
            module.conv.weight.data[at] += 1
            calls = 1
            while torch.equal(module(x), before):
                calls += 1
                assert calls <= PARTS
            torch.testing.assert_close(module(x), twins.plain(module)(x), rtol=1e-3, atol=1e-3)


WHOLE = {
    "train": lambda m: m.train().eval(),
    "eval": lambda m: m.eval(),
    "load_state_dict": lambda m: m.load_state_dict({}, strict=False),
    "to": lambda m: m.to(torch.float32),
}


@pytest.mark.parametrize("fused_by", ["class", "fuse"])
@pytest.mark.parametrize("event", WHOLE)
def test_a_change_of_the_module_compares_all(event, fused_by):
    if fused_by == "class":
        net = torch.nn.Sequential(ConvBNAct2d(256, 256, 3, impl="native"))
        weight = net[0].conv.weight
    else:
        layers = torch.nn.Conv2d(256, 256, 3), torch.nn.BatchNorm2d(256), torch.nn.ReLU()
        net = resnet_fast.fuse(torch.nn.Sequential(*layers), impl="native")
        weight = net[0].weight
    x = torch.randn(1, 256, 6, 6)
    net.eval()
    with torch.no_grad():
        unseen = 0
        for place in range(5, weight.numel(), weight.numel() // 7):
            before = net(x)
            weight.data.view(-1)[place] += 1
            unseen += torch.equal(net(x), before)
            WHOLE[event](net)
            after = net(x)
            assert not torch.equal(after, before)
            torch.testing.assert_close(after, twins.plain(resnet_fast.unfuse(net))(x), rtol=1e-3,
                                       atol=1e-3)  # fmt: skip
        assert unseen > 0  # else this shows nothing


def test_writers_that_leave_the_counter(tmp_path):
    """What FSDP2 and DDP do, a vector of all parameters, and a second mapping of shared memory."""
    module, x = randomized(64, 64, 3, torch.contiguous_format)
    weight = module.conv.weight

    def follows():
        torch.testing.assert_close(module(x), twins.plain(module)(x), rtol=1e-3, atol=1e-3)

    with torch.no_grad():
        module(x)
        with _unsafe_preserve_version_counter(weight):
            weight.mul_(1.5)
        follows()

        vector = torch.nn.utils.parameters_to_vector(module.parameters()).clone()
        torch.nn.utils.vector_to_parameters(vector, module.parameters())
        follows()
        vector.mul_(0.5)
        follows()

        file = tmp_path / "weight"
        file.write_bytes(weight.numpy().tobytes())
        weight.data = torch.from_file(str(file), shared=True, size=weight.numel()).view_as(weight)
        follows()
        with file.open("r+b") as other, mmap.mmap(other.fileno(), 0) as memory:
            torch.frombuffer(memory, dtype=torch.float32).mul_(-2)
        follows()


# --- with their filters they go ---


@pytest.mark.parametrize("how", ["channels_last", "nchw", "moved"])
def test_dropped_with_their_filters(how):
    resnet_fast.empty_cache()
    before = set(packed_filters._watched)  # of nets that other tests have left alive
    layout = torch.channels_last if how == "channels_last" else torch.contiguous_format
    module, x = randomized(64, 64, 3, layout)
    with torch.no_grad():
        module(x)
        if how == "moved":
            module.bfloat16()(x.bfloat16())
        assert backends.kept()["packed_filters"] > 0
        del module
        gc.collect()
        assert backends.kept()["packed_filters"] == 0
        assert packed_filters._watched <= before


def test_dropped_when_others_are_packed():
    """Filters that no module holds."""
    resnet_fast.empty_cache()
    x, one = torch.randn(1, 32, 4, 4), torch.ones(32)
    sizes = []
    with torch.no_grad():
        for _ in range(5):
            resnet_fast.conv_bn_act(x, torch.randn(32, 32, 3, 3), one, one, one, one, impl="native")
            sizes.append(backends.kept()["packed_filters"])
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


def test_both_formats_of_x_share_them():
    """NCHW and channels_last, for a convolution that oneDNN runs: filters are packed once."""
    resnet_fast.empty_cache()
    x, w, one = torch.randn(1, 16, 6, 6), torch.randn(8, 16, 3, 3), torch.ones(8)
    with torch.no_grad():
        results, sizes = [], []
        for layout in (torch.contiguous_format, torch.channels_last):
            own = x.contiguous(memory_format=layout)
            results.append(resnet_fast.conv_bn_act(own, w, one, one, one, one, impl="native"))
            sizes.append(backends.kept()["packed_filters"])
    assert sizes[0] == sizes[1] > 0
    torch.testing.assert_close(*results)


def test_padding_as_wide_as_the_filter():
    """The right values, which oneDNN writes out of bounds for; and their gradients."""
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 8, 2, 1, dtype=torch.float64, requires_grad=True)
    one, zero = torch.ones(6).double(), torch.zeros(6).double()

    def ours(x, weight):
        return resnet_fast.conv_bn_act(x, weight, one, zero, zero, one, padding=(3, 2), eps=0.0,
                                       relu=False, impl="native")  # fmt: skip

    padded = F.conv2d(F.pad(x, (2, 2, 3, 3)), weight)
    torch.testing.assert_close(ours(x, weight), padded)
    assert torch.autograd.gradcheck(ours, (x, weight), fast_mode=True)
