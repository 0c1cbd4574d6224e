"""Compares every op of `dispatch.ops` with the function of the same name in `spec.reference`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..dispatch import backends, ops
from ..spec import reference, tolerance
from ..spec.dtypes import stats_dtype
from .check import GRADIENT, Runs, Setting, Trial, Values
from .op_cases import Arguments, Draw, build, cases_of, cast

GRADIENTS = {
    "bn_bwd_finalize", "add_relu_bwd", "bn_act_bwd_reduce", "bn_act_bwd_apply", "max_pool_bwd",
    "conv_bprop", "gated_act_bwd_reduce", "gated_act_bwd_apply",
}  # fmt: skip


def trials(setting: Setting, quick: bool) -> Iterator[Trial]:
    """All cases of all ops that the implementation has; only the first of each op if `quick`."""
    for op in ops.NAMES:
        if backends.lacks(setting.impl, op, setting.device):
            continue
        for variant, shape in islice(cases_of(op), 1 if quick else None):
            yield _trial(op, variant, shape, setting)


def _trial(op: str, variant: str, shape: str, setting: Setting) -> Trial:
    run = getattr(torch.ops.resnet_fast, op)
    case = f"{variant}, {shape}"

    def prepare() -> Runs:
        generator = torch.Generator().manual_seed(sum(map(ord, case)))
        draw = Draw(setting.torch_dtype, setting.memory_format, setting.device, generator)
        arguments = build(variant, shape, draw)

        def plain(dtype: torch.dtype | None) -> Values:
            results = getattr(reference, op)(*(cast(arguments, dtype) if dtype else arguments))
            return _named(op, results, arguments[0])

        return Runs(
            lambda: _named(op, run(*arguments, setting.impl), arguments[0]),
            lambda: [plain(torch.float32 if setting.dtype == "fp64" else None)],
            lambda: plain(torch.float64),
            _kink(op, arguments) if op in ("bn_act", "gated_act") else {},
        )

    return Trial("ops", op, case, setting, prepare)


def _named(op: str, results: Any, like: Tensor) -> Values:
    """Results by the names in the op's schema, without empty ones. Bit masks are unpacked, with the
    elements in the order of `like`.
    """
    returns = [r.name for r in getattr(torch.ops.resnet_fast, op).default._schema.returns]
    if isinstance(results, list):
        returns = [f"y[{i}]" for i in range(len(results))]
    results = results if isinstance(results, (tuple, list)) else (results,)
    prefix = GRADIENT if op in GRADIENTS else ""
    values = {}
    for value, name in zip(results, returns, strict=True):
        if value.numel() and name != "index":  # the index of equal maxima is ambiguous
            bits = value.dtype == torch.uint8
            value = reference.unpack_mask(value, like) if bits else value
            values[prefix + (name or ("dx" if prefix else "y"))] = value
    return values


def _kink(op: str, arguments: Arguments) -> Mapping[str, Tensor]:
    """Where rounding may decide the op's mask: its affine map runs in the vectors' dtype."""
    u, _ = getattr(reference, op)(*cast(arguments)[:-2], False, False)
    return {"mask": tolerance.near_kink(u, stats_dtype(arguments[0]))}
