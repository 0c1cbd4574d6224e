"""Reductions whose last program merges: against fp64, the same bits in any order of arrival."""

import pytest
import torch
from test_kernels import DEVICE, WALKS, Launches

from resnet_fast.kernels import config_select, counters, launch
from resnet_fast.kernels.bn_stats import CONFIGS, bn_stats_finalized
from resnet_fast.spec import reference

NHWC, NCHW = torch.channels_last, torch.contiguous_format
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def large_gpu(monkeypatch):
    """An interpreter of 132 multiprocessors: many programs, most of them short."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(90, 132, "interpreter"))


@pytest.fixture
def take(monkeypatch):
    """take(config): the kernel runs with it."""

    def one(config):
        monkeypatch.setattr(config_select, "choose", lambda *args, **options: config)

    return one


@pytest.fixture
def in_any_order(monkeypatch):
    """Run a function with programs that arrive in other orders; each must give the same bits."""

    def run_all(run):
        first = run()
        if not launch.INTERPRETING:
            orders = [lambda i, n: i]
        else:
            orders = [lambda i, n: (i + 1) % n, lambda i, n: n - 1 - i]
        for order in orders:
            with monkeypatch.context() as patch:
                if launch.INTERPRETING:
                    reorder(patch, order)
                assert all(map(torch.equal, run(), first))
            assert not any(kept.any() for kept in counters._of_stream.values())
        return first

    return run_all


def reorder(patch, order):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx
    patch.setattr(builder, "set_grid_idx", lambda *at: place(*map(order, at, builder.grid_dim)))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["NHWC", "NCHW"])
def test_bn_stats(large_gpu, in_any_order, take, layout, dtype, config):
    """Two columns of channels, the second not full, and a split that is not full."""
    torch.manual_seed(0)
    x = (torch.randn(3, 72, 17, 19) + torch.linspace(-9, 9, 72)[:, None, None]).to(dtype)
    x = x.contiguous(memory_format=layout).to(DEVICE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.rand(2, 72, dtype=wide, device=DEVICE)
    take(config)
    found = in_any_order(lambda: bn_stats_finalized(x, weight, bias, 1e-5))
    exact = reference.bn_stats(x.double())
    norm = reference.bn_finalize(*exact, x.numel() // x.size(1), weight, bias, 1e-5)
    for actual, expected in zip(found, (*exact, *norm), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("values", WALKS)
def test_bn_stats_of_a_walk(large_gpu, values):
    """108 splits of one tile: a mean within 1e-6 deviations, a variance within the bound of
    `merge_moments`.
    """
    torch.manual_seed(0)
    v = WALKS[values](torch.randn(3 * 32 * 36, 32))
    x = v.reshape(3, 32, 36, 32).permute(0, 3, 1, 2).to(DEVICE)
    mean, m2 = (t.double().cpu() for t in bn_stats_finalized(x, None, None, None))
    exact, spread = reference.bn_stats(x.double().cpu())
    deviation = (spread / len(v)).sqrt()
    assert ((mean - exact).abs() <= 1e-7 * exact.abs() + 1e-6 * deviation).all()
    torch.testing.assert_close(m2, spread, rtol=3e-7 * (1 + 108), atol=1e-12)


def test_one_launch(monkeypatch):
    """Counters are zeroed by the kernel and by nothing else."""
    x = torch.randn(2, 16, 9, 9).contiguous(memory_format=NHWC).to(DEVICE)
    bn_stats_finalized(x, None, None, 1e-5)
    with Launches(monkeypatch) as launches:
        bn_stats_finalized(x, None, None, 1e-5)
    assert launches.kernels == ["bn_stats_kernel"] and launches.calls == []
