"""Every set of dtypes: of ops, kernels and commands, of statistics, and of autocast."""

from __future__ import annotations

import torch
from torch import Tensor

BY_NAME = {
    "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
"""Names of the dtypes in commands."""
DTYPES = tuple(BY_NAME.values())
"""Dtypes of the ops, the reference and the Triton kernels."""
PRECISIONS = {name: dtype for name, dtype in BY_NAME.items() if name != "fp64"}
"""Dtypes of training, tuning and benchmarks."""
NATIVE_DTYPES = {"cpu": DTYPES[:3], "cuda": DTYPES}
"""Dtypes of the native kernels, by device; the CPU kernels do not support fp16."""

# Computed once, because the compiler of torch 2.6 does not trace is_autocast_available.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def stats_dtype(x: Tensor) -> torch.dtype:
    """dtype of channel vectors for activations `x`: fp64 for double, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution reads x: autocast's if it is on (double stays double)."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or device not in AUTOCAST_DEVICES:
        return x.dtype
    if not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """x as a convolution reads it under autocast; a norm or an addition reads x uncast."""
    return x.to(autocast_dtype(x))
