"""Kernel launches, all of them, and the target GPU that tiles are chosen for.

A target is a compute capability (90 is sm_90), a number of multiprocessors and a name. Under
`TRITON_INTERPRET=1` CPU tensors have one too, a small Hopper, so that the interpreter takes the
path of recent GPUs. Within `compile_for` every launcher only compiles: meta tensors in, cubins out,
on any machine.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..runtime import recording

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


SHARED_KIB = {  # maximum per block, by compute capability
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
}  # fmt: skip


@functools.cache
def _warn_of(capability: int) -> None:
    major, minor = divmod(capability, 10)
    warnings.warn(
        f"resnet_fast does not know compute capability {major}.{minor}: its Triton kernels use "
        f"only {min(SHARED_KIB.values())} KiB of shared memory per block and may be slow",
        RuntimeWarning,
        stacklevel=3,
    )


class Target(NamedTuple):
    """A GPU to choose tiles for: compute capability times ten, multiprocessors, name."""

    capability: int
    multiprocessors: int
    name: str

    @property
    def shared(self) -> int:
        """Maximum shared memory per program, in bytes.

        Source: CUDA C++ programming guide, "Technical Specifications per Compute Capability". A
        compute capability that SHARED_KIB does not list gets its minimum, with a warning.
        """
        if self.capability not in SHARED_KIB:
            _warn_of(self.capability)
        return SHARED_KIB.get(self.capability, min(SHARED_KIB.values())) << 10

    @property
    def has_tma(self) -> bool:
        """Whether the GPU loads and stores tiles by tensor descriptors (Hopper and later)."""
        return self.capability >= 90


INTERPRETER = Target(90, 2, "interpreter")
_compiling: tuple[Target, Callable[..., None], bool] | None = None


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(
        10 * properties.major + properties.minor, properties.multi_processor_count, properties.name
    )


def compiling() -> str | None:
    """Configurations to compile within `compile_for`: "every" or "rule"; None outside of it."""
    if _compiling is None:
        return None
    return "every" if _compiling[2] else "rule"


def target(x: Tensor) -> Target:
    """The target that a kernel on `x` runs on."""
    if _compiling is not None:
        return _compiling[0]
    if x.device.type == "cuda":
        return _device_target(x.device.index)
    return INTERPRETER


def all_registers(x: Tensor) -> dict[str, int]:
    """Launch options that allow 255 registers per thread, in fp64 and on GPUs other than sm_90.

    There ptxas by default spills registers for more occupancy (80, 128 or 168 registers).
    """
    half = x.dtype != torch.float64
    return {} if half and target(x).capability == 90 else {"maxnreg": 255}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of the first argument that is a tensor.

    Fused multiply-adds are enabled, the default up to Triton 3.9. Where a kernel requires a single
    rounding it calls `tl.fma`.
    """
    options["enable_fp_fusion"] = True
    if INTERPRETING:
        options.pop("maxnreg", None)  # not an option of the interpreter
    if _compiling is not None:
        _compiling[1](kernel, grid, args, options)
        return
    device = _device(args)
    start = functools.partial(_start, kernel, grid, args, options, device)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        recording.launched(start, args)
        return
    with torch.cuda.device(device):
        recording.launched(start, args)


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    device: torch.device,
) -> Callable[..., None]:
    """kernel[grid](*args, **options); returns a function that launches it on similar arguments.

    On a GPU that is the compiled kernel on the device's current stream. It does not specialize on
    the arguments again, which takes the host longer than the launch.
    """
    compiled = kernel[grid](*args, **options)
    if compiled is None:  # the interpreter
        return functools.partial(kernel[grid], **options)
    run, stream_of = compiled[(*grid, 1, 1)[:3]], triton.runtime.driver.active.get_current_stream
    return lambda *args: run(*args, stream=stream_of(device.index))


def _device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        if isinstance(arg, tuple) and any(isinstance(t, Tensor) for t in arg):
            return _device(arg)
        base = getattr(arg, "base", arg)  # a tensor descriptor's tensor
        if isinstance(base, Tensor):
            return base.device
    raise TypeError("args: no tensor among them")


@contextmanager
def compile_for(chosen: Target, sink: Callable[..., None], every: bool = True) -> Iterator[None]:
    """Within it launchers call sink(kernel, grid, args, options) instead of launching.

    every: once per configuration of a kernel, else only for the one that would run: from a tuning
    table or from the kernel's rule.
    """
    global _compiling
    before, _compiling = _compiling, (chosen, sink, every)
    try:
        yield
    finally:
        _compiling = before
