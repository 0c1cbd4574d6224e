"""The end of a squeeze-and-excitation block against PyTorch: y, every gradient, statistics.

The twin is `twin`: batch_norm, mean, gate, product, sum, ReLU.
"""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twins
from test_autograd import saved_bytes
from test_gradcheck import gradcheck, normal
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from resnet_fast import functional
from resnet_fast.functional import gated_join
from resnet_fast.spec.chain import Norm, NormParams, Running
from resnet_fast.spec.layout import memory_format

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = "image_stats", "gated_act", "gated_act_bwd_reduce", "gated_act_bwd_apply", "bn_finalize"
NORMS = {"batch": Norm(), "frozen": Norm(1e-3, batch_stats=False), "none": None}
SHAPES = {  # [N,C,H,W]
    "7x7": (3, 24, 7, 7),
    "rgb": (2, 3, 9, 11),
    "one-image": (1, 8, 6, 5),
    "one-pixel": (5, 24, 1, 1),
    "one-channel": (2, 1, 5, 7),
    "c17": (3, 17, 5, 3),
    "c531": (2, 531, 2, 3),
    "many-pixels": (2, 5, 40, 33),
}
NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
RELU = pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])


class Gate(nn.Module):
    """Two 1x1 convolutions, as in SENet."""

    def __init__(self, channels, planes=2):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, planes, 1)
        self.excite = nn.Conv2d(planes, channels, 1)

    def forward(self, pooled):
        return self.excite(self.squeeze(pooled).tanh()).sigmoid()


class Across(nn.Module):
    """A convolution over neighbouring channels, as in ECA-Net."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, pooled):
        return self.conv(pooled.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None].sigmoid()


def twin(z, norm, params, gate, residual=None, relu=True, running=None, impl=None):
    """`gated_join` by PyTorch's own ops."""
    u = z
    if norm is not None:
        weight, bias, mean, var = params
        momentum = 0.1 if running is None else running.momentum
        if running is not None and norm.batch_stats:
            running.num_batches_tracked.add_(1)
        u = F.batch_norm(z, mean, var, weight, bias, norm.batch_stats, momentum, norm.eps)
    y = u * gate(u.mean((2, 3), keepdim=True))
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


class Case:
    """Tensors of one call in fp64, exact in fp32; `step` runs it in any dtype."""

    def __init__(self, norm, shape, layout, residual, relu, gate=Gate, device="cpu", mean=0.0):
        c, self.norm, self.relu, self.layout = shape[1], norm, relu, layout
        draw = functools.partial(torch.randn, device=device)
        self.gate = gate(c).to(device)
        self.tensors = {"z": draw(shape) + mean}
        if residual:
            self.tensors["residual"] = draw(shape)
        if norm is not None:
            self.tensors |= {"weight": draw(c) + 1, "bias": draw(c)}
        self.buffers = {"mean": draw(c), "var": draw(c).abs() + 0.5}
        self.buffers["tracked"] = torch.tensor(3, device=device)
        self.dy = draw(shape)

    def rounded(self, dtype):
        """The same case with values of `dtype` and, with a residual, no ReLU at its kink."""
        for values in (self.tensors, self.buffers):
            for name, t in values.items():
                values[name] = t.to(dtype).to(t.dtype)
        self.dy = self.dy.to(dtype).float()
        self.gate.to(dtype).float()
        if "residual" in self.tensors and self.relu:
            band = 32 * torch.finfo(dtype).eps
            with torch.no_grad():
                u = self.run(twin, torch.float64, relu=False)[0]
            near = torch.where(u < 0, -band, band) * (u.abs() < band)
            wide = self.tensors["residual"] + 2 * near
            self.tensors["residual"] = wide.to(dtype).float()
        return self

    def run(self, join, dtype, impl="auto", **changed):
        """y, and the leaves, buffers and gate that gave it."""

        def own(t):
            t = t.to(dtype if t.is_floating_point() else t.dtype, copy=True)
            return t.contiguous(memory_format=self.layout) if t.dim() == 4 else t

        leaves = {name: own(t).requires_grad_() for name, t in self.tensors.items()}
        buffers = {name: own(t) for name, t in self.buffers.items()}
        gate = copy.deepcopy(self.gate).to(dtype)
        mean, var, tracked = buffers.values()
        params = NormParams(leaves.get("weight"), leaves.get("bias"), mean, var)
        given = {"residual": leaves.get("residual"), "relu": self.relu, **changed}
        y = join(
            leaves["z"], self.norm, params, gate, running=Running(0.3, tracked), impl=impl, **given
        )
        leaves |= {f"gate.{name}": p for name, p in gate.named_parameters()}
        return y, leaves, buffers

    def step(self, join, dtype, impl="auto"):
        """y, every gradient and the buffers, as `twins.step`."""
        y, leaves, buffers = self.run(join, dtype, impl)
        dy = self.dy.to(dtype).contiguous(memory_format=self.layout)
        return twins.step(lambda: y, leaves, dy, buffers)


def judge(case, impl, dtype):
    found = case.step(gated_join, dtype, impl.name)
    same = functools.partial(case.step, twin, torch.float32 if dtype == torch.float64 else dtype)
    twins.judge(found, same(), case.step(twin, torch.float64), again=same)
    return found


@RESIDUAL
@RELU
@NORM
def test_against_pytorch(impl, dtype, layout, norm, relu, residual):
    """In 16 bits with a ReLU only beside a residual, which keeps its input off the kink."""
    impl.need(dtype, *OPS)
    if relu and not residual and dtype.itemsize == 2:
        residual = True
    for name, shape in SHAPES.items():
        if impl.interpreted and name in ("c531", "many-pixels"):
            continue
        if relu and not residual:
            case = twins.away_from_kink(
                lambda shape=shape: (Case(norm, shape[:1] + (min(shape[1], 24),) + shape[2:],
                                          layout, False, True, device=impl.device),),
                lambda case: case.run(twin, torch.float64), 1e-6,
            )[0]  # fmt: skip
        else:
            case = Case(norm, shape, layout, residual, relu, device=impl.device).rounded(dtype)
        found = judge(case, impl, dtype)
        assert found["y"].is_contiguous(memory_format=memory_format(case.run(twin, dtype)[0])), name


@NORM
def test_other_gates(impl, layout, norm):
    impl.need(torch.float32, *OPS)
    case = Case(norm, (3, 24, 7, 7), layout, True, True, Across, impl.device).rounded(torch.float32)
    judge(case, impl, torch.float32)


@NORM
def test_far_mean(impl, layout, norm):
    """A mean of 30 deviations: sums are centred."""
    impl.need(torch.float32, *OPS)
    case = Case(norm, (3, 8, 9, 7), layout, True, False, device=impl.device, mean=30.0)
    if norm is not None and not norm.batch_stats:
        case.buffers["mean"] += 30
    judge(case.rounded(torch.float32), impl, torch.float32)


@RESIDUAL
@RELU
@NORM
def test_gradcheck(impl, layout, norm, relu, residual):
    impl.need(torch.float64, *OPS)
    running = torch.randn(4).double(), torch.rand(4).double() + 0.5

    def run(join, z, w, bias, first, second, res=None):
        def gate(pooled):
            return F.conv2d(F.conv2d(pooled, first).tanh(), second).sigmoid()

        params = NormParams(w, bias, *running)
        y = join(z, norm, params, gate, res, relu, impl=impl.name)
        return y if norm is not None else y + 0 * (w + bias).sum()

    def inputs():
        acts = [normal(2, 4, 3, 2, layout=layout) for _ in range(1 + residual)]
        return [acts[0], normal(4), normal(4), normal(3, 4, 1, 1), normal(4, 3, 1, 1), *acts[1:]]

    def plain(*args):
        frozen = norm is None or not norm.batch_stats
        saved = [t.clone() for t in running]
        y = run(twin, *args)
        assert frozen or not torch.equal(saved[0], running[0])
        for t, value in zip(running, saved, strict=True):
            t.copy_(value)
        return y

    args = twins.away_from_kink(inputs, plain)
    assert gradcheck(impl, functools.partial(run, gated_join), args)


def batch_case(impl="auto", **options):
    """A call with everything, ready to differentiate: z, gate, run."""
    device = "cpu" if impl == "auto" else impl.device
    case = Case(Norm(), (3, 8, 5, 4), torch.channels_last, True, True, device=device, **options)
    return case.rounded(torch.float32)


def test_hooks_and_a_second_backward(impl):
    """A hook on a parameter of the gate runs once; the graph may be used again."""
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    y, leaves, _ = case.run(gated_join, torch.float32, impl.name)
    expected, others, _ = case.run(twin, torch.float32)
    for given in (leaves, others):
        given["gate.squeeze.weight"].register_hook(lambda grad: 2 * grad)
    for _ in range(2):
        y.backward(case.dy, retain_graph=True)
        expected.backward(case.dy, retain_graph=True)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, others[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["z", "residual", "weight", "bias", "gate.excite.weight"])
def test_one_gradient_alone(impl, wanted):
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    for join in (gated_join, twin):
        y, leaves, _ = case.run(join, torch.float32, impl.name)
        (grad,) = torch.autograd.grad(y, [leaves[wanted]], case.dy)
        if join is gated_join:
            found = grad
    torch.testing.assert_close(found, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained", ["gate", "residual", "norm"])
def test_partly_frozen(impl, trained):
    """Only some of the inputs need a gradient."""
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    grads = []
    for join in (gated_join, twin):
        own = {name: t.clone() for name, t in case.tensors.items()}
        gate = copy.deepcopy(case.gate).requires_grad_(trained == "gate")
        leaves = {"gate": list(gate.parameters()), "residual": [own["residual"]],
                  "norm": [own["weight"], own["bias"]]}[trained]  # fmt: skip
        for leaf in leaves:
            leaf.requires_grad_()
        params = NormParams(own["weight"], own["bias"], None, None)
        y = join(own["z"], case.norm, params, gate, own["residual"], impl=impl.name)
        grads.append(torch.autograd.grad(y, leaves, case.dy))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "gate",
    [torch.ones_like, lambda pooled: pooled.detach().sigmoid(), lambda pooled: pooled],
    ids=["constant", "detached", "identity"],
)
def test_gates_without_parameters(gate):
    """A constant gate leaves a batch normalization; one that is `pooled` has two paths to z."""
    case = batch_case()
    found, expected = (_gradients(case, join, gate) for join in (gated_join, twin))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _gradients(case, join, gate):
    leaves = [t.clone().requires_grad_() for t in case.tensors.values()]
    z, residual, weight, bias = leaves
    y = join(z, case.norm, NormParams(weight, bias, None, None), gate, residual)
    return [y, *torch.autograd.grad(y, leaves, case.dy)]


def test_pooled_in_another_loss():
    """The gate may keep its input: the graph is PyTorch's, also without a gradient of y."""
    case, kept = batch_case(), []

    def gate(pooled):
        kept.append(pooled)
        return pooled.sigmoid()

    for alone in (True, False):
        results = []
        for join in (gated_join, twin):
            z = case.tensors["z"].clone().requires_grad_()
            params = NormParams(case.tensors["weight"], None, None, None)
            y = join(z, case.norm, params, gate)
            loss = kept[-1].square().sum() + (0 if alone else (y * case.dy).sum())
            results.append(torch.autograd.grad(loss, z)[0])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_double_backward_is_refused():
    y, leaves, _ = batch_case().run(gated_join, torch.float32)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(y.sum(), leaves["z"], create_graph=True)


def test_saved(impl):
    """z, one bit an element and vectors; plain PyTorch keeps z, u, and the result or its sign."""
    impl.need(torch.float32, *OPS)
    z, residual = (torch.randn(2, 8, 16, 8, device=impl.device, requires_grad=True) for _ in "zr")
    params = NormParams(torch.ones(8, device=impl.device), None, None, None)
    run = functools.partial(gated_join, z, Norm(), params, torch.sigmoid, residual, impl=impl.name)
    assert saved_bytes(run) < 4.5 * z.numel()
    assert saved_bytes(functools.partial(twin, z, Norm(), params, torch.sigmoid, residual)) > (
        11 * z.numel()
    )


def test_inference_keeps_nothing(impl):
    """No graph and no mask, and the same result."""
    impl.need(torch.float32, *OPS)
    case = Case(NORMS["frozen"], (2, 8, 5, 4), torch.channels_last, True, True, device=impl.device)
    y, *_ = case.run(gated_join, torch.float32, impl.name)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), mock.patch.object(
            functional.ops, "gated_act", wraps=functional.ops.gated_act
        ) as op, mock.patch.object(functional, "GateFunction", None):
            found, *_ = case.run(gated_join, torch.float32, impl.name)
        assert not found.requires_grad and found.grad_fn is None and torch.equal(found, y)
        assert [call.args[5] for call in op.call_args_list] == [False]


def test_replayed(impl):
    """Later calls repeat the steps of an earlier one, on other values."""
    impl.need(torch.float32, *OPS)
    for seed in range(4):
        torch.manual_seed(seed)
        judge(batch_case(impl), impl, torch.float32)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(impl, momentum):
    """As `nn.BatchNorm2d` keeps them, over several steps."""
    impl.need(torch.float32, *OPS)
    norm = nn.BatchNorm2d(8, momentum=momentum, device=impl.device)
    own = copy.deepcopy(norm)
    params = NormParams(own.weight, own.bias, own.running_mean, own.running_var)
    for _ in range(3):
        z = torch.randn(2, 8, 5, 4, device=impl.device) + 1
        norm(z)
        running = Running(momentum, own.num_batches_tracked)
        gated_join(z, Norm(), params, torch.sigmoid, running=running, impl=impl.name)
    assert own.num_batches_tracked == norm.num_batches_tracked == 3
    torch.testing.assert_close(own.running_mean, norm.running_mean)
    torch.testing.assert_close(own.running_var, norm.running_var)


@pytest.mark.parametrize("norm", [NORMS["frozen"], None], ids=["frozen", "none"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_not_finite(impl, norm, bad):
    """Where PyTorch has NaN or infinity, and nowhere else."""
    impl.need(torch.float32, *OPS)
    case = Case(norm, (2, 8, 5, 4), torch.channels_last, True, True, device=impl.device)
    case.tensors["z"][1, 3, 2, 1] = bad
    found = case.step(gated_join, torch.float32, impl.name)
    expected = case.step(twin, torch.float32)
    for name, value in expected.items():
        assert torch.equal(found[name].isfinite(), value.isfinite()), name
        both = value.isfinite()
        torch.testing.assert_close(found[name][both], value[both], rtol=1e-3, atol=1e-4)
    assert not expected["dz"][1, 3].isfinite().any()


def test_batch_with_infinity(impl):
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    case.tensors["z"][1, 3, 2, 1] = float("inf")
    found, expected = (case.step(join, torch.float32) for join in (gated_join, twin))
    assert torch.equal(found["y"].isnan(), expected["y"].isnan())


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64, torch.float32),
], ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))  # fmt: skip
def test_promotion(dtypes):
    """y has the dtype that PyTorch gives for z, the gate's result and the residual."""
    of_z, of_gate, of_residual = dtypes
    case = batch_case()
    results = []
    for join in (gated_join, twin):
        z, residual, weight, bias = (t.clone() for t in case.tensors.values())
        z, residual = z.to(of_z).requires_grad_(), residual.to(of_residual).requires_grad_()
        params = NormParams(weight, bias, None, None)
        y = join(z, case.norm, params, lambda pooled: pooled.to(of_gate).sigmoid(), residual)
        results.append((y, *torch.autograd.grad(y, (z, residual), torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
    torch.testing.assert_close(*(r[0] for r in results), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("of_z", [torch.float32, torch.bfloat16])
def test_autocast(of_z):
    """The gate's convolutions run in bf16, as in the twin."""
    case, results = batch_case(), []
    for join in (gated_join, twin):
        z = case.tensors["z"].to(of_z).requires_grad_()
        params = NormParams(case.tensors["weight"], case.tensors["bias"], None, None)
        gate = copy.deepcopy(case.gate)
        with torch.autocast("cpu", torch.bfloat16):
            y = join(z, case.norm, params, gate, case.tensors["residual"].to(of_z))
        y.float().sum().backward()
        results.append((y, z.grad, gate.squeeze.weight.grad))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)


def test_transforms():
    """torch.func, forward-mode AD and tracing run PyTorch's ops."""
    case = batch_case()
    z, residual, weight, bias = case.tensors.values()
    params = NormParams(weight, bias, None, None)

    def run(join, z):
        return join(z, case.norm, params, case.gate, residual)

    plain, own = functools.partial(run, twin), functools.partial(run, gated_join)
    v = torch.randn_like(z)
    assert torch.equal(torch.func.jvp(own, (z,), (v,))[1], torch.func.jvp(plain, (z,), (v,))[1])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, v)
        found, expected = (forward_ad.unpack_dual(f(dual)).tangent for f in (own, plain))
    assert torch.equal(found, expected)
    with torch.no_grad():
        case.gate.requires_grad_(False)
        traced = torch.jit.trace(lambda z: own(z), z)
        torch.testing.assert_close(traced(z + 1), plain(z + 1))


def test_compiled():
    """One graph of PyTorch's ops, with the same results."""
    case = batch_case()
    z, residual, weight, bias = case.tensors.values()
    z = z.clone().requires_grad_()

    def run(join, z):
        return join(z, case.norm, NormParams(weight, bias, None, None), case.gate, residual)

    own = functools.partial(run, gated_join)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    found, expected = compiled(z), run(twin, z)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(y, z, case.dy)[0] for y in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_group(tmp_path):
    """A norm with a process group: its statistics are shared, PyTorch's ops do the rest."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        case = batch_case()
        case.norm = Norm(group=dist.group.WORLD)
        with mock.patch.object(functional, "PoolFunction", None):
            found = case.step(gated_join, torch.float32)
        case.norm = Norm()
        expected = case.step(twin, torch.float32)
    finally:
        dist.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_checkpointed_and_offloaded(impl):
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    expected = case.step(gated_join, torch.float32, impl.name)

    def again(*args, **options):
        return checkpoint(gated_join, *args, use_reentrant=False, **options)

    case.buffers["mean"] = case.buffers["mean"].clone()
    found = case.step(again, torch.float32, impl.name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().contiguous(), lambda t: t):
        moved = case.step(gated_join, torch.float32, impl.name)
    for name, value in expected.items():
        if name in ("y", "dz", "dresidual", "dweight", "dbias"):
            assert torch.equal(found[name], value), name
        assert torch.equal(moved[name], value), name


def test_strided_inputs(impl):
    """Slices and expanded tensors are copied into one of the two formats."""
    impl.need(torch.float32, *OPS)
    case = batch_case(impl)
    z, residual, weight, bias = case.tensors.values()
    wide = torch.stack([z, z + 1], -1)[..., 0]
    given = NormParams(weight, bias, None, None), case.gate
    found = gated_join(wide, case.norm, *given, residual.contiguous(), impl=impl.name)
    expected = twin(z, case.norm, *given, residual)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    spread = residual[:1].expand_as(z).detach().requires_grad_()
    y = gated_join(z, case.norm, *given, spread, impl=impl.name)
    dy = case.dy[:1].expand_as(y)
    (found,) = torch.autograd.grad(y, spread, dy)
    assert torch.equal(found, torch.where(y > 0, dy, 0.0))


def test_empty_batch(impl):
    impl.need(torch.float32, *OPS)
    for norm in (NORMS["frozen"], Norm()):
        case = Case(norm, (0, 8, 5, 4), torch.channels_last, True, True, device=impl.device)
        found = case.step(gated_join, torch.float32, impl.name)
        assert found["y"].shape == found["dz"].shape == (0, 8, 5, 4)
        assert not found["dweight"].any() and torch.equal(found["mean"], case.buffers["mean"])


Z, VECTOR = torch.randn(2, 8, 5, 4), torch.randn(8)
WRONG = {
    "dimensions": ((Z[0], NormParams()), {}, "x: expected 4 dimensions"),
    "dtype": ((Z.int(), NormParams()), {}, "x: expected one of float32"),
    "weight": ((Z, NormParams(VECTOR[1:])), {}, r"bn_weight: expected shape \(8,\)"),
    "half-statistics": ((Z, NormParams(None, None, VECTOR)), {}, "running_mean, running_var: exp"),
    "residual": ((Z, NormParams()), {"residual": Z[:1]}, "residual: expected the output's shape"),
    "one-value": ((Z[:1, :, :1, :1], NormParams()), {}, "x: expected more than 1 value per chan"),
    "impl": ((Z, NormParams()), {"impl": "none"}, "impl: expected one of 'auto'"),
    "gate": ((Z, NormParams()), {"gate": lambda p: p[0]}, r"gate: .*\(2, 8, 1, 1\), got \(8, 1"),
    "gate-type": ((Z, NormParams()), {"gate": lambda p: 1.0}, "gate: .*got float"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    (z, params), options, message = WRONG[name]
    options = {"gate": torch.sigmoid, **options}
    with pytest.raises(ValueError, match=message):
        gated_join(z, Norm(), params, **options)
