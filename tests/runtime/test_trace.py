"""RESNET_FAST_TRACE=1: the line of each op says who ran it, by which plan and tile, and why."""

import os
import subprocess
import sys

import pytest
import torch

import resnet_fast
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime import trace
from resnet_fast.spec.chain import IMPLS

NHWC = torch.channels_last


@pytest.fixture
def traced(monkeypatch, capsys):
    """What was printed since, line by line."""
    monkeypatch.setenv("RESNET_FAST_TRACE", "1")
    monkeypatch.setattr(trace, "_said", set())

    def lines():
        return capsys.readouterr().err.splitlines()

    return lines


def conv(channels=32, filters=32, size=3, layout=NHWC, dtype=torch.float32):
    x = torch.randn(2, channels, 8, 8, dtype=dtype).to(memory_format=layout)
    return x, torch.randn(filters, channels, size, size, dtype=dtype).to(memory_format=layout)


def fprop(x, w, impl, groups=1):
    norm = None, None, 0.0, None, False
    return ops.conv_fprop(x, w, None, None, False, *norm, [1, 1], [1, 1], [1, 1], groups, impl)


def test_once_for_each_kind_of_call(traced):
    x = torch.randn(2, 8, 3, 3)
    for size in (3, 3, 4):
        ops.add_relu(torch.randn(2, 8, size, 3), torch.randn(2, 8, size, 3), False, "reference")
    assert traced() == [
        f"resnet_fast: add_relu float32[2x8x{size}x3] float32[2x8x{size}x3]: "
        "reference (impl='reference')"
        for size in (3, 4)
    ]
    ops.add_relu(x, x, False, "auto")
    (line,) = traced()
    chosen = backends.chosen("add_relu", "auto", "cpu", torch.float32)
    assert f": {chosen} (" in line


def test_nothing_without_the_variable(monkeypatch, capsys):
    monkeypatch.delenv("RESNET_FAST_TRACE", raising=False)
    ops.add_relu(torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 5), False, "reference")
    assert capsys.readouterr().err == ""


def test_why_not_another(traced):
    """"auto" says why what it prefers does not run."""
    x = torch.randn(2, 8, 3, 3).half()
    ops.add_relu(x, x, False, "auto")
    (line,) = traced()
    why = backends.refusal("native", "add_relu", "cpu", torch.float16)
    assert line.endswith(f": reference (not native: {why})")


@pytest.mark.parametrize(
    ("case", "by", "why"),
    [
        ({"layout": torch.contiguous_format}, "aten", "not channels_last"),
        ({"dtype": torch.float64}, "aten", "neither fp32 nor bf16"),
        ({"channels": 40}, "aten", "channels or filters are not multiples of 32"),
        ({"size": 1}, "tiles", "multiples of 32"),
        ({"dtype": torch.bfloat16, "size": 1}, "tiles", "multiples of 32"),
    ],
)
def test_the_route_of_a_native_convolution(case, by, why, traced):
    if backends.refusal("native", "conv_fprop", "cpu", torch.float32) is not None:
        pytest.skip("no native kernels here")
    x, w = conv(**case)
    if by == "tiles" and backends.build_info()["isa_active"] == "baseline":
        by, why = "aten", "the CPU has no tiles"
    fprop(x, w, "native")
    (line,) = traced()
    assert f": native (impl='native'); {by} (" in line and why in line


@pytest.mark.parametrize("way", ["tiles", "winograd", "onednn"])
def test_the_route_is_the_setting(way):
    """RESNET_FAST_CPU_CONV, in training and in inference; read once, so in another process."""
    if backends.refusal("native", "conv_fprop", "cpu", torch.float32) is not None:
        pytest.skip("no native kernels here")
    if backends.build_info()["isa_active"] == "baseline":
        pytest.skip("this CPU has no tiles")
    code = (
        "import torch, resnet_fast; x = torch.randn(2, 32, 16, 16).to(memory_format="
        "torch.channels_last); b = resnet_fast.ConvBNAct2d(32, 32, 3).to(memory_format="
        "torch.channels_last); b(x); b.eval().requires_grad_(False)(x)"
    )
    env = {**os.environ, "RESNET_FAST_TRACE": "1", "RESNET_FAST_CPU_CONV": way}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = {line.split()[1]: line for line in done.stderr.splitlines() if "conv_" in line}
    asked = "aten" if way == "onednn" else way
    assert f"; {asked} (" in ran["conv_fprop"] and f"; {way} (" in ran["conv_bn_act"]


def test_plan_and_tile_of_a_triton_convolution(traced):
    """Both by rule, with its reason; fp64 gathers."""
    if backends.refusal("triton", "conv_fprop", "cpu", torch.float64) is not None:
        pytest.skip("Triton's interpreter is off")
    fprop(*conv(16, 16, dtype=torch.float64), "triton")
    (line,) = traced()
    assert "; conv_fprop (1,) (one launch); conv_affine_act (" in line and line.endswith("(rule)")


def test_inference_runs_op_by_op(traced, monkeypatch):
    """A native call of many chains would hide them; the bits are the same."""
    net = resnet_fast.create_model("resnet18", num_classes=3).eval().to(memory_format=NHWC)
    x = torch.randn(1, 3, 32, 32).to(memory_format=NHWC)
    with torch.no_grad():
        y = net(x)
        lines = traced()
        monkeypatch.setenv("RESNET_FAST_TRACE", "0")
        assert torch.equal(net(x), y)
    assert sum(" conv_bn_act " in line for line in lines) >= 10
    assert all(any(f": {impl} (" in line for impl in IMPLS) for line in lines)
