"""The build: what setup.py resolves, what it says of it, and what the binary tells of itself."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast.dispatch import backends

ROOT = Path(__file__).resolve().parents[1]
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"]


def load_setup():
    """setup.py as a module: its functions, without a build."""
    spec = importlib.util.spec_from_file_location("resnet_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_setup()
CPU = build.Machine(torch="2.13.0", compiler="g++ 12.2.0")
CUDA = replace(CPU, torch_cuda="13.0", cuda_home="/opt/cuda", toolkit="13.1", cuda_sources=True)


def python(*args, **env):
    """Run a fresh interpreter in the repository with `env` added to the environment."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def native():
    """resnet_fast._C; skipped where it was not built, failing where it was built and is broken."""
    if importlib.util.find_spec("resnet_fast._C") is None:
        pytest.skip("resnet_fast._C is not built (RESNET_FAST_BUILD=none or no compiler)")
    return importlib.import_module("resnet_fast._C")


@pytest.mark.parametrize(
    ("requested", "machine", "mode", "why"),
    [
        pytest.param("auto", CPU, "cpu", "torch.version.cuda is None", id="auto-cpu-torch"),
        pytest.param("auto", CUDA, "cuda", "CUDA 13.1 at /opt/cuda", id="auto-cuda"),
        pytest.param(
            "auto", replace(CUDA, cuda_home=None), "cpu", "no CUDA toolkit", id="auto-no-toolkit"
        ),
        pytest.param(
            "auto", replace(CUDA, toolkit=None), "cpu", "bin/nvcc does not run", id="auto-no-nvcc"
        ),
        pytest.param(
            "auto", replace(CUDA, toolkit="12.4"), "cpu", "built for 13.0", id="auto-other-major"
        ),
        pytest.param(
            "auto", replace(CUDA, cuda_header=False), "cpu", "set CUDA_HOME", id="auto-nvcc-wrapper"
        ),
        pytest.param(
            "auto", replace(CUDA, cuda_sources=False), "cpu", "no .cu sources", id="auto-no-cu"
        ),
        pytest.param(
            "auto", replace(CUDA, compiler=None), "none", "no C++ compiler", id="auto-no-compiler"
        ),
        pytest.param(
            "auto", replace(CPU, python_header=False), "none", "Python.h", id="auto-no-header"
        ),
        pytest.param("auto", replace(CPU, system="Windows"), "none", "Windows", id="auto-windows"),
        pytest.param("cpu", CUDA, "cpu", "RESNET_FAST_BUILD=cpu", id="cpu-on-cuda-machine"),
        pytest.param("cuda", CUDA, "cuda", "RESNET_FAST_BUILD=cuda", id="cuda"),
        pytest.param("none", build.Machine(), "none", "RESNET_FAST_BUILD=none", id="none"),
    ],
)
def test_resolves(requested, machine, mode, why):
    resolution = build.resolve(requested, machine)
    assert resolution.mode == mode
    assert why in resolution.why


@pytest.mark.parametrize(
    ("requested", "machine", "message"),
    [
        pytest.param("auto", build.Machine(), "--no-build-isolation", id="no-torch"),
        pytest.param("cpu", replace(CPU, compiler=None), "no C++ compiler", id="cpu-no-compiler"),
        pytest.param("cuda", CPU, "torch.version.cuda is None", id="cuda-on-cpu-torch"),
        pytest.param("cuda", replace(CUDA, toolkit="12.4"), "CUDA 12.4", id="cuda-other-major"),
    ],
)
def test_unmet_request_is_an_error(requested, machine, message):
    with pytest.raises(build.BuildError, match=re.escape(message)):
        build.resolve(requested, machine)


@pytest.mark.parametrize("folder", ["include", "targets/x86_64-linux/include"])
def test_cuda_header(tmp_path, folder):
    assert not build.has_cuda_header(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "cuda_runtime.h").touch()
    assert build.has_cuda_header(tmp_path)


def test_report_states_the_facts(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    monkeypatch.delenv("CXXFLAGS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    text = build.report(build.resolve("auto", CUDA), CUDA)
    facts = ("= cuda", "g++ 12.2.0", "-O3", "2.13.0", "baseline", "13.1", "8.0+PTX;9.0a")
    for fact in (*facts, "nvidia-cutlass"):
        assert fact in text
    assert "jobs      3" in text
    flags = build.cxx_flags(CUDA)
    assert "-fopenmp" in flags
    assert not [f for f in flags if f.startswith("-march") or f == "-ffast-math"]


def test_portable_flags_off_linux(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-O1 -g")
    flags = build.cxx_flags(replace(CPU, system="Darwin", arch="arm64"))
    assert "-fopenmp" not in flags
    assert flags[-2:] == ["-O1", "-g"]  # the user's flags come last, so they win


def test_sources_and_isas_are_found_by_name(tmp_path):
    for name in ("module.cpp", "cpu/kernels_avx2.cpp", "cpu/kernels_avx512.cpp",
                 "cpu/kernels_amx_bf16.cpp", "cuda/bn.cu"):  # fmt: skip
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    assert build.isas("x86_64", tmp_path) == ["baseline", "avx2", "avx512", "amx_bf16"]
    assert build.isas("aarch64", tmp_path) == ["baseline"]
    assert "csrc/cuda/bn.cu" in build.sources("cuda", tmp_path)
    assert "csrc/cuda/bn.cu" not in build.sources("cpu", tmp_path)
    (tmp_path / "csrc/cuda/conv_sm80.cu").touch()
    assert "csrc/cuda/conv_sm80.cu" not in build.sources("cuda", tmp_path)
    assert "csrc/cuda/conv_sm80.cu" in build.sources("cuda", tmp_path, cutlass=True)
    (tmp_path / "csrc/cuda/bn.cpp").touch()
    with pytest.raises(build.BuildError, match="share one object file"):
        build.sources("cuda", tmp_path)


def test_c_string_survives_quotes():
    assert build.c_string('-DX="a\\b"') == r'"-DX=\"a\\b\""'


def test_unknown_build_is_an_error():
    run = python("setup.py", "--version", RESNET_FAST_BUILD="gpu")
    assert run.returncode != 0
    assert "RESNET_FAST_BUILD='gpu' is unknown; use auto | cpu | cuda | none" in run.stderr


def test_bad_max_jobs_is_an_error():
    run = python("setup.py", "--version", MAX_JOBS="many", RESNET_FAST_BUILD="none")
    assert run.returncode != 0
    assert "MAX_JOBS='many'" in run.stderr


def test_none_needs_no_torch_and_no_compiler():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    run = python(
        "-c", code + "runpy.run_path('setup.py', run_name='__main__')",
        RESNET_FAST_BUILD="none", CXX="no-such-compiler",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == resnet_fast.__version__
    assert "native build = none" in run.stderr


def test_missing_torch_is_explained():
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'dist_info']; "
    run = python(
        "-c", code + "runpy.run_path('setup.py', run_name='__main__')", RESNET_FAST_BUILD="auto"
    )
    assert run.returncode != 0
    assert "install torch first" in run.stderr
    assert "--no-build-isolation" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("requested", ["auto", "cpu"])
def test_missing_compiler(requested):
    run = python("setup.py", "--version", RESNET_FAST_BUILD=requested, CXX="no-such-compiler")
    assert "`no-such-compiler` does not run" in run.stderr
    assert (run.returncode == 0) == (requested == "auto")
    assert ("native build = none" in run.stderr) == (requested == "auto")


def test_a_source_folder_without_a_build_says_so(monkeypatch, tmp_path):
    """It hides an installed package when Python starts in it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends, "SOURCE", tmp_path)
    assert "no compiler" in backends.native_module.__wrapped__()[1]
    (tmp_path / "setup.py").touch()
    why = backends.native_module.__wrapped__()[1]
    assert f"in the source folder {tmp_path}" in why and "build_ext --inplace" in why


def test_data_files_are_packaged():
    """Every file of the package that is not Python; the compiled extension is the build's."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.search(r"^resnet_fast = \[(.*)\]$", text, re.M)[1])
    package = ROOT / "resnet_fast"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file()
              and path.suffix not in (".py", ".pyc", ".so")}  # fmt: skip
    assert others == packaged
    assert package / "models" / "imagenet_classes.txt" in packaged


def test_installed_metadata():
    try:
        installed = importlib.metadata.distribution("resnet_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("resnet_fast is on the path but not installed")
    assert installed.version == resnet_fast.__version__
    assert installed.metadata["Requires-Python"] == ">=3.10"
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == {"resnet-fast": "resnet_fast.cli:main"}


def test_build_info(native):
    info = native.build_info()
    assert info["version"] == resnet_fast.__version__
    assert info["torch_version"] == torch.__version__
    assert info["build_mode"] in ("cpu", "cuda")
    assert "RESNET_FAST_BUILD=" in info["build_why"]
    assert info["compiler"]
    assert "-O3" in info["cxx_flags"]
    assert int(info["cxx_standard"].removeprefix("c++")) >= 17
    assert len(info["pybind11_version"].split(".")) == 3
    assert info["isas"][0] == "baseline"
    assert set(info["isas"]) <= set(ISAS)
    assert ISAS.index(info["isa_active"]) <= ISAS.index(info["isa_detected"])
    assert info["cuda"] is (info["build_mode"] == "cuda")
    assert bool(info["cuda_architectures"]) is info["cuda"]
    assert (info["cuda_version"] is not None) is info["cuda"]


def test_parallel_for_uses_torch_threads(native):
    """One OpenMP runtime in the process: kernels run on as many threads as torch was told."""
    if not native.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert native.parallel_threads() == threads
    finally:
        torch.set_num_threads(before)


ISA_CODE = (
    "from resnet_fast.dispatch import backends; i = backends.build_info(); "
    "print(i['isa_active'], i['isa_detected'])"
)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_isa_override(native, isa):
    detected = native.build_info()["isa_detected"]
    run = python("-c", ISA_CODE, RESNET_FAST_CPU_ISA=isa)
    if ISAS.index(isa) <= ISAS.index(detected):
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [isa, detected]
    else:
        assert run.returncode != 0
        assert f"RESNET_FAST_CPU_ISA={isa} is not supported by this CPU" in run.stderr


def test_unknown_isa_is_an_error(native):
    run = python("-c", ISA_CODE, RESNET_FAST_CPU_ISA="sse9")
    assert run.returncode != 0
    assert "RESNET_FAST_CPU_ISA: expected baseline, avx2" in run.stderr


def test_cutlass_path(tmp_path, monkeypatch):
    """CUTLASS_PATH is where the headers are, or an error that says they are not."""
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"CUTLASS_PATH=.*no include"):
        build.cutlass_headers()
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    assert build.cutlass_headers()[0] == str(tmp_path / "include")
