"""Every op of the contract: each implementation against the fp64 reference, masks, opcheck."""

import pytest
import torch
import torch.nn.functional as F
from judge import judge_impl

from resnet_fast.dispatch import backends, ops
from resnet_fast.spec import reference
from resnet_fast.spec.dtypes import stats_dtype
from resnet_fast.spec.layout import is_channels_last, mask_shape, memory_format
from resnet_fast.spec.tolerance import MAX_KINK_SHARE, assert_close, near_kink
from resnet_fast.verify.op_cases import (
    CONVOLUTIONS,
    CONVS,
    EMPTY,
    EMPTY_CONV,
    POINTWISE,
    SHAPES,
    Draw,
    cast,
    op_of,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


FULL_OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor",
                "test_aot_dispatch_dynamic")  # fmt: skip


def shapes(impl, variant):
    """Those of SHAPES that show something: tiles of a pool have 64 channels at most, of which 72
    are two; 531 would take the interpreter most of a test's time.
    """
    pools = impl.interpreted and "pool" in variant
    return {name: shape for name, shape in SHAPES.items() if not (pools and name == "c531")}


@pytest.mark.slow
@pytest.mark.parametrize("variant", POINTWISE)
def test_pointwise(impl, dtype, layout, variant):
    impl.need(dtype, op_of(variant))
    for name, shape in shapes(impl, variant).items():
        args = POINTWISE[variant](Draw(dtype, layout, impl.device), shape)
        judge_impl(impl, variant, args, name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONVOLUTIONS)
@pytest.mark.leave_out(
    cases=lambda case: "fp32-filters" in case.variant and case.dtype == torch.float64
)
def test_convolution(impl, dtype, layout, variant):
    impl.need(dtype, op_of(variant))
    for name, conv in CONVS.items():
        args = CONVOLUTIONS[variant](Draw(dtype, layout, impl.device), conv)
        judge_impl(impl, variant, args, name)


@pytest.mark.parametrize("filters", [3, 1])
def test_filters_in_channels_last_decide_the_format(impl, filters):
    """Of the output, whatever x has: a compiled graph holds the strides of its example."""
    impl.need(torch.float32, "conv_bn_act", "conv_fprop")
    nhwc = torch.channels_last
    x = torch.randn(2, 8, 5, 7, device=impl.device)
    w = torch.randn(8, 8, filters, filters, device=impl.device).to(memory_format=nhwc)
    residual = torch.randn_like(x)
    geometry = [1, 1], [filters // 2] * 2, [1, 1], 1, impl.name
    for op, rest in (
        (ops.conv_fprop, (w, None, None, True, None, None, 1e-5, None, False)),
        (ops.conv_bn_act, (w, None, None, None, None, None, residual, True, 0.0)),
    ):
        operator = getattr(torch.ops.resnet_fast, op.__name__).default
        torch.library.opcheck(operator, (x, *rest, *geometry), test_utils=("test_faketensor",))
        found = op(x, *rest, *geometry)
        expected = op(x.to(memory_format=nhwc), *rest, *geometry)
        for one, other in zip(as_tuple(found), as_tuple(expected), strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONVS)
def test_cutlass_by_name(impl, layout, name, monkeypatch):
    """RESNET_FAST_CUDA_CONV=cutlass refuses channels that CUTLASS does not take, and says so."""
    if impl.name != "native" or impl.device != "cuda":
        pytest.skip("the choice is of the native CUDA ops")
    if backends.build_info()["cutlass"] != "built in":
        pytest.skip("built without CUTLASS")
    conv = CONVS[name]
    args = CONVOLUTIONS["conv_bn_act"](Draw(torch.bfloat16, layout, impl.device), conv)
    monkeypatch.setenv("RESNET_FAST_CUDA_CONV", "cutlass")
    eights = conv.filters % 8 == 0 and (conv.shape[1] % 8 == 0 or conv.shape[1] < 8)
    if eights or conv.groups != 1 or memory_format(*args[:2]) != torch.channels_last:
        judge_impl(impl, "conv_bn_act", args, name)
        return
    with pytest.raises(RuntimeError, match="w: CUTLASS takes channels and filters that are mult"):
        ops.conv_bn_act(*args, impl.name)


@pytest.mark.parametrize("variant", [*POINTWISE, *CONVOLUTIONS])
def test_empty_batch(impl, layout, variant):
    impl.need(torch.float32, op_of(variant))
    make, size = (CONVOLUTIONS, EMPTY_CONV) if variant in CONVOLUTIONS else (POINTWISE, EMPTY)
    args = make[variant](Draw(torch.float32, layout, impl.device), size)
    judge_impl(impl, variant, args, "an empty batch")


@pytest.mark.parametrize("variant", ["bn_act", "bn_act:residual", "bn_act:dual", "add_relu"])
def test_mask(impl, dtype, layout, variant):
    """Bit i of a row's byte is element 8·byte + i, as in the reference, padding bits zero."""
    op = op_of(variant)
    impl.need(dtype, op)
    for name, shape in shapes(impl, variant).items():
        args = POINTWISE[variant](Draw(dtype, layout, impl.device), shape)
        y, mask = getattr(torch.ops.resnet_fast, op)(*args, impl.name)
        wide = cast(args)
        u = wide[0] + wide[1] if op == "add_relu" else reference.bn_act(*wide[:-2], False, False)[0]
        u = u.contiguous(memory_format=memory_format(args[0]))
        band = near_kink(u, stats_dtype(args[0]))
        if op == "add_relu":  # one sum: its sign is exact
            band = torch.zeros_like(band)
        assert band.double().mean().item() <= MAX_KINK_SHARE, name
        differs = mask ^ reference.pack_mask(u > 0)
        assert not torch.any(differs & ~reference.pack_mask(band)), name
        assert torch.equal(reference.unpack_mask(mask, y) & (y != 0), y > 0), name


@pytest.mark.parametrize("variant", ["bn_act", "bn_act:residual", "add_relu"])
def test_nan_passes_relu(impl, layout, variant):
    """As in PyTorch, relu(NaN) is NaN, and its gradient flows."""
    op = op_of(variant)
    impl.need(torch.float32, op)
    args = POINTWISE[variant](Draw(torch.float32, layout, impl.device), (2, 24, 5, 7))
    args[0][1, 3, 2, 1] = float("nan")
    args[0][0, 5, 1, 1] = float("inf")
    y, mask = getattr(torch.ops.resnet_fast, op)(*args, impl.name)
    expected, _ = getattr(reference, op)(*args)
    assert torch.equal(y.isnan(), expected.isnan()) and y.isnan().sum() >= 1
    assert reference.unpack_mask(mask, y)[1, 3, 2, 1]


def test_relu_of_zero_has_no_gradient(impl, layout):
    """Where scale·x + shift is 0 exactly, as PyTorch has it."""
    impl.need(torch.float32, "conv_bprop")
    draw = Draw(torch.float32, layout, impl.device)
    dy, w, x, *rest = CONVOLUTIONS["conv_bprop:only-dx"](draw, CONVS["3x3"])
    scale, shift = rest[6:8]
    x[:, :, ::2], shift[:] = 0.0, 0.0
    dx = torch.ops.resnet_fast.conv_bprop(dy, w, x, *rest, impl.name)[0]
    assert scale.abs().min() > 0 and not dx[:, :, ::2].any() and dx[:, :, 1::2].any()


@pytest.mark.parametrize("variant", ["bn_relu_max_pool", "bn_relu_max_pool:oblong"])
def test_index(impl, dtype, layout, variant):
    """The index names a position of its window that has the maximum; NONE says there was none."""
    impl.need(dtype, "bn_relu_max_pool")
    for name, shape in shapes(impl, variant).items():
        args = POINTWISE[variant](Draw(dtype, layout, impl.device), shape)
        y, index = ops.bn_relu_max_pool(*args, impl.name)
        affine = cast(args)[:3]
        u = F.relu(reference.bn_act(*affine, None, None, None, False, False)[0])
        (r, s), stride, padding = args[3:6]
        padded = F.pad(u, (padding[1], padding[1], padding[0], padding[0]), value=-1.0)
        windows = padded.unfold(2, r, stride[0]).unfold(3, s, stride[1]).flatten(4)
        exact, open_ = windows.amax(-1), index != reference.NONE
        assert index.shape == exact.shape and bool((index[open_] < r * s).all()), name
        named = windows.gather(-1, torch.where(open_, index, 0).long().unsqueeze(-1)).squeeze(-1)
        near = 1e-5 * (1 + exact)  # of values as near to each other as this either may be the first
        assert torch.all(torch.where(open_, exact - named, exact) <= near), name
        assert torch.equal(open_, y != 0), name


def test_index_of_equal_values(impl, layout):
    """The first of equal values has the index, as in PyTorch; NaN is the largest of all."""
    impl.need(torch.float32, "bn_relu_max_pool")
    z = torch.ones(2, 8, 6, 6, device=impl.device).contiguous(memory_format=layout)
    z[1, 2, 4, 4] = float("nan")
    windows = [3, 3], [2, 2], [1, 1]
    y, index = ops.bn_relu_max_pool(z, None, None, *windows, True, impl.name)
    first = torch.tensor([[4, 3, 3], [1, 0, 0], [1, 0, 0]], dtype=torch.uint8, device=impl.device)
    assert torch.equal(index[0], first.expand(8, 3, 3))
    assert index[1, 2].tolist() == [[4, 3, 3], [1, 0, 0], [1, 0, 4]]
    assert y.isnan().sum() == 1 and y[1, 2, 2, 2].isnan()
    _, closed = ops.bn_relu_max_pool(-z.nan_to_num(), None, None, *windows, True, impl.name)
    assert torch.all(closed == reference.NONE)


def test_mask_round_trip(layout):
    for shape in [*SHAPES.values(), EMPTY]:
        positive = torch.rand(shape) > 0.5
        positive = positive.contiguous(memory_format=layout)
        mask = reference.pack_mask(positive)
        assert mask.shape == mask_shape(positive)
        assert torch.equal(reference.unpack_mask(mask, positive), positive)


def test_mask_bit_order():
    """The first element is the least bit of the first byte; a row starts a new byte."""
    positive = torch.zeros(1, 2, 1, 9, dtype=torch.bool)
    positive[0, 0, 0, 0] = positive[0, 0, 0, 8] = positive[0, 1, 0, 2] = True
    assert reference.pack_mask(positive).tolist() == [[1, 1], [4, 0]]
    nhwc = positive.contiguous(memory_format=torch.channels_last)
    assert is_channels_last(nhwc) and reference.pack_mask(nhwc).flatten().tolist() == [
        1, 0, 2, 0, 0, 0, 0, 0, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("variant", [*POINTWISE, *CONVOLUTIONS])
def test_opcheck(impl, variant):
    """Schema, fake kernel (shapes, dtypes, strides); once, registration and dynamic shapes."""
    op = op_of(variant)
    impl.need(torch.float32, op)
    overload = getattr(torch.ops.resnet_fast, op).default
    if variant in POINTWISE:
        make, sizes = POINTWISE[variant], [(2, 5, 4, 3), SHAPES["one-pixel"], EMPTY]
    else:
        make = CONVOLUTIONS[variant]
        sizes = [CONVS["3x3-stride2"], CONVS["one-pixel"], EMPTY_CONV]
    for layout in (torch.channels_last, torch.contiguous_format):
        for size in sizes:
            full = size is sizes[0] and layout is torch.channels_last and impl.name == "reference"
            args = make(Draw(torch.float32, layout, impl.device), size)
            tests = FULL_OPCHECK if full else ("test_schema", "test_faketensor")
            torch.library.opcheck(overload, (*args, impl.name), test_utils=tests)


@pytest.mark.parametrize("variant", [*POINTWISE, *CONVOLUTIONS])
def test_opcheck_bf16(impl, layout, variant):
    """The fake kernels give fp32 statistics beside bf16 activations, as the real ones do."""
    op = op_of(variant)
    impl.need(torch.bfloat16, op)
    make, size = POINTWISE.get(variant), (2, 5, 4, 3)
    if variant in CONVOLUTIONS:
        make, size = CONVOLUTIONS[variant], CONVS["3x3"]
    args = make(Draw(torch.bfloat16, layout, impl.device), size)
    overload = getattr(torch.ops.resnet_fast, op).default
    torch.library.opcheck(overload, (*args, impl.name), test_utils=("test_faketensor",))


def test_every_op_has_cases():
    assert {op_of(variant) for variant in [*POINTWISE, *CONVOLUTIONS]} == set(ops.NAMES)


def test_past_the_dispatcher(monkeypatch):
    """Where nobody looks on, an op goes straight to its implementation; else it is dispatched."""
    x, found = torch.randn(2, 8, 3, 3), object()  # a result that no dispatcher passes on
    choice = backends.Choice("one", lambda *args: found, "the test's")
    monkeypatch.setattr(backends, "resolve", lambda *args: choice)
    with torch.no_grad():
        assert ops.global_avg_pool(x, "auto") is found
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        for watch in (profiler, torch.enable_grad()):
            with watch, pytest.raises((RuntimeError, TypeError)):
                ops.global_avg_pool(x, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_lie_in_kept_memory(dtype):
    """A convolution's result that the C library would take from the system at every call."""
    resource = pytest.importorskip("resource", reason="page faults are counted elsewhere")
    if backends.refusal("native", "conv_bn_act", "cpu", dtype) is not None:
        pytest.skip("native is not built")
    narrow = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not torch.backends.mkldnn.is_available() or narrow:
        pytest.skip("it is not oneDNN's result here")
    torch.manual_seed(1)
    w = torch.randn(64, 3, 7, 7).to(dtype, memory_format=torch.channels_last)
    bias = torch.randn(64).to(dtype)
    x = torch.randn(4 // dtype.itemsize, 3, 420, 321)
    x = x.to(dtype, memory_format=torch.channels_last)
    same = F.conv2d(x, w, bias, padding=3)
    rows = slice(None, None, 20)  # whose values are compared
    exact = F.conv2d(x.double(), w.double(), bias.double(), padding=3)[:, :, rows]
    args = (x, w, bias, None, None, None, None, None)
    assert same.nbytes > 32 << 20
    for relu in (False, True):
        faults = []
        for _ in range(3):
            y = None  # its memory is kept
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            y = ops.conv_bn_act(*args, relu, 0.0, (1, 1), (3, 3), (1, 1), 1, "native")
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        found, plain = y[:, :, rows], same[:, :, rows]
        assert_close(found, plain.relu() if relu else plain, exact.relu() if relu else exact)
        assert faults[-1] < same.nbytes / 4096 / 10, faults
