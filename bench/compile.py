"""`python -m bench compile`: compile every kernel of a model's steps, without a GPU, in parallel.

Triton caches compiled kernels in TRITON_CACHE_DIR. A later run of the same step then compiles
nothing, here or on a GPU machine with a copy of the folder. The cache key is the kernel's source,
its arguments' kinds, the GPU architecture and Triton itself (the same wheel, so the same Python
version). The command prints one line per kernel and whether the cache had it.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import sass
from bench.launches import Launch, launches_of
from bench.machine_code import Code, tool
from bench.models import MODES, model_names
from bench.step import Case
from resnet_fast.runtime.options import integers, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

CAPABILITY, MULTIPROCESSORS = 90, 132  # Hopper


@dataclass
class Compiled(Code):
    """The compiled code of one kernel at one configuration.

    code: the `Launch.code` that it is for. cached: whether Triton's cache had it.
    """

    case: str = ""
    config: str = ""
    code: tuple[Any, ...] = ()
    cached: bool = False
    sass: sass.Sass | None = None


class OfflineDriver:
    """Triton's driver without a GPU: a target to compile for, no device to launch on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device: one device per target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def hopper(name: str = "Hopper by rule") -> Any:
    """The target of an H100 or H200; tuning tables apply only if there is one for `name`."""
    from resnet_fast.kernels.launch import Target

    return Target(CAPABILITY, MULTIPROCESSORS, name)


def compile_launches(launches: Iterable[Launch], target: Any, jobs: int) -> Iterator[Compiled]:
    """Compile every distinct kernel of `launches` for `target` in `jobs` processes, in any order.

    Separate processes keep the offline driver apart from a real one. Convolutions come first,
    because they take longest.
    """
    distinct = {one.code: one for one in launches if one.kernel is not None}
    todo = sorted(distinct.values(), key=lambda one: not one.name.startswith("conv"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, min(jobs, len(todo))), mp_context=context) as pool:
        asked = [
            pool.submit(
                _compile, one.kernel.fn.__module__, one.name, list(one.arguments.values()),
                one.options, target, one.code,
            )
            for one in todo
        ]  # fmt: skip
        for future in as_completed(asked):
            yield future.result()


def _compile(
    module: str, name: str, arguments: list[Any], options: dict[str, Any], target: Any, code: Any
) -> Compiled:
    """Compile in a process of the pool, which finds the kernel by its name."""
    from triton.runtime import driver

    driver.set_active(OfflineDriver(target.capability))
    kernel = getattr(importlib.import_module(module), name)
    result = compile_one(kernel, arguments, options, "", target, True)
    result.code = code
    return result


def compile_one(
    kernel: Any, arguments: Any, options: Any, case: str, target: Any, sections: bool = False
) -> Compiled:
    """Compile one launch for the active driver's target and read its machine code.

    sections: also count its instructions (`bench.sass`).
    """
    from triton import knobs

    name = kernel.fn.__name__.removesuffix("_kernel")
    blocks = [
        f"{p.name.lower().removeprefix('block_').removeprefix('box_')}{a}"
        for p, a in zip(kernel.params, arguments, strict=True)
        if p.name.startswith(("BLOCK_", "BOX_")) or (p.name == "SPLIT" and a > 1)
    ]
    config = " ".join(blocks) + "".join(
        f" {short}{options[key]}"
        for key, short in (("num_warps", "w"), ("num_stages", "s"))
        if key in options
    )
    result = Compiled(name, target.name, case=case, config=config, cached=True)

    def heard(*, cache_hit: bool, **_: Any) -> None:
        result.cached = cache_hit

    begin = time.perf_counter()
    before, knobs.compilation.listener = knobs.compilation.listener, heard
    try:
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
    except Exception as error:  # any error of the compiler becomes the row's failure
        result.failure = f"does not compile: {str(error).strip().splitlines()[-1]}"
        return result
    finally:
        knobs.compilation.listener = before
    result.seconds = time.perf_counter() - begin
    read_code(result, compiled.asm["cubin"], sections)
    result.shared = compiled.metadata.shared  # requested at launch; none of it is static
    half = not case.startswith("fp64") and "ieee" not in arguments
    if result.local:
        result.failure = f"spills {result.local} bytes per thread"
    elif (
        target.capability == 90
        and name.startswith("conv")
        and half
        and "HGMMA" not in result.tensor_cores
    ):
        result.failure = "the convolution has no HGMMA"
    elif result.shared > target.shared:
        result.failure = f"{result.shared} bytes of shared memory exceed the limit of a block"
    return result


def read_code(result: Compiled, cubin: bytes, sections: bool = False) -> None:
    """Fill in `result` from the machine code of a cubin of one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        disassembly = tool("nvdisasm", path)
        result.read(tool("cuobjdump", "--dump-resource-usage", path), disassembly)
    if sections:
        result.sass = sass.read(disassembly)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench compile`."""
    add_case_arguments(parser)
    parser.add_argument("--stages", action="store_true",
                        help="also compile the other launches of `bench gpu`")  # fmt: skip


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the steps, and for the number of compiler processes."""
    add = parser.add_argument
    add("--model", type=names(model_names), default=["resnet50"], metavar="NAME,…",
        help="models (default: resnet50)")  # fmt: skip
    add("--mode", type=names(lambda: MODES), default=["train", "infer"], metavar="train,infer",
        help="default: train,infer")  # fmt: skip
    add("--batch", type=integers, default=[256, 1], metavar="N,…",
        help="batch sizes; batch 1 only for infer (default: 256,1)")  # fmt: skip
    add("--dtype", choices=list(PRECISIONS), default="bf16", help="default: bf16")
    add("--image-size", type=positive(int), default=224, metavar="N", help="pixels (default: 224)")
    add("--jobs", type=positive(int), default=os.cpu_count(), metavar="N",
        help="compiler processes (default: one per CPU)")  # fmt: skip


def cases(args: argparse.Namespace) -> list[Case]:
    """The requested steps."""
    return [
        Case(model, mode, batch, args.dtype, torch.device("cuda"), args.image_size)
        for model in args.model
        for mode in args.mode
        for batch in args.batch
        if mode == "infer" or batch > 1
    ]


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 if a kernel does not compile, spills or does not use tensor cores."""
    begin, done = time.perf_counter(), []
    try:
        target = hopper("NVIDIA H200")
        launches = [one for case in cases(args) for one in launches_of(case, target)]
        if args.stages:
            from bench import gpu

            plan = gpu.Plan(gpu.headline(torch.device("cuda")))
            launches += [one for _, found in gpu.wanted(plan, target) for one in found]
    except (ImportError, ValueError) as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2
    for one in compile_launches(launches, target, args.jobs):
        done.append(one)
        said = one.failure or ("hit" if one.cached else f"{one.seconds:.1f} s")
        print(f"{one.kernel:24} {one.config:40} {said}", flush=True)
    hits, failed = sum(one.cached for one in done), sum(bool(one.failure) for one in done)
    seconds = time.perf_counter() - begin
    print(f"{len(done)} kernels, {hits} from the cache, {failed} failed, {seconds:.0f} s")
    return int(failed > 0)
