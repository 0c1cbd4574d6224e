"""`python -m bench cuda`: compile every .cu of csrc/cuda without a GPU and read its machine code.

nvcc makes one cubin per file and architecture. One row per kernel: registers, spills, shared
memory, tensor-core instruction, kind of loads. Exit status 1 if a kernel does not compile or
spills, or if a convolution for sm_90a has no HGMMA. Without the CUTLASS headers the convolutions
are skipped with a message.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.machine_code import Code, tool, write

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Compiled(Code):
    """One kernel of one file; `seconds` is the compile time of the file."""

    file: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_80,sm_90a",
                        help="GPU architectures (default: sm_80,sm_90a)")  # fmt: skip
    parser.add_argument("--only", default="", help="only files whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                        help="compilers at a time (default: one per CPU)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the table to this file")


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 on a failure, 2 without nvcc or for a bad argument."""
    archs = args.arch.split(",")
    bad = [arch for arch in archs if not re.fullmatch(r"sm_\d+a?", arch)]
    if bad:
        print(f"--arch: expected names like sm_80,sm_90a, got {bad[0]!r}", file=sys.stderr)
        return 2
    if args.jobs < 1:
        print(f"--jobs: expected at least 1, got {args.jobs}", file=sys.stderr)
        return 2
    if shutil.which("nvcc") is None:
        print("nvcc is not on PATH: install the CUDA toolkit", file=sys.stderr)
        return 2
    files, without = sources()
    if without:
        print(without)
    files = [file for file in files if args.only in file.name]
    done = []
    print(HEADER)
    for rows in compiled([(file, arch) for file in files for arch in archs], args.jobs):
        done += rows
        print("\n".join(map(line, rows)), flush=True)
    failed = [row for row in done if row.failure]
    write(args.json, done)
    print(f"\n{len(done)} kernels of {len(files)} files, {len(failed)} failed")
    for row in failed:
        print(f"{row.arch} {row.file} {row.kernel}: {row.failure}")
    return 1 if failed or not done else 0


def sources() -> tuple[list[Path], str]:
    """The .cu files that can be compiled here, and a message about those that cannot."""
    build = runpy.run_path(str(ROOT / "setup.py"))
    cutlass = bool(build["cutlass_headers"]())
    found = [ROOT / name for name in build["sources"]("cuda", ROOT, cutlass) if ".cu" in name]
    missing = "convolutions skipped: CUTLASS not found (pip install nvidia-cutlass)"
    return found, "" if cutlass else missing


def compiled(parts: list[tuple[Path, str]], jobs: int) -> Iterator[list[Compiled]]:
    """The kernels of every file and architecture, with `jobs` compilers at a time."""
    options = flags()
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda part: compile_file(*part, options), parts)


def flags() -> list[str]:
    """nvcc's options, with the CUTLASS headers if they are installed."""
    build = runpy.run_path(str(ROOT / "setup.py"))
    headers = build["cutlass_headers"]()
    return [*build["NVCC_FLAGS"], *(flag for path in headers for flag in ("-isystem", path))]


def compile_cubin(source: Path, arch: str, options: list[str], cubin: Path) -> str:
    """Compile `source` by nvcc for one architecture; returns the first error, or nothing."""
    command = ["nvcc", "-std=c++17", *options, f"-arch={arch}", "-cubin", source, "-o", cubin]
    done = subprocess.run([os.fspath(c) for c in command], capture_output=True, text=True)
    if not done.returncode:
        return ""
    return next(iter(re.findall(r".*error.*", done.stderr)), done.stderr.strip()[-200:])


def compile_file(source: Path, arch: str, options: list[str]) -> list[Compiled]:
    """The kernels of one file (none if it is host code), by nvcc for one architecture."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "code.cubin"
        failure = compile_cubin(source, arch, options, cubin)
        seconds = time.perf_counter() - begin
        if failure:
            return [Compiled("", arch, seconds=seconds, failure=failure, file=source.name)]
        usage = tool("cuobjdump", "--dump-resource-usage", cubin)
        code = tool("nvdisasm", cubin)
    rows = []
    functions = re.findall(r"Function (\S+):\s*\n?\s*(.*)", usage)
    bodies = {part.split(",", 1)[0]: part for part in re.split(r"\n\s*\.section\s+\.text\.", code)}
    for (mangled, numbers), name in zip(functions, names(functions), strict=True):
        row = Compiled(name, arch, seconds=seconds, file=source.name)
        row.read(numbers, bodies[mangled])
        rows.append(with_failure(row))
    return rows


def names(functions: list[tuple[str, str]]) -> list[str]:
    """Kernel names as in the source; mangled if there is no c++filt."""
    if not functions:
        return []
    mangled = "\n".join(name for name, _ in functions)
    if shutil.which("c++filt"):
        done = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True)
        mangled = done.stdout.rstrip("\n")
    return [short(name) for name in mangled.split("\n")]


def short(name: str) -> str:
    """The name and template arguments of a demangled kernel."""
    found = re.search(r"(\w+_kernel)(<[^(]*?>)?\(", name)
    if not found:
        return re.sub(r"\W+", " ", name)[:60]
    arguments = re.sub(r"\w+::|\(bool\)", "", found[2] or "")
    return found[1].removesuffix("_kernel") + arguments


def with_failure(row: Compiled) -> Compiled:
    """The row, with `failure` set if its code is at fault."""
    if row.local:
        row.failure = f"spills {row.local} bytes per thread"
    elif row.file.startswith("conv_sm90") and row.arch == "sm_90a" and row.tensor_cores != "HGMMA":
        row.failure = "the convolution has no HGMMA"
    return row


HEADER = (
    f"{'file':18} {'kernel':52} {'arch':7} {'regs':>4} {'spill':>5} {'shared':>6}  "
    f"{'math':6} {'loads':16} seconds"
)


def line(r: Compiled) -> str:
    """A row of the table."""
    text = (
        f"{r.file:18} {r.kernel:52} {r.arch:7} {r.registers:4d} {r.local:5d} {r.shared:6d}  "
        f"{r.tensor_cores:6} {r.loads:16} {r.seconds:.0f}"
    )
    return text + (f"  FAILED: {r.failure}" if r.failure else "")
