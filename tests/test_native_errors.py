"""Wrong operands of the native convolution ops are refused by name, in tiles as in oneDNN's path.

A kernel that walks plain pointers must never meet an operand of another size, so every one is
tried, at 32 channels (tiles, where the CPU has them) and at 8 (oneDNN).
"""

import pytest
import torch

from resnet_fast import backend

REFUSED = (RuntimeError, TypeError, ValueError)
GEOMETRY = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


def activation(channels, pixels=6):
    x = torch.randn(2, channels, pixels, pixels)
    return x.to(memory_format=torch.channels_last)


def operands(name, c):
    """Good operands of the op by name, C = K = c."""
    x, w = activation(c), torch.randn(c, c, 3, 3)
    vector, mask = torch.rand(c), torch.zeros(2 * 36, (c + 7) // 8, dtype=torch.uint8)
    if name == "conv_fprop":
        return {"x": x, "w": w, "in_scale": vector, "in_shift": vector, "stats": True, **GEOMETRY}
    if name == "conv_bn_act":
        norm = {"bn_weight": vector, "bn_bias": vector, "running_mean": vector}
        norm |= {"running_var": vector, "residual": activation(c), "relu": True, "eps": 1e-5}
        return {"x": x, "w": w, "bias": vector, **norm, **GEOMETRY}
    above = {"dy_mask": mask, "a": vector, "z": activation(c), "mean": vector, "b": vector}
    below = dict.fromkeys(("in_scale", "in_shift", "in_mean", "in_rstd"), vector)
    rest = {"in_act": activation(c), "residual": activation(c), "residual_mask": mask}
    needs = {"need_dx": True, "need_dw": True}
    dy = activation(c)
    return {"dy": dy, "w": w, "x": x, **above, "c": vector, **below, **rest, **GEOMETRY, **needs}


def wrong(value):
    """Values of another shape or dtype than `value` has."""
    if value.dim() == 4 and value.size(2) == 3:
        return [value[:, :-1], value.to(torch.float64), value[0]]
    if value.dim() == 4:
        nchw = value.contiguous()
        return [value[:, :, :-1].clone(memory_format=torch.channels_last), nchw, value.double()]
    if value.dtype == torch.uint8:
        return [value[:-1].clone(), value[:, :0].clone(), value.to(torch.int32)]
    return [value[:-1].clone(), value.half(), value[None]]


# x may have fewer rows where nothing stands beside it; NCHW x decides the format of the rest. In
# inference the residual may have either format and BatchNorm's vectors any dtype.
TAKEN = {("conv_fprop x", 0), ("x", 1), ("conv_bn_act residual", 1)} | {
    (f"conv_bn_act {name}", 1)
    for name in ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
}


def call(name, values):
    return getattr(torch.ops.resnet_fast, name)(*values.values(), "native")


@pytest.fixture(autouse=True)
def native():
    why = backend.refusal("native", "conv_bprop", "cpu", torch.float32)
    if why:
        pytest.skip(f"native on cpu: {why}")


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize("name", ["conv_fprop", "conv_bprop", "conv_bn_act"])
def test_wrong_operands(name, channels):
    good = operands(name, channels)
    call(name, good)
    for key, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        for i, bad in enumerate(wrong(value)):
            if (key, i) in TAKEN or (f"{name} {key}", i) in TAKEN:
                continue
            with pytest.raises(REFUSED, match=f"{name}: .*`"):
                call(name, {**good, key: bad})
                pytest.fail(f"{name} took a wrong {key} ({i})")


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize(
    "geometry",
    [{"stride": [0, 1]}, {"dilation": [1, 0]}, {"padding": [-1, 0]}, {"groups": 3}, {"groups": 0}],
    ids=str,
)
def test_wrong_geometry(channels, geometry):
    for name in ("conv_fprop", "conv_bn_act"):
        with pytest.raises(REFUSED, match=f"{name}: `"):
            call(name, {**operands(name, channels), **geometry})


@pytest.mark.parametrize("channels", [32, 8], ids=["tiles", "onednn"])
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("conv_fprop", "in_shift"),
        ("conv_bprop", "in_shift"),
        ("conv_bprop", "in_rstd"),
        ("conv_bprop", "c"),
        ("conv_bn_act", "running_var"),
    ],
)
def test_half_a_pair(name, missing, channels):
    with pytest.raises(REFUSED, match=name):
        call(name, {**operands(name, channels), missing: None})
