"""The one tolerance rule, for `resnet-fast verify` and for every test.

A result is judged by its distance from plain PyTorch in fp64, against the distance at which plain
PyTorch in the result's own dtype lies from there:

    max|actual − fp64| ≤ k·(max|reference − fp64| + eps·max|fp64|),   k = 2, for gradients 3

Each max runs over a whole tensor: an element of the reference may be exact by luck, its worst one
hardly. So the rule asks for as good a result as PyTorch's, knows no constant of any op, and cannot
be met by a result that is wrong where the tensor is large. Tensors whose parts differ in size (a
channel of mean 1000 beside one of mean 1) are compared part by part.

The gradient of a ReLU jumps at zero, so where a pre-activation lies within rounding of it, either
side is right. `near_kink` is that band; its elements are left out, and a band that holds more than
MAX_KINK_SHARE of a tensor fails. Method after flash-attention's tests (Dao 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
GRADIENT_FACTOR = 3.0
KINK_WIDTH = 8.0
MAX_KINK_SHARE = 0.01


@dataclass(frozen=True)
class Verdict:
    """What `compare` found: the error, what was allowed, and why not where `ok` is False."""

    error: float
    allowed: float
    ok: bool
    why: str = ""
    kink_share: float = 0.0

    def __str__(self) -> str:
        sign = "<=" if self.error <= self.allowed else ">"
        text = f"error {self.error:.3g} {sign} {self.allowed:.3g} allowed"
        return f"{text} ({self.why})" if self.why else text


def compare(
    actual: Tensor,
    same_dtype_reference: Tensor,
    fp64_reference: Tensor,
    *,
    gradient: bool = False,
    kink: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Verdict:
    """Judge `actual` by the rule of this module.

    Args:
        actual: the result to judge, of any shape.
        same_dtype_reference: plain PyTorch's result from the same inputs in the same dtype. Nothing
            is wider than fp64: beside a double `actual` it is the fp32 result (from inputs that are
            exact in fp32), whose error is scaled by eps(fp64)/eps(fp32).
        fp64_reference: plain PyTorch's result from the same inputs, widened to fp64.
        gradient: allow k = 3 instead of 2.
        kink: bool, like `actual`: elements to leave out (`near_kink`). NaN is found there too.
        dtype: of the arithmetic, where it is narrower than `actual`'s (fp32 gradients under bf16
            autocast); None takes `actual`'s.

    Returns:
        The verdict. NaN or infinity anywhere, another shape or dtype, or too wide a band fail.
        Integer and bool tensors must be equal; `error` is then the count of elements that differ.
    """
    for name, value in (("reference", same_dtype_reference), ("fp64", fp64_reference)):
        if actual.shape != value.shape:
            shapes = f"{tuple(actual.shape)}, the {name} result {tuple(value.shape)}"
            return Verdict(math.inf, 0.0, False, f"its shape is {shapes}")
    double = actual.dtype == torch.float64
    scaled = double and same_dtype_reference.dtype == torch.float32
    if actual.dtype != same_dtype_reference.dtype and not scaled:
        dtypes = f"{_name(actual.dtype)}, the reference's {_name(same_dtype_reference.dtype)}"
        return Verdict(math.inf, 0.0, False, f"its dtype is {dtypes}")
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, True)
    share = 0.0 if kink is None else kink.double().mean().item()
    outside = None if kink is None else ~kink
    if not actual.is_floating_point():
        count = _select(actual != fp64_reference.to(actual), outside).sum().item()
        return _verdict(float(count), 0.0, share)
    expected = fp64_reference.to(actual.device).double()
    named = (("result", actual), ("reference", same_dtype_reference), ("fp64 result", expected))
    for name, value in named:
        if not torch.isfinite(value).all():
            return Verdict(math.inf, 0.0, False, f"NaN or infinity in the {name}")
    error = _distance(actual, expected, outside)
    own = _distance(same_dtype_reference.to(actual.device), expected, outside)
    eps = torch.finfo(dtype or actual.dtype).eps
    if scaled:
        own *= eps / torch.finfo(torch.float32).eps
    factor = GRADIENT_FACTOR if gradient else FACTOR
    return _verdict(error, factor * (own + eps * expected.abs().max().item()), share)


def assert_close(
    actual: Tensor, same_dtype_reference: Tensor, fp64_reference: Tensor, what: str = "", **options
) -> Verdict:
    """`compare`, with an AssertionError that says `what` and the figures where it fails."""
    verdict = compare(actual, same_dtype_reference, fp64_reference, **options)
    assert verdict.ok, f"{what or 'result'}: {verdict}"
    return verdict


def near_kink(preactivation: Tensor, dtype: torch.dtype) -> Tensor:
    """The declared band: where |u| ≤ KINK_WIDTH·eps(dtype)·max|u| for a ReLU's fp64 input u.

    `dtype` is that of the arithmetic that makes u (fp32 inside a bf16 kernel).
    """
    size = preactivation.abs()
    if size.numel() == 0:
        return size.bool()
    return size <= KINK_WIDTH * torch.finfo(dtype).eps * size.max()


def _verdict(error: float, allowed: float, share: float) -> Verdict:
    why = ""
    if share > MAX_KINK_SHARE:
        why = f"{share:.1%} of it lie at the ReLU's kink, at most {MAX_KINK_SHARE:.0%} may"
    return Verdict(error, allowed, error <= allowed and not why, why, share)


def _distance(value: Tensor, expected: Tensor, outside: Tensor | None) -> float:
    difference = _select((value.double() - expected).abs(), outside)
    return difference.max().item() if difference.numel() else 0.0


def _select(value: Tensor, outside: Tensor | None) -> Tensor:
    return value if outside is None else value[outside]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
