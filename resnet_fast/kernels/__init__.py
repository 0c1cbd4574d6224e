"""Triton implementations of the ops in `dispatch.ops`.

Each function takes the arguments of the function of the same name in `spec.reference`. It validates
nothing: `dispatch.op_checks` runs first. On CPU tensors the functions run only in Triton's
interpreter (TRITON_INTERPRET=1 before the first import), which is for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

try:
    import triton.tools.tensor_descriptor
except ImportError:
    message = f"the Triton kernels need Triton 3.4 or newer, found {triton.__version__}"
    raise ImportError(message) from None

from ..spec.chain import Conv
from ..spec.dtypes import DTYPES
from .bn_act import add_relu, bn_act, gated_act
from .bn_act_bwd import add_relu_bwd, bn_act_bwd_apply, bn_act_bwd_reduce, gated_act_bwd_apply
from .bn_finalize import bn_bwd_finalize, bn_finalize
from .bn_fold import bn_fold
from .bn_stats import bn_stats
from .conv import conv_add_projection, conv_bn_act
from .conv_plan import implementations_us
from .conv_train import conv_bprop, conv_fprop
from .global_avg_pool import global_avg_pool
from .image_sums import gated_act_bwd_reduce, image_stats
from .launch import INTERPRETING
from .max_pool import bn_relu_max_pool, max_pool_bwd
from .running_stats import update_running as update_running  # in place, so not one of OPS

OPS = {
    f.__name__: f
    for f in (
        add_relu, add_relu_bwd, bn_act, bn_act_bwd_apply, bn_act_bwd_reduce, bn_bwd_finalize,
        bn_finalize, bn_fold, bn_relu_max_pool, bn_stats, conv_add_projection, conv_bn_act,
        conv_bprop, conv_fprop, gated_act, gated_act_bwd_apply, gated_act_bwd_reduce,
        global_avg_pool, image_stats, max_pool_bwd,
    )
}  # fmt: skip


def estimates(x: Tensor, w: Tensor, *rest: Any) -> dict[str, float]:
    """Estimated microseconds of conv_bn_act(x, w, *rest) by implementation; {} without estimate."""
    residual, conv = rest[5], Conv(*map(tuple, rest[8:11]), rest[11])
    return implementations_us(x, w, conv, residual is not None)


def refusal(op: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel of `op` cannot run on `device` in `dtype`; None when it can."""
    if op not in OPS:
        return f"there is no Triton kernel for {op}"
    if dtype not in DTYPES:
        given = str(dtype).removeprefix("torch.")
        return f"the Triton kernels take floating-point tensors, not {given}"
    if device == "cuda":
        return _no_gpu(INTERPRETING)
    if device != "cpu":
        return f"the Triton kernels run on cuda tensors, not on {device}"
    if not INTERPRETING:
        return "the Triton kernels run on cuda tensors (on cpu only with TRITON_INTERPRET=1)"
    if dtype == torch.bfloat16:
        return "Triton's interpreter does not support bf16"
    return None


def _no_gpu(interpreting: bool) -> str | None:
    if interpreting:
        return "TRITON_INTERPRET=1 is set: the Triton kernels run on cpu tensors only; unset it"
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the Triton kernels need compute capability 8.0 or later, found {major}.{minor}"
    return None
