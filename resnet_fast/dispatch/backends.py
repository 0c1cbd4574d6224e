"""Which implementations are available on this machine, why others are not, and which runs an op.

An implementation is a table of functions named after the ops of `dispatch.ops`. "auto" takes the
first available one that supports the op on the tensor's device and dtype. On a GPU, it takes the
fastest one if a tuning table has the shape (`auto_impl`). An explicit name takes exactly that
implementation, or raises `RuntimeError` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..runtime import settings
from ..runtime.files import reason
from ..spec import in_two, reference
from ..spec.chain import IMPLS
from ..spec.dtypes import NATIVE_DTYPES
from ..spec.layout import memory_format
from . import auto_impl
from .op_checks import checked

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
PARTS = {  # op → the native ops that it calls (`spec.in_two`)
    "conv_add_projection": ("conv_bn_act",),
    "conv_fprop": ("conv_fprop", "bn_finalize"),
    "conv_bprop": ("conv_bprop", "bn_bwd_finalize"),
    "bn_act_bwd_reduce": ("bn_act_bwd_reduce", "bn_bwd_finalize"),
}
CPU_ALONE = ("image_stats", "gated_act", "gated_act_bwd_reduce", "gated_act_bwd_apply")
"""Ops without a native CUDA kernel."""
SOURCE = Path(__file__).resolve().parents[2]
IN_SOURCE = (
    "if resnet_fast is installed, run Python from another folder; "
    "to build it here, run `python setup.py build_ext --inplace`"
)


@dataclass(frozen=True)
class Status:
    """One implementation on one device type: available (`live`) or not, and why."""

    impl: str
    device: str
    live: bool
    why: str


@functools.cache
def native_module() -> tuple[Any | None, str]:
    """The compiled extension `resnet_fast._C`, or None, and why.

    Warns once per process if the extension exists but cannot be used. Raises BadSetting
    (`runtime.settings`) if an environment variable has an invalid value.
    """
    if importlib.util.find_spec("resnet_fast._C") is None:
        if (SOURCE / "setup.py").exists():
            return None, f"resnet_fast._C is not built in the source folder {SOURCE}; {IN_SOURCE}"
        return None, "resnet_fast._C is not built (RESNET_FAST_BUILD=none or no compiler)"
    try:
        module = importlib.import_module("resnet_fast._C")
    except ImportError as error:  # built against another torch, or a library is missing
        return None, _unusable(f"resnet_fast._C does not load: {error}")
    if not hasattr(module, "configure"):
        return None, _unusable("resnet_fast._C is older than the package")
    try:
        module.configure(**settings.native())
        built_for = module.build_info()["torch_version"]
    except RuntimeError as error:  # an instruction set that this CPU lacks
        raise settings.BadSetting(reason(error)) from None
    if built_for != torch.__version__:
        why = f"resnet_fast._C is built for torch {built_for}, not for {torch.__version__}"
        return None, _unusable(why)
    return module, "built"


def _unusable(why: str) -> str:
    """Warn with the reason `why`, and return it."""
    warnings.warn(
        f"{why}. The slower plain PyTorch runs instead of the native kernels. To rebuild them, run "
        f"in the resnet_fast source folder: {REBUILD}",
        RuntimeWarning,
        stacklevel=3,
    )
    return why


def native_ops() -> Any:
    """The namespace of the native ops. Each op dispatches by the device of its tensors."""
    return torch.ops.resnet_fast_native


@functools.cache
def triton_module() -> tuple[Any | None, str]:
    """The package of Triton kernels, or None, and why."""
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed"
    try:
        return importlib.import_module("resnet_fast.kernels"), "installed"
    except ImportError as error:
        return None, f"resnet_fast.kernels does not load: {error}"


def preference(device: str) -> tuple[str, ...]:
    """The order in which "auto" tries implementations on `device`.

    On a CPU, Triton runs only in its interpreter, for tests, so "auto" does not take it.
    """
    return ("native", "reference") if device == "cpu" else ("triton", "native", "reference")


def build_info() -> dict[str, Any] | None:
    """Compiler, flags and instruction sets of the native extension, or None without it."""
    module, _ = native_module()
    return None if module is None else module.build_info()


def empty_cache() -> int:
    """Free the memory that the native CPU kernels cache, and return it to the system.

    The cache holds packed inference filters and memory blocks for large results. Its limit is
    RESNET_FAST_CPU_CACHE_MB; the default is 1/8 of the memory of the machine or container. The
    least recently used entries are dropped first.

    Returns:
        Size of the freed memory in bytes; 0 without the native extension.
    """
    module, _ = native_module()
    return 0 if module is None else module.empty_cache()


def kept() -> dict[str, int] | None:
    """State of the CPU kernels' cache in bytes: budget, packed_filters, free_blocks.

    None without the native extension.
    """
    module, _ = native_module()
    return None if module is None else module.kept()


def refusal(impl: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run `op` on tensors of `device` and `dtype`; None when it can."""
    if impl == "reference":
        return None
    if impl == "native":
        module, why = native_module()
        if module is None:
            return why
        if device not in NATIVE_DTYPES:
            return f"the native kernels run on {', '.join(NATIVE_DTYPES)}, not on {device}"
        if device == "cuda" and not module.build_info()["cuda"]:
            return f"resnet_fast._C is built without CUDA ({module.build_info()['build_why']})"
        if device == "cuda" and not torch.cuda.is_available():
            return "this machine has no CUDA device"
        if dtype not in NATIVE_DTYPES[device]:
            names = ", ".join(str(d).removeprefix("torch.") for d in NATIVE_DTYPES[device])
            given = str(dtype).removeprefix("torch.")
            return f"the native {device} kernels support {names}, not {given}"
        return f"there is no native {device} kernel for {op}" if lacks(impl, op, device) else None
    module, why = triton_module()
    return why if module is None else module.refusal(op, device, dtype)


def lacks(impl: str, op: str, device: str) -> bool:
    """Whether `impl` has no kernel for `op` on `device`, where it has others."""
    if impl != "native" or native_module()[0] is None:
        return False
    own = hasattr(native_ops(), PARTS.get(op, (op,))[0])
    return not own or (device == "cuda" and op in CPU_ALONE)


def _function(impl: str, op: str) -> Callable[..., Any]:
    if impl == "reference":
        return getattr(reference, op)
    if impl == "native":
        if op in PARTS:
            parts = [getattr(native_ops(), part).default for part in PARTS[op]]
            both = functools.partial(getattr(in_two, op), *parts)
            both = functools.wraps(getattr(reference, op))(both)
            return checked(both) if PARTS[op][0] != op else both
        return getattr(native_ops(), op).default
    return checked(triton_module()[0].OPS[op])


class Choice(NamedTuple):
    """The implementation that runs an op: its name, its function, and the reason."""

    impl: str
    run: Callable[..., Any]
    why: str


@functools.cache
def _resolve(op: str, impl: str, device: str, dtype: torch.dtype) -> Choice:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    reasons = []
    for name in preference(device) if impl == "auto" else (impl,):
        why = refusal(name, op, device, dtype)
        if why is None:
            said = "; ".join(reasons) or ("first choice" if impl == "auto" else f"impl={impl!r}")
            return Choice(name, _function(name, op), said)
        reasons.append(f"not {name}: {why}")
    raise RuntimeError(f"impl={impl!r} cannot run {op}: {why}; use impl='auto'")


@functools.cache
def _live(op: str, device: str, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The implementations that "auto" compares by measurement, in the order of preference.

    The reference is included only if there is no other. On a GPU it runs cuDNN's convolutions,
    which the other implementations also use where cuDNN is faster.
    """
    names = [name for name in preference(device) if refusal(name, op, device, dtype) is None]
    return {name: _function(name, op) for name in names if name != "reference" or len(names) == 1}


def resolve(op: str, impl: str, x: Tensor, args: Sequence[Any] = ()) -> Choice:
    """The implementation that runs op(x, *args) for `impl`."""
    if x.device.type != "cuda":
        return _resolve(op, impl, x.device.type, x.dtype)
    why = unsuited(op, x, args)
    if impl == "auto":
        live = _live(op, "cuda", x.dtype)
        if why is not None:
            live = {name: run for name, run in live.items() if name != "native"}
        if live:
            estimates = None
            if op == "conv_bn_act" and live.keys() == {"triton", "native"} and _estimated(x):
                estimates = functools.partial(_estimates, x, args)
            name, reason = auto_impl.pick(op, _gpu(x.device.index), (x, *args), live, estimates)
            return Choice(name, live[name], reason)
        impl = "reference"
    elif impl == "native" and why is not None:
        raise RuntimeError(f"impl='native' cannot run {op}: {why}")
    return _resolve(op, impl, "cuda", x.dtype)


def _estimated(x: Tensor) -> bool:
    """Whether there are estimates for x's GPU and dtype: 16 bits on Hopper."""
    return x.dtype.itemsize == 2 and _capability(x.device.index) == (9, 0)


def _estimates(x: Tensor, args: Sequence[Any]) -> dict[str, float]:
    """Estimated microseconds of conv_bn_act(x, *args) by implementation; {} without an estimate,
    or if native would use cuDNN. The question is not part of a recorded program.
    """
    with _disable_current_modes():
        route, _ = native_ops().conv_route(x, args[0], *args[9:13], "conv_bn_act")
    if route != "cutlass":
        return {}
    return triton_module()[0].estimates(x, *args)


def eights(w: Tensor) -> bool:
    """Whether CUTLASS takes filters w [K,C,R,S]: K and C multiples of 8, or C < 8 (padded)."""
    filters, channels = w.shape[:2]
    return filters % 8 == 0 and (channels % 8 == 0 or channels < 8)


def unsuited(op: str, x: Tensor, args: Sequence[Any]) -> str | None:
    """Why CUTLASS, which native uses in inference, has no kernel for these arguments, or None.

    CUTLASS runs 16-bit channels_last tensors with groups=1; native runs all others by cuDNN. With
    RESNET_FAST_CUDA_CONV=auto, cuDNN also runs the shapes that CUTLASS does not support.
    """
    if PARTS.get(op, (op,))[0] != "conv_bn_act" or x.dtype.itemsize != 2:
        return None
    operands = {"w": (x, args[0])}
    if op == "conv_add_projection":
        operands["source_w"] = args[3], args[4]
    for name, (of, w) in operands.items():
        filters, channels = w.shape[:2]
        own = channels == of.size(1) and memory_format(of, w) == torch.channels_last
        if own and not eights(w) and _by_cutlass_alone():
            return (
                f"{name}: CUTLASS takes channels and filters that are multiples of 8, got "
                f"{channels} channels and {filters} filters. Use impl='auto', or "
                "RESNET_FAST_CUDA_CONV=auto for cuDNN"
            )
    return None


def _by_cutlass_alone() -> bool:
    """Whether CUTLASS is built in and must take every convolution that it could."""
    built = (build_info() or {}).get("cutlass") == "built in"
    return built and settings.CUDA_CONV.read() == "cutlass"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _gpu(index: int) -> str:
    return torch.cuda.get_device_name(index)


def chosen(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """The implementation that `resolve` takes if no tuning table chooses another."""
    return _resolve(op, impl, device, dtype).impl


def status() -> list[Status]:
    """Every implementation on every device type that it supports: available or not, and why."""
    rows = [Status("reference", "any", True, "plain PyTorch, always available")]
    for device in ("cpu", "cuda"):
        why = refusal("native", "bn_act", device, torch.float32)
        rows.append(Status("native", device, why is None, why or "built"))
    why = refusal("triton", "bn_act", "cuda", torch.float32)
    rows.append(Status("triton", "cuda", why is None, why or "installed"))
    return rows
