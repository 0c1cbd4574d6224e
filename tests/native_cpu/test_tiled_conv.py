"""The own convolution tiles of the CPU: every path in every instruction set."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, IMPLS
from judge import judge_impl
from torch import nn

from resnet_fast import fuse
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime import cpu_info
from resnet_fast.verify.op_cases import CONVOLUTIONS, Conv, Draw

TESTS = Path(__file__).parents[1]
PATH = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "support")))  # of a process
NOTHING = None, None, False, None, None, 0.0, None, False  # around a convolution in training
TILED = {  # channels and filters in multiples of 32, with groups of 8; or few channels
    "1x1": Conv((2, 32, 7, 7), 64, (1, 1)),
    "1x1-many": Conv((1, 96, 31, 37), 160, (1, 1)),  # the last bands are split by filters
    "1x1-2048": Conv((1, 2048, 5, 6), 32, (1, 1)),  # rows a multiple of 4 KB apart, also in bf16
    "3x3-1024-stride2": Conv((1, 1024, 6, 5), 32, (3, 3), (2, 2), (1, 1)),  # the same, copied
    "1x1-stride2": Conv((2, 64, 15, 14), 32, (1, 1), (2, 2)),
    "1x1-padded": Conv((2, 32, 5, 6), 32, (1, 1), padding=(1, 2)),
    "3x3-7": Conv((2, 64, 7, 7), 32, (3, 3), padding=(1, 1)),
    "3x3-14": Conv((1, 32, 14, 14), 64, (3, 3), padding=(1, 1)),
    "3x3-16": Conv((1, 32, 5, 16), 32, (3, 3), padding=(1, 1)),
    "3x3-28": Conv((1, 32, 9, 28), 32, (3, 3), padding=(1, 1)),
    "3x3-67": Conv((1, 32, 3, 67), 32, (3, 3), padding=(1, 1)),
    "3x3-unpadded": Conv((3, 64, 8, 5), 96, (3, 3)),
    "3x3-padded-by-2": Conv((2, 32, 4, 31), 32, (3, 3), padding=(2, 0)),
    "3x3-long": Conv((2, 544, 3, 3), 32, (3, 3), padding=(1, 1)),
    "3x3-many": Conv((1, 32, 130, 113), 32, (3, 3), padding=(1, 1)),  # more blocks than tasks
    "3x3-stride2": Conv((2, 32, 14, 14), 32, (3, 3), (2, 2), (1, 1)),
    "3x3-stride2-odd": Conv((1, 32, 29, 33), 32, (3, 3), (2, 2), (1, 1)),
    "3x3-stride3": Conv((2, 32, 11, 13), 32, (3, 3), (3, 3), (1, 1)),
    "3x3-dilated": Conv((2, 32, 9, 12), 32, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "5x3-mixed": Conv((1, 32, 12, 10), 64, (5, 3), (1, 2), (2, 0), (1, 2)),
    "2x2": Conv((2, 32, 8, 9), 32, (2, 2), (2, 2)),
    "one-pixel": Conv((19, 64, 1, 1), 64, (3, 3), padding=(1, 1)),
    "many-filters": Conv((1, 32, 4, 4), 1056, (1, 1)),
    "large-filters": Conv((1, 512, 7, 7), 544, (3, 3), (2, 2), (1, 1)),
    "large-filters-stride1": Conv((1, 512, 7, 6), 64, (3, 3), padding=(1, 1)),
    "large-filters-many-tiles": Conv((3, 160, 30, 29), 192, (3, 3), padding=(1, 1)),
    "first": Conv((2, 3, 33, 38), 64, (7, 7), (2, 2), (3, 3)),
    "first-unpadded": Conv((1, 5, 20, 25), 32, (3, 2), (1, 1)),
    "first-two-channels": Conv((2, 2, 12, 11), 32, (3, 3), padding=(1, 1)),
    "first-stride-128": Conv((1, 16, 3, 390), 32, (1, 2), (1, 128)),  # 4 KB between pixels
    "groups-of-4": Conv((2, 32, 9, 14), 32, (3, 3), padding=(1, 1), groups=8),
    "groups-of-2": Conv((1, 32, 6, 9), 32, (3, 3), padding=(1, 1), groups=16),
    "groups-of-4-many": Conv((1, 128, 45, 40), 128, (3, 3), padding=(1, 1), groups=32),
    "groups-of-8-short": Conv((2, 64, 9, 6), 64, (3, 3), padding=(1, 1), groups=8),
    "groups-of-8-7x7": Conv((1, 32, 13, 12), 32, (7, 7), padding=(3, 3), groups=4),
    "groups-of-8-to-4": Conv((1, 64, 15, 13), 32, (3, 3), (2, 2), (1, 1), groups=8),
    "groups-of-16-unpadded": Conv((3, 48, 7, 8), 48, (3, 3), dilation=(1, 2), groups=3),
    "groups-of-32": Conv((2, 96, 7, 7), 96, (3, 3), padding=(1, 1), groups=3),
    "groups-of-48-1x1": Conv((2, 96, 5, 6), 96, (1, 1), groups=2),
    "groups-long": Conv((1, 352, 5, 5), 64, (3, 3), padding=(1, 1), groups=2),
}


def check(dtype):
    """Every variant of every convolution op on every shape, NaN in memory that nobody wrote.

    Each variant and each shape meets one thread and two.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    for i, (variant, arguments) in enumerate(CONVOLUTIONS.items()):
        for j, (name, conv) in enumerate(TILED.items()):
            torch.set_num_threads(1 + (i + j) % 2)
            torch.manual_seed(0)
            args = arguments(Draw(DTYPES[dtype], torch.channels_last, "cpu"), conv)
            judge_impl(IMPLS["native-cpu"], variant, args, name)


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """Environment with a guard page behind scratch memory: a read past its end stops the process.

    Empty without a C compiler or glibc.
    """
    compiler = shutil.which("cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        return {}
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    source = TESTS / "support" / "guard_pages.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "dtype", "by"),
    [("avx2", "fp32", "tiles"), ("avx2", "fp32", "winograd"),
     ("avx2", "bf16", "tiles"), ("avx2", "bf16", "winograd"),
     ("avx512", "fp32", "tiles"), ("avx512", "fp32", "winograd"),
     ("avx512", "bf16", "tiles"), ("avx512", "bf16", "winograd"),
     ("avx512_bf16", "bf16", "tiles"), ("avx512_bf16", "bf16", "winograd"),
     ("amx_bf16", "bf16", "tiles")],
)  # fmt: skip
def test_tiles(isa, dtype, by, guard):
    """Direct tiles, and Winograd's for every 3x3 convolution; no read past scratch memory.

    In a process of its own, which reads the instruction set and the way to convolve once.
    """
    info = backends.build_info()
    if info is None:
        pytest.skip("resnet_fast._C is not built")
    isas = info["isas"]  # in order
    if isa not in isas or isas.index(isa) > isas.index(info["isa_detected"]):
        pytest.skip(f"this CPU has {info['isa_detected']} at most")
    run = subprocess.run(
        [sys.executable, "-c", f"import test_tiled_conv; test_tiled_conv.check({dtype!r})"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": PATH, "RESNET_FAST_CPU_ISA": isa,
             "RESNET_FAST_CPU_CONV": by, **guard},
    )  # fmt: skip
    assert run.returncode == 0, (run.returncode, run.stderr[-3000:])


@pytest.mark.parametrize(
    ("channels", "groups", "avx2", "avx512"),
    [(32, 8, True, True), (96, 3, True, True), (24, 3, True, False), (32, 32, False, False),
     (36, 3, False, False)],
)  # fmt: skip
def test_groups_that_tiles_take(channels, groups, avx2, avx512):
    info = backends.build_info()
    if info is None:
        pytest.skip("resnet_fast._C is not built")
    x, w = torch.randn(1, channels, 8, 8), torch.randn(channels, channels // groups, 3, 3)
    x = x.to(memory_format=torch.channels_last)
    route = torch.ops.resnet_fast_native.conv_route
    by, why = route(x, w, [1, 1], [1, 1], [1, 1], groups, "conv_fprop")
    isa = info["isa_active"]
    intel = isa not in ("baseline", "avx2") and "Intel" in cpu_info.name()
    takes = {"baseline": False, "avx2": avx2}.get(isa, avx512 and not intel)
    assert (by == "tiles") == takes, (by, why)
    with pytest.raises(RuntimeError, match="groups"):
        route(x, w, [1, 1], [1, 1], [1, 1], 0, "conv_fprop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinity_stays_in_its_group(dtype, value):
    """Also where several groups are multiplied as one: forward, dx and inference."""
    if backends.build_info() is None:
        pytest.skip("resnet_fast._C is not built")
    x = torch.randn(2, 32, 6, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    w, geometry = torch.randn(32, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 8)
    x[1, 5, 2, 3] = value
    alone = torch.zeros(2, 32, 6, 6, dtype=torch.bool)
    alone[1, 4:8, 1:4, 2:5] = True  # group 1, the windows of the pixel
    z = ops.conv_fprop(x, w, *NOTHING, *geometry, "native")[0]
    dx = ops.conv_bprop(x, w, z, *[None] * 13, *geometry, True, False, False, "native")[0]
    y = ops.conv_bn_act(x, w, *[None] * 5, z.clone().zero_(), False, 0.0, *geometry, "native")
    for found in (z, dx, y):
        assert torch.equal(~found.isfinite(), alone)


def test_an_infinity_beside_a_residual_that_is_overwritten():
    """Tiles of joined groups find it late: what runs instead still needs the residual."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32)
            self.conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False)
            self.bn2 = nn.BatchNorm2d(32)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + x)

    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block()).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 32, 8, 8).to(memory_format=torch.channels_last)
    fused = fuse(plain)
    for value in (1.0, float("inf")):
        x[0, 3, 5, 5] = value
        with torch.inference_mode():
            expected, found = plain(x), fused(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert not expected.isfinite().all() and expected.isfinite().any()


OVERREAD = """
import ctypes, sys
aligned_alloc = ctypes.CDLL(None).aligned_alloc
aligned_alloc.argtypes, aligned_alloc.restype = [ctypes.c_size_t] * 2, ctypes.c_void_p
ctypes.string_at(aligned_alloc(64, 4096), 4096 + int(sys.argv[1]))
"""


def test_guard_pages_stop_a_read_past_the_end(guard):
    if not guard:
        pytest.skip("guard pages need a C compiler and glibc")
    run = [sys.executable, "-c", OVERREAD]
    status = [subprocess.run([*run, past], env={**os.environ, **guard}).returncode for past in "01"]
    assert status == [0, -signal.SIGSEGV]


ERRORS = """
import torch
from resnet_fast.dispatch import ops
torch.manual_seed(0)
rest = None, None, False, None, None, 0.0, None, False, [1, 1], [1, 1], [1, 1], 1, "native"
run = lambda x: ops.conv_fprop(x, w, *rest)[0]
for channels in (256, 64):
    x, w = torch.randn(2, channels, 14, 14), torch.randn(64, channels, 3, 3)
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    print((run(x).double() - exact).pow(2).mean().sqrt().item())
def show(t):
    wrong = ~t.isfinite()[0]
    print(wrong.all(0).nonzero().tolist(), wrong.any(0).nonzero().tolist())
for dtype in (torch.float32, torch.bfloat16):
    x, w = x.to(dtype), w.to(dtype)
    for at in ((6, 7), (0, 13)):
        bad = x.clone(memory_format=torch.preserve_format)
        bad[0, 0, at[0], at[1]] = float("inf")
        show(run(bad))
        show(ops.conv_bprop(bad, w, x, *[None] * 13, *rest[8:12], True, True, False, "native")[0])
"""


@pytest.mark.slow
def test_rounding_errors_of_winograd():
    """Of direct products' size, and an infinity shows where its windows are alone."""
    info = backends.build_info()
    if info is None or "avx2" not in info["isas"] or info["isa_detected"] == "baseline":
        pytest.skip("the own tiles need AVX2")
    found = {}
    for by in ("tiles", "winograd"):
        env = {**os.environ, "RESNET_FAST_CPU_CONV": by}
        run = [sys.executable, "-c", ERRORS]
        out = subprocess.run(run, check=True, capture_output=True, text=True, env=env).stdout
        found[by] = out.splitlines()
    many, few = (float(found["winograd"][i]) / float(found["tiles"][i]) for i in (0, 1))
    assert 0 < many < 2 and 0 < few < 1.2, (many, few)
    inside = [[i, j] for i in (5, 6, 7) for j in (6, 7, 8)]
    corner = [[i, j] for i in (0, 1) for j in (12, 13)]
    expected = [f"{windows} {windows}" for windows in (inside, inside, corner, corner)]
    assert found["winograd"][2:] == found["tiles"][2:] == 2 * expected  # y and dx, fp32 and bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pixels_that_no_tap_meets(dtype):
    """NaN in rows that a strided convolution passes over shows nowhere."""
    if backends.build_info() is None:
        pytest.skip("resnet_fast._C is not built")
    x = torch.randn(1, 32, 9, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    x[:, :, 1::2] = float("nan")
    w, geometry = torch.randn(32, 32, 1, 1), ([2, 2], [0, 0], [1, 1], 1)
    z = ops.conv_fprop(x, w, *NOTHING, *geometry, "native")[0]
    nothing = [None] * 13
    dw = ops.conv_bprop(z, w, x, *nothing, *geometry, False, True, False, "native")[1]
    assert torch.isfinite(z).all() and torch.isfinite(dw).all()


def test_no_filters():
    if backends.build_info() is None:
        pytest.skip("resnet_fast._C is not built")
    x = torch.randn(2, 32, 5, 5).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="weight"):
        ops.conv_fprop(
            x, torch.randn(0, 32, 3, 3), None, None, True, None, None, 0.0, None, False, [1, 1],
            [1, 1], [1, 1], 1, "native",
        )  # fmt: skip
