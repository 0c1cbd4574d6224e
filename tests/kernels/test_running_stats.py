"""Running statistics by one launch: against fp64, where PyTorch's ops run instead, what is seen."""


import pytest
import torch
from test_kernels import DEVICE
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import kernels
from resnet_fast.autograd import running_stats
from resnet_fast.autograd.running_stats import Batch, update_running
from resnet_fast.dispatch import backends, replay
from resnet_fast.kernels import running_stats as kernel
from resnet_fast.spec.chain import Chain, Norm, NormParams, Running
from resnet_fast.spec.tolerance import assert_close

CHAIN = Chain((), (Norm(),), impl="triton")
SIZES = (24, 300, 7)


@pytest.fixture
def launches(monkeypatch):
    """The grid of each launch of the kernel."""
    grids, start = [], kernel.launch

    def counted(*args, **options):
        grids.append(args[1])
        start(*args, **options)

    monkeypatch.setattr(kernel, "launch", counted)
    monkeypatch.setattr(replay, "DEVICES", set())
    return grids


def norms_of(momenta=(0.1,) * 3, running=torch.float32, wide=torch.float32, counted=True,
             bias=False, total=False, n=5):  # fmt: skip
    """A norm of SIZES channels for each momentum, after 6 batches, and a batch of n pixels."""
    norms = []
    with torch.device(DEVICE):
        for channels, momentum in zip(SIZES, momenta, strict=False):
            x = torch.randn(n, channels, dtype=torch.float64) + 3.0
            mean = x.sum(0) / max(n, 1)
            m2 = (x - mean).square().sum(0)
            statistics = torch.randn(channels).to(running), (torch.rand(channels) + 0.5).to(running)
            batch = Batch(
                mean.to(wide), m2.to(wide), torch.full((1,), n, dtype=wide) if total else n,
                torch.randn(channels).to(running) if bias else None,
            )  # fmt: skip
            rule = Running(momentum, torch.tensor(6) if counted else None)
            norms.append((rule, NormParams(None, None, *statistics), batch))
    return norms


def buffers(norms):
    return [
        t
        for rule, params, _ in norms
        for t in (*params[2:], rule.num_batches_tracked)
        if t is not None
    ]


def copied(norms):
    def copy_of(values):
        return type(values)(*(t.clone() if isinstance(t, torch.Tensor) else t for t in values))

    return [tuple(map(copy_of, norm)) for norm in norms]


def in_fp64(norms):
    """`buffers` after an update as `nn.BatchNorm2d` defines it, in fp64."""
    found = []
    for rule, params, (mean, m2, count, bias) in norms:
        tracked = rule.num_batches_tracked
        if tracked is not None:
            tracked = tracked + 1
        share = 1.0 / tracked.double() if rule.momentum is None else rule.momentum
        centre = mean.double() + (0.0 if bias is None else bias.double())
        for old, new in zip(params[2:], (centre, m2.double() / (count - 1)), strict=True):
            found.append((1 - share) * old.double() + share * new)
        if tracked is not None:
            found.append(tracked)
    return found


def judge(norms, steps=2):
    """Compare `steps` updates with fp64 and with PyTorch's in the same dtypes."""
    for _ in range(steps):
        exact, same = in_fp64(norms), copied(norms)
        running_stats._by_pytorch(same)
        update_running(CHAIN, norms)
        for found, plain, wanted in zip(buffers(norms), buffers(same), exact, strict=True):
            if found.is_floating_point():
                assert_close(found, plain, wanted, "running statistics")
            else:
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("momenta", [(0.1, 0.3, 0.1), (None,) * 3], ids=["several", "cumulative"])
@pytest.mark.parametrize("total", [False, True], ids=["count", "shared"])
def test_replayed(launches, monkeypatch, momenta, total):
    """The third and fourth update are replayed: no new launch goes through the launcher."""
    monkeypatch.setattr(replay, "DEVICES", {"cpu", "cuda"})
    replay.forget()
    judge(norms_of(momenta, total=total), steps=4)
    assert len(launches) == 2 * len(set(momenta))
    replay.forget()


@pytest.mark.parametrize("options", [{}, {"counted": False}, {"bias": True}, {"total": True}],
                         ids=["plain", "uncounted", "bias", "shared"])  # fmt: skip
@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (0.1, 0.0, 1.0), (None, None, None),
                                     (None, 0.3, None)],
                         ids=["same", "several", "cumulative", "both"])  # fmt: skip
def test_update(launches, momenta, options):
    """One launch for each momentum."""
    if None in momenta and "counted" in options:
        pytest.skip("the cumulative average needs the count")
    judge(norms_of(momenta, **options))
    assert len(launches) == 2 * len(set(momenta))
    assert sum(norms for _, norms in launches) == 2 * 3


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("running", [torch.float16, torch.bfloat16, torch.float32, torch.float64],
                         ids=["fp16", "bf16", "fp32", "fp64"])  # fmt: skip
def test_other_dtypes(launches, running, wide):
    judge(norms_of(running=running, wide=wide, bias=True))
    there = kernels.refusal("bn_finalize", DEVICE, running) is None  # no bf16 in the interpreter
    assert len(launches) == 2 * there


def test_many_norms(launches, monkeypatch):
    """More than a launch takes."""
    monkeypatch.setattr(kernel, "MOST", 2)
    judge(norms_of())
    assert [norms for _, norms in launches] == [2, 1] * 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batches_and_norms_without_statistics(launches, momentum):
    """The batch is counted, and nothing else changes."""
    empty, _, (rule, _, batch) = norms_of((momentum,) * 3, n=0)
    norms = [empty, (rule, NormParams(), batch._replace(count=5))]
    before = copied(norms)
    update_running(CHAIN, norms)
    for (rule, params, _), (old_rule, old, _) in zip(norms, before, strict=True):
        assert rule.num_batches_tracked == old_rule.num_batches_tracked + 1
        assert params.running_mean is None or torch.equal(params.running_mean, old.running_mean)
        assert params.running_var is None or torch.equal(params.running_var, old.running_var)


def test_infinity_stays(launches):
    """As in PyTorch's norms on a CPU: a variance that overflowed does not become NaN."""
    norms = norms_of((0.1,))
    norms[0][1].running_var[3] = float("inf")
    norms[0][2].m2[5] = float("inf")
    update_running(CHAIN, norms)
    assert norms[0][1].running_var.isinf().nonzero().flatten().tolist() == [3, 5]
    assert len(launches) == 1


def sliced(norms):
    rule, params, batch = norms[0]
    wide = torch.zeros(2 * SIZES[0], device=DEVICE)[::2]
    norms[0] = rule, params._replace(running_mean=wide), batch


def counted_by_a_float(norms):
    norms[0] = (norms[0][0]._replace(num_batches_tracked=torch.tensor(6.0, device=DEVICE)),
                *norms[0][1:])  # fmt: skip


def of_a_subclass(norms):
    rule, params, batch = norms[0]
    other = params.running_var.as_subclass(type("Other", (torch.Tensor,), {}))
    norms[0] = rule, params._replace(running_var=other), batch


@pytest.mark.parametrize("change", [sliced, counted_by_a_float, of_a_subclass])
def test_tensors_that_the_kernel_does_not_take(launches, monkeypatch, change):
    """PyTorch's ops run, the third time from the recording where replay takes the tensors."""
    monkeypatch.setattr(replay, "DEVICES", {"cpu", "cuda"})
    replay.forget()
    norms = norms_of()
    change(norms)
    judge(norms, steps=3)
    assert not launches
    replay.forget()


class Onlooker(TorchDispatchMode):
    seen = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = (*self.seen, func)
        return func(*args, **(kwargs or {}))


def test_who_looks_on_sees_ops(launches):
    """Dispatch modes and traces have PyTorch's ops, as before."""
    with Onlooker() as mode:
        judge(norms_of(), steps=1)
    assert torch.ops.aten._foreach_add_.Scalar in mode.seen

    def traced(mean, m2, running_mean, running_var):
        batch = Batch(mean, m2, 5, None)
        params = NormParams(None, None, running_mean, running_var)
        update_running(CHAIN, [(Running(0.1), params, batch)])
        return running_mean

    graph = make_fx(traced)(*torch.rand(4, 8, device=DEVICE))
    assert "_foreach_" in graph.code and not launches


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_other_implementations_do_without(launches, impl):
    if backends.refusal(impl, "bn_finalize", DEVICE, torch.float32):
        pytest.skip(f"{impl} is not built")
    update_running(Chain((), (Norm(),), impl=impl), norms_of())
    assert not launches


def test_a_norm_may_run_plain_and_fused_before_a_backward_pass(launches):
    """PyTorch's own calls save the statistics, and do not count updates of them either."""
    norms = norms_of((0.1,))
    running, tracked = norms[0][1].running_var, norms[0][0].num_batches_tracked
    scale = torch.ones_like(running, requires_grad=True)
    y, before, counted = (scale * running).sum(), running._version, tracked._version
    update_running(CHAIN, norms)
    assert len(launches) == 1 and running._version == before and tracked._version > counted
    y.backward()
    norms[0][1].running_mean.requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        update_running(CHAIN, norms)
