"""`update_running` of the native CPU kernels: the running statistics of a chain by one call."""

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast.autograd import running_stats
from resnet_fast.dispatch import backends


@pytest.fixture
def update():
    if backends.native_module()[0] is None:
        pytest.skip("resnet_fast._C is not built")
    return torch.ops.resnet_fast_native.update_running


@pytest.fixture
def calls(update, monkeypatch):
    """The updates by PyTorch's ops; a native call is not among them."""
    calls, run = [], running_stats._by_pytorch
    monkeypatch.setattr(
        running_stats, "_by_pytorch", lambda norms: (calls.append(norms), run(norms))
    )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1, None])
def test_as_batch_norm(calls, dtype, momentum):
    """Three batches, the third replayed; without momentum PyTorch computes them."""
    block = resnet_fast.ConvBNAct2d(8, 16, 3, momentum=momentum, dtype=dtype)
    plain = nn.BatchNorm2d(16, momentum=momentum, dtype=dtype)
    for _ in range(3):
        x = torch.randn(2, 8, 6, 5, dtype=dtype)
        block(x)
        plain(block.conv(x))
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(getattr(block.bn, name), expected)
    assert block.bn.num_batches_tracked == 3
    assert len(calls) == (2 if momentum is None else 0), "once anew, once recorded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_pytorch(update, dtype):
    """A traced or compiled step, which takes PyTorch's ops, gives the same bits."""
    mean, m2, first, second = torch.rand(4, 1003, dtype=dtype)
    found, expected = [first.clone(), second.clone()], [first, second]
    update([mean, m2], [7], found, [], 0.1)
    torch._foreach_mul_(expected, 1 - 0.1)
    torch._foreach_add_(expected, [mean, torch._foreach_div([m2], [6])[0]], alpha=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("what", ["bias", "narrow", "uncounted", "strided"])
def test_what_it_leaves_to_pytorch(calls, what):
    """A bias moves the mean; other dtypes, strides and norms that do not count are rare."""
    block = resnet_fast.ConvBNAct2d(8, 16, 3)
    plain, conv, bn = nn.BatchNorm2d(16), block.conv, block.bn
    if what == "bias":
        conv.bias = nn.Parameter(torch.randn(16))
    elif what == "narrow":
        block.bfloat16(), plain.bfloat16()
    elif what == "uncounted":
        bn.num_batches_tracked = plain.num_batches_tracked = None
    else:
        bn.running_mean = torch.zeros(32)[::2]
    x = torch.randn(2, 8, 6, 5).to(conv.weight.dtype)
    block(x)
    plain(conv(x))
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if what == "narrow" else {"rtol": 1e-5, "atol": 1e-5}
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(bn, name), getattr(plain, name), **tolerance)
    assert len(calls) == 1


def test_infinity_stays(update):
    """A variance that overflowed once is no NaN later, as with PyTorch."""
    running = [torch.zeros(2), torch.tensor([float("inf"), 1.0])]
    update([torch.ones(2), torch.tensor([8.0, 8.0])], [5], running, [], 0.5)
    assert torch.equal(running[0], torch.full([2], 0.5))
    assert torch.equal(running[1], torch.tensor([float("inf"), 1.5]))


def test_a_norm_may_run_plain_and_fused_before_a_backward_pass(update):
    """PyTorch's own calls save the statistics, and do not count updates of them either."""
    block = resnet_fast.ConvBNAct2d(8, 16, 3)
    x = torch.randn(2, 8, 6, 5)
    for _ in range(3):
        y = block.bn(block.conv(x)).square().mean()
        block(x)
        y.backward()
    block.bn.running_mean.requires_grad_()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            block(torch.randn(2, 8, 6, 5))


def test_errors_name_the_argument(update):
    mean, m2, tracked = torch.ones(3), torch.ones(3), torch.tensor(0)
    running = [torch.zeros(3), torch.ones(3)]
    for match, args in {
        "expected two of `moments` and of `running`": ([mean], [5], running, [tracked]),
        "`running` has dtype bfloat16": ([mean, m2], [5], [t.bfloat16() for t in running], []),
        "`moments` has dtype float64": ([mean.double(), m2], [5], running, []),
        "`running` has shape": ([mean, m2], [5], [torch.zeros(2), running[1]], []),
        "expected contiguous": ([mean, m2], [5], [torch.zeros(6)[::2], running[1]], []),
        "`tracked` has dtype float32": ([mean, m2], [5], running, [torch.zeros(1)]),
        "`tracked`: expected one value": ([mean, m2], [5], running, [torch.tensor([0, 0])]),
    }.items():
        with pytest.raises((RuntimeError, TypeError, ValueError), match=match):
            update(*args, 0.1)
    assert torch.equal(running[0], torch.zeros(3)) and torch.equal(running[1], torch.ones(3))
