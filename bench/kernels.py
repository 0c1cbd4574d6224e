"""`python -m bench kernels`: compile every Triton kernel without a GPU and read its machine code.

bf16 and fp32 are compiled at every configuration, fp16 and fp64 at the rule's configurations.

The launchers run on meta tensors, with a driver that has a target but no device. The command
compiles what they would launch and reads the machine code: registers, spills, shared memory,
tensor-core instructions, how loads are pipelined. Exit status 1 if a kernel does not compile or
spills, or if a convolution on sm_90 has no HGMMA although its dtype allows it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compile import Compiled, OfflineDriver, compile_one
from bench.layers import Layer
from bench.machine_code import write
from resnet_fast.spec.chain import Conv
from resnet_fast.spec.dtypes import BY_NAME

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}  # of the largest GPU of each
# One layer of ResNet-50 for each kind of convolution.
ONE, THREE = (1, 1), (3, 3)
LAYERS = {
    "1x1": Layer(256, 56, 56, 64, ONE, Conv()),
    "1x1+res": Layer(64, 56, 56, 256, ONE, Conv(), residual=True),
    "1x1/2": Layer(256, 56, 56, 512, ONE, Conv((2, 2)), relu=False),
    "3x3@56": Layer(64, 56, 56, 64, THREE, Conv(padding=(1, 1))),
    "3x3@28": Layer(128, 28, 28, 128, THREE, Conv(padding=(1, 1))),
    "3x3@14+res": Layer(256, 14, 14, 256, THREE, Conv(padding=(1, 1)), residual=True),
    "3x3@7": Layer(512, 7, 7, 512, THREE, Conv(padding=(1, 1))),
    "3x3/2": Layer(128, 56, 56, 128, THREE, Conv((2, 2), (1, 1))),
    "7x7/2": Layer(3, 224, 224, 64, (7, 7), Conv((2, 2), (3, 3))),
    "3x3 grouped": Layer(128, 56, 56, 128, THREE, Conv(padding=(1, 1), groups=32)),
}
EPS = 1e-5
# Compiled at every configuration; other dtypes at the rule's. fp16 code equals bf16 code except for
# the type in its instructions, and fp64 is for tests.
THROUGHOUT = ("bf16", "fp32")
# TRAINED: also compiled for training, wide enough for every tile. QUICK: those of --quick.
TRAINED = ("1x1", "1x1/2", "3x3@14+res", "3x3/2")
QUICK = ("1x1+res", "3x3@14+res", "3x3/2", "7x7/2")
# Also compiled for one image, where the grid is so small that GEMM_K is split.
SMALL = "3x3@7"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90",
                        help="GPU architectures, such as sm_80,sm_90 (default: sm_90)")  # fmt: skip
    parser.add_argument("--dtype", default="bf16,fp16,fp32,fp64",
                        help=f"some of {','.join(BY_NAME)} (default: all)")  # fmt: skip
    parser.add_argument("--only", default="", help="only kernels or cases whose name contains this")
    parser.add_argument("--quick", action="store_true",
                        help="only the rule's configuration, and few shapes")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N",
                        help="processes, at most one per architecture and dtype")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the table to this file")


def run(args: argparse.Namespace) -> int:
    """Compile and print; 1 on a spill, a compile error, or a convolution without HGMMA on sm_90."""
    try:
        archs = [int(re.fullmatch(r"sm_(\d+)a?", arch)[1]) for arch in args.arch.split(",")]
    except TypeError:
        print(f"--arch: expected names like sm_80,sm_90, got {args.arch!r}", file=sys.stderr)
        return 2
    dtypes = args.dtype.split(",")
    unknown = [name for name in dtypes if name not in BY_NAME]
    if unknown:
        known = ", ".join(BY_NAME)
        print(f"--dtype: expected some of {known}; got {unknown[0]!r}", file=sys.stderr)
        return 2
    from resnet_fast import kernels

    if kernels.INTERPRETING:
        print(
            "TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it",
            file=sys.stderr,
        )
        return 2
    if args.jobs < 1:
        print(f"--jobs: expected at least 1, got {args.jobs}", file=sys.stderr)
        return 2
    done = []
    print(HEADER)
    parts = [(arch, dtype, args.quick, args.only) for arch in archs for dtype in dtypes]
    for result in compiled(parts, args.jobs):
        done.append(result)
        print(line(result), flush=True)
    failed = [result for result in done if result.failure]
    write(args.json, done)
    seconds = sum(result.seconds for result in done)
    print(f"\n{len(done)} compiled in {seconds:.0f} s, {len(failed)} failed")
    for result in failed:
        print(f"{result.arch} {result.kernel} {result.case} {result.config}: {result.failure}")
    return 1 if failed or not done else 0


Part = tuple[int, str, bool, str]
"""Architecture, dtype, --quick, --only: what one process compiles."""


def compiled(parts: list[Part], jobs: int) -> Iterator[Compiled]:
    """The compiled kernels of `parts`, part by part, by at most `jobs` processes."""
    if min(jobs, len(parts)) == 1:
        for part in parts:
            yield from compile_all(*part)
        return
    context = multiprocessing.get_context("spawn")  # each process has its own driver and cache
    with ProcessPoolExecutor(min(jobs, len(parts)), mp_context=context) as pool:
        for results in pool.map(_compile_part, parts):
            yield from results


def _compile_part(part: Part) -> list[Compiled]:
    return list(compile_all(*part))


def compile_all(arch: int, dtype: str, quick: bool, only: str = "") -> Iterator[Compiled]:
    """Compile what the launchers launch for sm_`arch`, each distinct kernel once."""
    from triton.runtime import driver

    from resnet_fast.kernels import launch

    target = launch.Target(arch, PROCESSORS.get(arch, 100), f"sm_{arch}")
    driver.set_active(OfflineDriver(arch))
    seen: set[Any] = set()
    for case, start in cases(BY_NAME[dtype], quick):
        asked: list[tuple[Any, Any, Any]] = []

        def sink(*what: Any, asked: list = asked) -> None:
            asked.append(what)

        with launch.compile_for(target, sink, every=not quick and dtype in THROUGHOUT):
            start()
        for kernel, _, arguments, options in asked:
            name = kernel.fn.__name__.removesuffix("_kernel")
            constants = tuple(a for a in arguments if not isinstance(a, Tensor))
            key = (name, str(constants), str(options))
            if key in seen or (only not in name and only not in case):
                continue
            seen.add(key)
            yield compile_one(kernel, arguments, options, f"{dtype} {case}", target)


def cases(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of the ops' Triton functions on meta tensors: the name of a case and the call."""
    for name, layer in LAYERS.items():
        if not quick or name in QUICK:
            yield from conv_cases(name, layer, dtype)
    for channels_last in (True,) if quick else (True, False):
        yield from norm_cases(dtype, channels_last).items()


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def _vectors(size: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [torch.empty(size, dtype=wide, device="meta") for _ in range(count)]


def conv_cases(
    name: str, layer: Layer, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The convolution of `layer` in inference, its norm folded; some also in training."""
    from resnet_fast import kernels

    x_shape, y_shape = layer.shapes(64)
    x, w, y = (_tensor(shape, dtype) for shape in (x_shape, layer.weight_shape, y_shape))
    norm = None, *_vectors(layer.filters, 2, dtype), None, None
    residual = y if layer.residual else None
    geometry = layer.conv.args()
    yield name, partial(kernels.conv_bn_act, x, w, *norm, residual, layer.relu, EPS, *geometry)
    if layer.residual:
        yield f"{name} projection", _projection_case(layer, x, w, norm)
    if name in TRAINED:
        fprop, affine = kernels.conv_fprop, (*norm[1:3], EPS, None, False)
        yield f"{name} stats", partial(fprop, x, w, None, None, True, *affine, *geometry)
        yield from gradient_cases(name, x, w, y, geometry)
    if name == SMALL:
        yield from small_cases(f"{name} N=1", layer, dtype)


def _projection_case(
    layer: Layer, x: Tensor, w: Tensor, norm: tuple[Tensor | None, ...]
) -> Callable[[], Any]:
    """The end of a block with a projection of stride 2."""
    from resnet_fast import kernels

    _, (n, k, p, q) = layer.shapes(x.size(0))
    source, filters = _tensor((n, 128, 2 * p, 2 * q), x.dtype), _tensor((k, 128, 1, 1), x.dtype)
    affine, geometry = norm[1:3], (*layer.conv.args(), [2, 2])
    given = x, w, *affine, source, filters, *affine, layer.relu, *geometry
    return partial(kernels.conv_add_projection, *given)


def small_cases(
    name: str, layer: Layer, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The convolution of `layer` for one image, by both kernels, with everything they can fuse."""
    from resnet_fast import kernels
    from resnet_fast.kernels.conv import conv_fused
    from resnet_fast.kernels.conv_plan import STATS, Fusion

    x_shape, y_shape = layer.shapes(1)
    x, w, y = (_tensor(shape, dtype) for shape in (x_shape, layer.weight_shape, y_shape))
    norm = _vectors(layer.filters, 2, dtype)
    infer, training = Fusion(*norm, residual=y), STATS
    given = None, *norm, None, None, None, True, EPS, *layer.conv.args()
    yield name, partial(kernels.conv_bn_act, x, w, *given)
    for what, fusion in (("infer", infer), ("training", training)):
        for tma in (None, False):
            yield f"{name} {what}", partial(conv_fused, x, w, layer.conv, fusion, tma)


def gradient_cases(
    name: str, x: Tensor, w: Tensor, y: Tensor, geometry: Any
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Both gradients of a convolution: the last of a block, one inside it, the first."""
    from resnet_fast import kernels

    def bits(t: Tensor) -> Tensor:
        shape = (t.numel() // t.size(1), t.size(1) // 8)
        return torch.empty(shape, dtype=torch.uint8, device="meta")

    a, mean, b, c = _vectors(w.size(0), 4, x.dtype)
    above, below = (a, y, mean, b, c), (*_vectors(x.size(1), 4, x.dtype), None)
    first = (*[None] * 5, x, bits(x))
    need = (*geometry, True, True, False)
    for what, mask, beside in (
        ("last", bits(y), (*below, None, None)),
        ("inner", None, (*below, None, None)),
        ("first", None, first),
    ):
        call = partial(kernels.conv_bprop, y, w, x, mask, *above, *beside, *need)
        yield f"{name} {what}", call


def norm_cases(dtype: torch.dtype, channels_last: bool) -> dict[str, Callable[[], Any]]:
    """All ops that are not convolutions, at one layer of ResNet-50."""
    from resnet_fast import kernels
    from resnet_fast.kernels.conv_train import dgrad_epilogue

    n, channels, size = 64, 256, 56
    x, y, z = (_tensor((n, channels, size, size), dtype, channels_last) for _ in range(3))
    rows, inner = (n * size * size, channels) if channels_last else (n * channels, size * size)
    mask = torch.empty((rows, inner // 8), dtype=torch.uint8, device="meta")
    a, b, c, d = _vectors(channels, 4, dtype)
    e, f, g, h = (t.view(n, channels) for t in _vectors(n * channels, 4, dtype))
    windows = [3, 3], [2, 2], [1, 1]
    tracked = torch.empty((), dtype=torch.int64, device="meta")
    norm = a, b, None, None, c, d, tracked, n * size * size
    shared = a, b, c, d[:1], c, d, tracked, 0
    pooled = _tensor((n, channels, size // 2, size // 2), dtype, channels_last)
    index = _tensor(pooled.shape, torch.uint8, channels_last)
    return {
        f"{name} {'NHWC' if channels_last else 'NCHW'}": call
        for name, call in {
            "bn": partial(kernels.bn_act, x, a, b, None, None, None, True, True),
            "bn+res": partial(kernels.bn_act, x, a, b, y, None, None, True, True),
            "dual": partial(kernels.bn_act, x, a, b, y, c, d, True, True),
            "add": partial(kernels.add_relu, x, y, True),
            "sums": partial(kernels.bn_act_bwd_reduce, x, mask, y, a, b, c, *[None] * 4),
            "sums dual": partial(kernels.bn_act_bwd_reduce, x, mask, y, a, b, c, z, c, d, a),
            "bwd": partial(kernels.bn_act_bwd_apply, x, mask, a, y, b, c, d, None),
            "bwd+res": partial(kernels.bn_act_bwd_apply, x, mask, a, y, b, c, d, z),
            "frozen": partial(kernels.bn_act_bwd_apply, x, mask, a, *[None] * 5),
            "stats": partial(kernels.bn_stats, x),
            "image stats": partial(kernels.image_stats, x),
            "gated": partial(kernels.gated_act, x, e, f, y, True, True),
            "gated sums": partial(kernels.gated_act_bwd_reduce, x, mask, y, e),
            "gated sums linear": partial(kernels.gated_act_bwd_reduce, x, None, y, e),
            "gated bwd": partial(kernels.gated_act_bwd_apply, x, e, f, y, g, h),
            "gated frozen": partial(kernels.gated_act_bwd_apply, x, e, f, None, None, None),
            "pool": partial(kernels.bn_relu_max_pool, x, a, b, *windows, True),
            "pool alone": partial(kernels.bn_relu_max_pool, x, None, None, *windows, False),
            "pool bwd": partial(kernels.max_pool_bwd, pooled, index, x, a, b, *windows),
            "pool bwd alone": partial(
                kernels.max_pool_bwd, pooled, index, x, None, None, *windows
            ),
            "vectors": partial(kernels.bn_finalize, a, b, n, c, d, EPS),
            "fold": partial(kernels.bn_fold, x, [None, a, b, c, d] * 3 + [a] * 5, [EPS] * 4),
            "running": partial(kernels.update_running, [norm] * 3, 0.1),
            "running shared": partial(kernels.update_running, [norm, *[shared] * 3], 0.1),
            "running mean": partial(kernels.update_running, [norm] * 3, None),
            "vectors bwd": partial(kernels.bn_bwd_finalize, a, b, c, d, n),
            "dgrad": partial(dgrad_epilogue, x, y, a, b, c, d, z, mask),
        }.items()
    }


HEADER = (
    f"{'kernel':22} {'case':20} {'configuration':34} {'arch':6} {'regs':>4} {'spill':>5} "
    f"{'shared':>6}  {'math':7} loads"
)


def line(r: Compiled) -> str:
    """A row of the table."""
    text = (
        f"{r.kernel:22} {r.case:20} {r.config:34} {r.arch:6} {r.registers:4d} {r.local:5d} "
        f"{r.shared:6d}  {r.tensor_cores:7} {r.loads}"
    )
    return text + (f"  FAILED: {r.failure}" if r.failure else "")
