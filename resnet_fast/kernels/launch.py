"""Where kernels run: the target of a tensor's device, and the one place that launches.

A target is what tiles are chosen by: compute capability (90 is sm_90) and multiprocessors. Under
`TRITON_INTERPRET=1` CPU tensors have one too, a small Hopper, so that the interpreter takes the
path of the newest GPUs. `compile_for` makes every launcher compile and launch nothing: meta
tensors in, cubins out, on any machine.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import recording

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


SHARED_KIB = {  # by compute capability: the most of one block
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
}  # fmt: skip


@functools.cache
def _warn_of(capability: int) -> None:
    major, minor = divmod(capability, 10)
    warnings.warn(
        f"resnet_fast does not know compute capability {major}.{minor}: its Triton kernels use "
        f"{min(SHARED_KIB.values())} KiB of shared memory, which may be slow",
        RuntimeWarning,
        stacklevel=3,
    )


class Target(NamedTuple):
    """A GPU as tiles see it: compute capability times ten, multiprocessors, name."""

    capability: int
    multiprocessors: int
    name: str

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may have.

        Source: CUDA C++ programming guide, "Technical Specifications per Compute Capability". An
        architecture that is not listed there gets the least of all, with a warning.
        """
        if self.capability not in SHARED_KIB:
            _warn_of(self.capability)
        return SHARED_KIB.get(self.capability, min(SHARED_KIB.values())) << 10

    @property
    def has_tma(self) -> bool:
        """Whether it loads and stores tiles by tensor descriptors (Hopper and later)."""
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
    """ "every" or "rule", the configurations to compile, within `compile_for`; else None."""
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
    """Options of a launch: a thread may have 255 registers, in double and on GPUs but sm_90.

    There ptxas, left to itself, spills for the sake of occupancy (80, 128 or 168 registers).
    """
    half = x.dtype != torch.float64
    return {} if half and target(x).capability == 90 else {"maxnreg": 255}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of the first argument that is a tensor.

    Fused multiply-adds are on, as in every Triton up to 3.9: what must round once says `tl.fma`.
    """
    options["enable_fp_fusion"] = True
    if INTERPRETING:
        options.pop("maxnreg", None)  # what the interpreter does not know
    if _compiling is not None:
        _compiling[1](kernel, grid, args, options)
        return
    start = functools.partial(_start, kernel, grid, args, options)
    device = _device(args)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        recording.launched(start, args)
        return
    with torch.cuda.device(device):
        recording.launched(start, args)


def _start(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., None]:
    """kernel[grid](*args, **options); gives what launches it on other arguments of their kind.

    On a GPU that is what Triton compiled: it looks at no argument anew, which takes the host longer
    than the launch.
    """
    compiled = kernel[grid](*args, **options)
    if compiled is None:  # the interpreter
        return functools.partial(kernel[grid], **options)
    return compiled[(*grid, 1, 1)[:3]]


def _device(args: tuple[Any, ...]) -> torch.device:
    for arg in args:
        base = getattr(arg, "base", arg)  # a tensor descriptor's tensor
        if isinstance(base, Tensor):
            return base.device
    raise TypeError("args: no tensor among them")


@contextmanager
def compile_for(chosen: Target, sink: Callable[..., None], every: bool = True) -> Iterator[None]:
    """Within it launchers hand (kernel, grid, args, options) to `sink` in place of launching.

    every: once for each configuration of a kernel, else for the one that would run: a table's, or
    the one that its rule picks.
    """
    global _compiling
    before, _compiling = _compiling, (chosen, sink, every)
    try:
        yield
    finally:
        _compiling = before
