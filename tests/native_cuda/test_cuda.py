"""csrc/cuda by nvcc, without a GPU: every kernel compiles, none spills, memory moves in 16 bytes.

What the kernels compute is tested as `native-cuda` on a GPU and as `native-cuda-emulated` anywhere.
"""

import shutil

import pytest
import torch

from bench import cuda

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
FILES, WITHOUT = cuda.sources()
OF_TEMPLATES = ("conv_sm80.cu", "conv_sm90_bf16.cu")  # CUTLASS' kernels


# For Hopper, but for the convolutions of other GPUs; fp16's code is bf16's but for the type in its
# instructions. `make cuda-check` compiles all for both. CUTLASS' for Hopper take a minute.
LONG = "conv_sm90_bf16.cu"


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(file, id=file.name, marks=[pytest.mark.minutes] * (file.name == LONG))
        for file in FILES
        if file.name != "conv_sm90_fp16.cu"
    ],
)
def test_machine_code(source):
    arch = "sm_80" if source.name == "conv_sm80.cu" else "sm_90a"
    [rows] = cuda.compiled([(source, arch)], jobs=1)
    assert all(row.kernel for row in rows), rows
    assert bool(rows) == ("__global__" in source.read_text() or source.name in OF_TEMPLATES)
    failed = [cuda.line(row) for row in rows if row.failure]
    assert not failed, "\n".join(failed)
    # <T, NHWC, whole>: octets that lie at multiples of 16 bytes are read as such.
    # A plane's windows are read value by value.
    whole = [row for row in rows if row.kernel.endswith(", true>")]
    if source.stem == "max_pool":
        whole = [row for row in whole if row.kernel.endswith(", true, true>")]
    assert all("ld128" in row.loads for row in whole), [cuda.line(row) for row in whole]
    if source.stem in ("bn_act", "reduce"):
        assert len(whole) == 2 * 4 * len({row.kernel.partition("<")[0] for row in whole})


def test_convolutions_are_among_them():
    if WITHOUT:
        pytest.skip(WITHOUT)
    assert {"conv_sm80.cu", "bn_act.cu"} <= {path.name for path in FILES}
    assert any(path.name.startswith("conv_sm90") for path in FILES)


def test_a_kernel_that_does_not_compile_fails(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void k() { no_such_thing(); }\n")
    [row] = cuda.compile_file(broken, "sm_80", [])
    assert "no_such_thing" in row.failure


def test_a_kernel_that_spills_fails(tmp_path):
    spills = tmp_path / "spills.cu"
    spills.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills_kernel(float* x) {\n"
        "  float v[96];\n"
        "  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 96; ++i)\n"
        "    for (int j = 0; j < 96; ++j) v[j] = v[j] * v[(j + i) % 96] + v[i];\n"
        "  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i];\n"
        "}\n"
    )
    [row] = cuda.compile_file(spills, "sm_80", [])
    assert row.failure.startswith("spills") and row.local > 0


@pytest.mark.parametrize(
    ("arguments", "names"),
    [(["--arch", "hopper"], "--arch"), (["--jobs", "0"], "--jobs")],
)
def test_bad_arguments(arguments, names, capsys):
    from bench.__main__ import main

    assert main(["cuda", *arguments]) == 2
    assert names in capsys.readouterr().err


def test_the_build_without_cuda_says_so():
    from resnet_fast.dispatch import backends

    if torch.version.cuda is not None or backends.native_module()[0] is None:
        pytest.skip("a build for the CPU alone is needed")
    assert "without CUDA" in backends.refusal("native", "bn_act", "cuda", torch.bfloat16)
