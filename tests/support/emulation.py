"""`csrc/cuda` without a GPU: its kernels, compiled for the CPU over `tests/cuda_emulator`.

Every thread of a block runs, barrier by barrier; what differs from a GPU is time, and the order of
threads that do not wait for each other. In place of CUTLASS' convolutions there is a plain one, so
that the torch side is tested.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cuda_emulator"
KERNELS = ("bn_act", "max_pool", "reduce", "vectors")
CXX = shlex.split(os.environ.get("CXX") or "c++")
DEFINES = ["-DRESNET_FAST_WITH_CUTLASS"]
FLAGS = "-std=c++20 -O1 -g0 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas".split()


def refusal():
    """Why the emulator cannot be built here, or None."""
    if shutil.which(CXX[0]) is None:
        return f"no C++ compiler: {CXX[0]}"
    if os.uname().sysname != "Linux":
        return "the emulator is written for Linux"
    if not torch._C._GLIBCXX_USE_CXX11_ABI:
        return "torch has the standard library's old strings (releases before 2.7)"
    return None


def ops():
    """The namespace of the emulated ops."""
    torch.ops.load_library(_library())
    return torch.ops.resnet_fast_emulated


def launches():
    """How many of its kernels the emulator has run so far."""
    return ctypes.CDLL(_library()).emulated_launches()


@contextlib.contextmanager
def splits(count):
    """Every reduction makes `count` partial results a channel."""
    emulate = ctypes.CDLL(_library()).emulate_splits
    emulate(ctypes.c_int64(count))
    try:
        yield
    finally:
        emulate(ctypes.c_int64(0))


@functools.cache
def _library():
    """Builds it where sources or torch have changed."""
    files = [p for folder in (ROOT / "csrc", EMULATOR) for p in folder.rglob("*") if p.is_file()]
    state = hashlib.sha256(" ".join([torch.__version__, *CXX, *FLAGS, *DEFINES]).encode())
    for path in sorted(p for p in files if p.parent != ROOT / "csrc" / "cpu"):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "tests" / f"cuda_emulator-{state.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this test run may be building it
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    return folder / "emulated.so"


def _build(folder):
    from torch.utils.cpp_extension import include_paths

    kernels = (ROOT / "csrc" / "cuda" / f"{name}.cu" for name in KERNELS)
    sources = [*kernels, EMULATOR / "conv.cpp", EMULATOR / "ops.cpp"]
    running = []
    for source in sources:
        include = [f"-I{EMULATOR}"]
        if source.stem == "ops":
            include += [flag for path in include_paths() for flag in ("-isystem", path)]
        command = [*CXX, *FLAGS, *DEFINES, *include, "-x", "c++", "-c", source]
        command += ["-o", folder / source.stem]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0 and "warning" not in errors, errors
    library = Path(torch.__file__).parent / "lib"
    objects = [folder / source.stem for source in sources]
    libraries = [f"-L{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    output = ["-o", folder / "emulated.so"]
    subprocess.run([*CXX, "-shared", *objects, *libraries, *output], check=True)
