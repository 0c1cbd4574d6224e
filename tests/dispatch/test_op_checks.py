"""Wrong operands of an op are refused by name, whatever implements it.

A kernel that walks plain pointers must never meet an operand of another size, dtype or order, so
every operand of every op is tried; the native convolutions at 32 channels (tiles, where the CPU has
them) and at 8 (oneDNN).
"""

import inspect

import pytest
import torch

from resnet_fast.dispatch import backends
from resnet_fast.spec import reference
from resnet_fast.verify.op_cases import CONVOLUTIONS, POINTWISE, Conv, Draw, op_of

REFUSED = (RuntimeError, TypeError, ValueError)
WHOLE = {  # op → a variant with as many of its operands as go together
    "bn_act": "bn_act:dual",
    "bn_act_bwd_reduce": "bn_act_bwd_reduce:dual",
    "bn_act_bwd_apply": "bn_act_bwd_apply:residual",
    "conv_fprop": "conv_fprop:prologue",
    "conv_bprop": "conv_bprop:residual-masked",
    "conv_bn_act": "conv_bn_act:bias-residual",
}
OPS = sorted({op_of(variant) for variant in (*POINTWISE, *CONVOLUTIONS)})
# What is taken all the same: an input of fewer rows, or in the other order, where nothing stands
# beside it; in inference a residual in any order, and BatchNorm's vectors in any dtype.
TAKEN = {("bn_stats x", "rows"), ("conv_fprop x", "rows"), ("global_avg_pool x", "rows")}
TAKEN |= {(f"{op} x", "order") for op in OPS} | {("conv_bn_act residual", "order")}
TAKEN |= {
    (f"{op} {name}", "dtype")
    for op in ("conv_bn_act", "bn_finalize", "conv_fprop")
    for name in ("bias", "bn_weight", "bn_bias", "running_mean", "running_var", "weight")
}
TAKEN |= {("bn_stats x", "double"), ("global_avg_pool x", "double"), ("add_relu_bwd dy", "double")}
TAKEN |= {("global_avg_pool x", "sliced")}
TAKEN |= {("image_stats x", "rows"), ("image_stats x", "double")}
TAKEN |= {("bn_relu_max_pool z", "rows"), ("bn_relu_max_pool z", "order")}
TAKEN |= {("max_pool_bwd x", "rows")}  # five rows have as many windows as six
TAKEN |= {  # only its dtype is read
    ("bn_fold x", what)
    for what in ("rows", "order", "double", "sliced", "shape", "channels", "device")
}
ONE_OPERAND = {(op, "device") for op in ("bn_stats", "global_avg_pool", "image_stats")}


def operands(op, channels=32):
    """Good operands of the op by name, C = K."""
    variant, draw = WHOLE.get(op, op), Draw(torch.float32, torch.channels_last)
    if variant in POINTWISE:
        values = POINTWISE[variant](draw, (2, channels, 6, 6))
    else:
        conv = Conv((2, channels, 6, 6), channels, (3, 3), padding=(1, 1))
        values = CONVOLUTIONS[variant](draw, conv)
    names = inspect.signature(getattr(reference, op)).parameters
    return dict(zip(names, values, strict=True))


def wrong(value):
    """What is wrong → `value` with that."""
    if value.dim() == 4 and value.size(2) in (1, 3):  # filters
        return {"channels": value[:, :-1], "double": value.double(), "shape": value[0]}
    if value.dim() == 4:
        rows = value[:, :, :-1].clone(memory_format=torch.channels_last)
        return {
            "rows": rows, "order": value.contiguous(), "double": value.double(),
            "sliced": value[:, :, ::2], "shape": value[0],
        }  # fmt: skip
    if value.dtype == torch.uint8:
        return {"rows": value[:-1].clone(), "width": value[:, :0].clone(), "int32": value.int()}
    return {
        "size": value[:-1].clone(), "dtype": value.half(), "shape": value[None],
        "integer": value.long(), "stepped": torch.stack([value, value], 1)[:, 0],
    }  # fmt: skip


def call(impl, op, values):
    """Past the op's dispatcher, which takes any operand on "meta" for a question of shapes."""
    x = torch.empty(0, dtype=torch.float32)
    return backends.resolve(op, impl.name, x).run(*values.values())


@pytest.fixture
def walks(impl):
    """An implementation that walks pointers, on tensors of the CPU."""
    if impl.name == "reference" or impl.device == "cuda":
        pytest.skip("PyTorch checks its own operands; on a GPU the checks are the interpreter's")
    return impl


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize("op", OPS)
def test_wrong_operands(walks, op, channels):
    walks.need(torch.float32, op)
    good = operands(op, channels)
    call(walks, op, good)
    for key, value in good.items():
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            vectors = value[:5]  # of the first norm, which has all of them
            for i, vector in enumerate(vectors):
                for what, bad in {**wrong(vector), "device": vector.to("meta")}.items():
                    if what != "dtype":
                        with pytest.raises(REFUSED, match=f"{op}: "):
                            call(walks, op, {**good, key: value[:i] + [bad] + value[i + 1 :]})
                            pytest.fail(f"{op} took {key}[{i}] of wrong {what}")
        if not isinstance(value, torch.Tensor):
            continue
        for what, bad in {**wrong(value), "device": value.to("meta")}.items():
            if (f"{op} {key}", what) in TAKEN or (op, what) in ONE_OPERAND:
                continue
            with pytest.raises(REFUSED, match=f"{op}: |Could not run 'resnet_fast_native::{op}'"):
                call(walks, op, {**good, key: bad})
                pytest.fail(f"{op} took a {key} of wrong {what}")


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize(
    "geometry",
    [{"stride": [0, 1]}, {"dilation": [1, 0]}, {"padding": [-1, 0]}, {"groups": 3}, {"groups": 0}],
    ids=str,
)
def test_wrong_geometry(walks, channels, geometry):
    for op in ("conv_fprop", "conv_bn_act", "conv_bprop", "conv_add_projection"):
        with pytest.raises(REFUSED, match=f"{op}: "):
            call(walks, op, {**operands(op, channels), **geometry})


@pytest.mark.parametrize(
    "windows",
    [{"kernel": [0, 3]}, {"kernel": [16, 16]}, {"kernel": [9, 9]}, {"stride": [0, 1]},
     {"padding": [2, 0]}, {"padding": [-1, 0]}],
    ids=str,
)  # fmt: skip
def test_wrong_windows(walks, windows):
    for op in ("bn_relu_max_pool", "max_pool_bwd"):
        with pytest.raises(REFUSED, match=f"{op}: "):
            call(walks, op, {**operands(op), **windows})


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize(
    ("op", "missing"),
    [
        ("bn_act", "res_shift"),
        ("bn_act_bwd_reduce", "res_rstd"),
        ("bn_act_bwd_apply", "z"),
        ("gated_act_bwd_apply", "mean"),
        ("conv_fprop", "in_shift"),
        ("conv_bprop", "in_shift"),
        ("conv_bprop", "in_rstd"),
        ("conv_bprop", "c"),
        ("conv_bn_act", "running_var"),
        ("conv_add_projection", "shift"),
        ("conv_add_projection", "source_scale"),
        ("bn_relu_max_pool", "shift"),
        ("max_pool_bwd", "rstd"),
    ],
)
def test_half_a_pair(walks, op, missing, channels):
    walks.need(torch.float32, op)
    with pytest.raises(REFUSED, match=f"{op}: "):
        call(walks, op, {**operands(op, channels), missing: None})
