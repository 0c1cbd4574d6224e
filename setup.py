"""Build of resnet_fast: detect what can be built on this machine, print it, and build it.

Metadata is in pyproject.toml; this file adds the native extension `resnet_fast._C`.

Environment variables
    RESNET_FAST_BUILD     auto (default) | cpu | cuda | none
        auto    cuda if torch was built for CUDA, its toolkit is found and csrc/cuda has sources;
                else cpu; none without a C++ compiler. Visible GPUs play no role, so a build
                machine without a GPU makes the same binary.
        cpu, cuda   that build, or an error that says what is missing
        none    pure Python: only the reference and Triton implementations
    MAX_JOBS              number of parallel compiler processes (default: ninja's)
    TORCH_CUDA_ARCH_LIST  CUDA architectures, for example "8.0;9.0a"
    CUTLASS_PATH          CUTLASS, if the package nvidia-cutlass is not installed; without either,
                          the CUDA kernels are built without the fused convolutions
    CXX, CXXFLAGS         the C++ compiler; flags added last, so that they take precedence

The build compiles against the installed torch, so it needs `pip install --no-build-isolation`.
The result of the detection is printed to stderr (see it with `pip install -v` or
`python setup.py --version`) and stored in `resnet_fast._C.build_info()`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
MIN_TORCH = (2, 6)
MIN_SETUPTOOLS = 77  # the first that reads the SPDX license expression of pyproject.toml

# No -march: the kernels choose their instruction set at run time. No -ffast-math: NaN, infinity and
# the order of sums keep their meaning; only errno and trap flags are dropped. torch's cpp_extension
# adds the -std that its headers need (C++17, later C++20).
CXX_FLAGS = (
    "-O3 -fno-math-errno -fno-trapping-math -fvisibility=hidden -fvisibility-inlines-hidden -g0 "
    "-Wall -Wextra"
).split()
NVCC_FLAGS = ["-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
# Code for Ampere and Ada, and for Hopper with wgmma; PTX for later GPUs.
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""

    def __init__(self, message: str):
        super().__init__(f"\nresnet_fast: {message}\n")


@dataclass(frozen=True)
class Machine:
    """The facts that `resolve` depends on. `probe` detects them; tests construct them."""

    torch: str | None = None  # torch.__version__
    torch_cuda: str | None = None  # torch.version.cuda
    cuda_home: str | None = None
    toolkit: str | None = None  # the version nvcc reports
    cuda_header: bool = True  # cuda_runtime.h in the toolkit
    cuda_sources: bool = False
    cutlass: tuple[str, ...] = ()  # the folders of its headers
    compiler: str | None = None  # first line of `$CXX --version`
    cxx: str = "c++"
    python_header: bool = True
    system: str = "Linux"
    arch: str = "x86_64"


@dataclass(frozen=True)
class Resolution:
    mode: str  # cpu | cuda | none
    why: str


def version() -> str:
    """`resnet_fast.__version__`, read from its file without importing torch."""
    text = (ROOT / "resnet_fast" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def requested_build() -> str:
    requested = os.environ.get("RESNET_FAST_BUILD") or "auto"
    if requested not in CHOICES:
        raise BuildError(f"RESNET_FAST_BUILD={requested!r} is unknown; use {' | '.join(CHOICES)}")
    return requested


def first_line_of(command: list[str], pattern: str = "(.+)") -> str | None:
    """First match of `pattern` in the command's output; None if it fails or nothing matches."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, run.stdout)
    return found.group(1).strip() if found else None


def cutlass_headers() -> tuple[str, ...]:
    """Folders of CUTLASS headers: under CUTLASS_PATH, else in the package nvidia-cutlass."""
    chosen = os.environ.get("CUTLASS_PATH")
    package = importlib.util.find_spec("cutlass_library")
    folders = package.submodule_search_locations if package else None
    roots = [Path(chosen)] if chosen else [Path(folder, "source") for folder in folders or ()]
    for root in roots:
        include = root / "include", root / "tools" / "util" / "include"
        if (include[0] / "cutlass" / "cutlass.h").exists():
            return tuple(map(str, include))
    if chosen:
        raise BuildError(f"CUTLASS_PATH={chosen!r} has no include/cutlass/cutlass.h")
    return ()


def has_cuda_header(home: Path) -> bool:
    """Whether cuda_runtime.h is where torch or conda's compilers look for it."""
    return any(
        (folder / "cuda_runtime.h").exists()
        for folder in (home / "include", *home.glob("targets/*/include"))
    )


def probe(requested: str) -> Machine:
    """Detect the facts. `none` needs none of them, so it works without torch and a compiler."""
    if requested == "none":
        return Machine(system=platform.system(), arch=platform.machine())
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        print(f"resnet_fast: import torch failed: {error}", file=sys.stderr)
        return Machine()
    if torch.__version__ < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        raise BuildError(f"torch {torch.__version__} is too old: install torch >= {needed}")
    cxx = os.environ.get("CXX") or "c++"  # the same rule as torch's cpp_extension
    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    return Machine(
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        cuda_home=CUDA_HOME,
        toolkit=first_line_of([str(nvcc), "--version"], r"release (\S+),") if nvcc else None,
        cuda_header=bool(CUDA_HOME) and has_cuda_header(Path(CUDA_HOME)),
        cuda_sources=any((ROOT / "csrc" / "cuda").glob("*.cu")),
        cutlass=cutlass_headers(),
        compiler=first_line_of([*shlex.split(cxx), "--version"]),
        cxx=cxx,
        python_header=Path(sysconfig.get_path("include"), "Python.h").exists(),
        system=platform.system(),
        arch=platform.machine(),
    )


def missing_for_cpu(machine: Machine) -> str | None:
    if machine.system == "Windows":
        return "the native kernels do not support Windows (they need GCC or Clang)"
    if machine.compiler is None:
        return f"no C++ compiler: `{machine.cxx}` does not run (install g++ or set CXX)"
    if not machine.python_header:
        return "Python.h is missing (install the python3-dev package of your system)"
    return None


def missing_for_cuda(machine: Machine) -> str | None:
    if machine.torch_cuda is None:
        return "torch was built without CUDA (torch.version.cuda is None)"
    if not machine.cuda_home:
        return "no CUDA toolkit found (put nvcc on PATH or set CUDA_HOME)"
    if machine.toolkit is None:
        return f"no CUDA toolkit at CUDA_HOME={machine.cuda_home}: bin/nvcc does not run"
    if not machine.cuda_header:
        return (
            f"no include/cuda_runtime.h at CUDA_HOME={machine.cuda_home} (if nvcc is a wrapper, "
            "set CUDA_HOME to the toolkit)"
        )
    if machine.toolkit.split(".")[0] != machine.torch_cuda.split(".")[0]:
        return (
            f"the toolkit is CUDA {machine.toolkit}; torch was built for {machine.torch_cuda} "
            "(set CUDA_HOME to a toolkit of the same major version)"
        )
    if not machine.cuda_sources:
        return "csrc/cuda has no .cu sources"
    return None


def resolve(requested: str, machine: Machine) -> Resolution:
    """What to build for `requested` (auto | cpu | cuda | none) on `machine`, and why."""
    if requested == "none":
        return Resolution("none", "RESNET_FAST_BUILD=none")
    if machine.torch is None:
        raise BuildError(
            "torch is not installed in the build environment.\n"
            "  1. install torch first:       pip install torch\n"
            "  2. build against that torch:  pip install --no-build-isolation .\n"
            "  Or set RESNET_FAST_BUILD=none for the pure Python package."
        )
    no_cpu = missing_for_cpu(machine)
    no_cuda = no_cpu or missing_for_cuda(machine)
    asked = f"RESNET_FAST_BUILD={requested}"
    if requested == "auto":
        if no_cpu:
            return Resolution("none", f"{asked}: {no_cpu}; installing pure Python")
        if no_cuda:
            return Resolution("cpu", f"{asked}: {no_cuda}")
        return Resolution("cuda", f"{asked}: CUDA {machine.toolkit} at {machine.cuda_home}")
    missing = no_cpu if requested == "cpu" else no_cuda
    if missing:
        raise BuildError(f"{asked} is not possible: {missing}")
    return Resolution(requested, asked)


def sources(mode: str, root: Path = ROOT, cutlass: bool = False) -> list[str]:
    """Sources relative to `root`; BuildError if two would share an object file."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    if mode == "cuda":
        patterns += ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
    found = sorted(p.relative_to(root) for pattern in patterns for p in root.glob(pattern))
    if not cutlass:
        found = [p for p in found if not p.match("csrc/cuda/conv*.cu")]
    objects: dict[Path, Path] = {}
    for path in found:
        other = objects.setdefault(path.with_suffix(".o"), path)
        if other != path:
            raise BuildError(f"{other} and {path} would share one object file: rename one")
    return [str(path) for path in found]


def isas(arch: str, root: Path = ROOT) -> list[str]:
    """Instruction sets that have kernels for `arch`, named by csrc/cpu/kernels_<isa>.cpp."""
    names = {p.stem.removeprefix("kernels_") for p in root.glob("csrc/cpu/kernels_*.cpp")}
    if arch.lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    found = [sorted(n for n in names if n.startswith(family)) for family in ("avx", "amx")]
    return ["baseline", *found[0], *found[1]]


def cuda_archs() -> str:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    return listed or DEFAULT_CUDA_ARCHS


def cxx_flags(machine: Machine) -> list[str]:
    # at::parallel_for is a template over `#pragma omp`: without -fopenmp it runs on one thread.
    # Apple's clang has no OpenMP runtime, so macOS builds are single-threaded.
    openmp = ["-fopenmp"] if machine.system == "Linux" else []
    return [*CXX_FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def c_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def extension(resolution: Resolution, machine: Machine) -> setuptools.Extension:
    """The Extension `resnet_fast._C` for a cpu or cuda build."""
    from torch.utils import cpp_extension

    cuda = resolution.mode == "cuda"
    flags = cxx_flags(machine)
    facts = {
        "VERSION": version(),
        "BUILD_MODE": resolution.mode,
        "BUILD_WHY": resolution.why,
        "CXX_FLAGS": " ".join(flags),
        "ISAS": " ".join(isas(machine.arch)),
        "TORCH_VERSION": machine.torch,  # part of the command, so another torch triggers a rebuild
        "CUDA_VERSION": machine.toolkit if cuda else "",
        "CUDA_ARCHS": cuda_archs() if cuda else "",
    }
    cutlass = machine.cutlass if cuda else ()
    defines = ["-DRESNET_FAST_WITH_CUDA"] if cuda else []
    defines += ["-DRESNET_FAST_WITH_CUTLASS"] if cutlass else []
    if cuda:  # else torch takes the architectures of visible GPUs
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    include_dirs = cpp_extension.include_paths(*(["cuda"] if cuda else []))
    return make(
        "resnet_fast._C",
        sources(resolution.mode, cutlass=bool(cutlass)),
        depends=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.[hi]*"))],  # .h .inl
        extra_compile_args={
            "cxx": [
                # -isystem over the -I that torch adds: no warnings from its headers.
                *(flag for path in include_dirs for flag in ("-isystem", path)),
                *flags,
                *(f"-DRESNET_FAST_{key}={c_string(value)}" for key, value in facts.items()),
                *defines,
            ],
            "nvcc": [*NVCC_FLAGS, *(flag for path in cutlass for flag in ("-isystem", path))],
        },
        extra_link_args=["-fopenmp"] if "-fopenmp" in flags else [],
    )


def report(resolution: Resolution, machine: Machine) -> str:
    """The printed report of a build, one fact per line."""
    rows = [("why", resolution.why)]
    if resolution.mode != "none":
        rows += [
            ("compiler", f"{machine.compiler} ({machine.cxx})"),
            ("flags", " ".join(cxx_flags(machine))),
            ("isas", f"{' '.join(isas(machine.arch))} (chosen at run time)"),
            ("torch", f"{machine.torch} (CUDA: {machine.torch_cuda})"),
            ("ninja", shutil.which("ninja") or "not found: compiling one file at a time"),
            ("jobs", os.environ.get("MAX_JOBS") or "ninja's default (MAX_JOBS sets it)"),
        ]
    if resolution.mode == "cuda":
        missing = ("not found (pip install nvidia-cutlass)",)
        cutlass = (machine.cutlass or missing)[0]
        rows.append(("cuda", f"{machine.toolkit}, architectures {cuda_archs()}"))
        rows.append(("cutlass", f"{cutlass}, for the fused convolutions"))
    elif resolution.mode == "none":
        earlier = ROOT / "resnet_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if earlier.exists():
            rows.append(("note", f"{earlier.name} from an earlier build exists and will be used"))
    python = platform.python_version()
    title = f"resnet_fast {version()}: native build = {resolution.mode} (Python {python})"
    return "\n".join([title, *(f"  {key:<9} {value}" for key, value in rows)])


def main() -> None:
    if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
        raise BuildError(
            f"setuptools {setuptools.__version__} is too old: run "
            f"pip install 'setuptools>={MIN_SETUPTOOLS}'"
        )
    requested = requested_build()
    jobs = os.environ.get("MAX_JOBS")
    if jobs and not (jobs.isdigit() and int(jobs) > 0):
        raise BuildError(f"MAX_JOBS={jobs!r}: expected a positive integer")
    if {"sdist", "egg_info"} & set(sys.argv[1:]):  # metadata and sources only: no torch needed
        setuptools.setup()
        return
    # Find the ninja of a virtual environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    machine = probe(requested)
    resolution = resolve(requested, machine)
    print(report(resolution, machine), file=sys.stderr, flush=True)
    if resolution.mode == "none":
        setuptools.setup()
        return
    from torch.utils.cpp_extension import BuildExtension

    setuptools.setup(
        ext_modules=[extension(resolution, machine)], cmdclass={"build_ext": BuildExtension}
    )


if __name__ == "__main__":
    main()
