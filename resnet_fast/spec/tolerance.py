"""The one tolerance rule, for `resnet-fast verify` and for every test.

A result is judged by its distance from plain PyTorch in fp64, against the distance at which plain
PyTorch in the result's own dtype lies from there:

    max|actual − fp64| ≤ k·(worst|reference − fp64| + eps·max|fp64|),   k = 2, for gradients 3

Each max runs over a whole tensor: an element of the reference may be exact by luck, its worst one
hardly. In a tensor of few elements even the worst may be small by luck, so `worst` is no less than
SPREAD times the root mean square: for normal errors that matters below some hundred elements.
So the rule asks for as good a result as PyTorch's and knows no constant of any op. Tensors whose
parts differ in size (a channel of mean 1000 beside one of mean 1) are to be compared part by part.
How near PyTorch comes also depends on the threads and on who convolves, so a result that fails
beside one run may be judged beside more of them (`plain_runs`).

The gradient of a ReLU jumps at zero, so where a pre-activation lies within rounding of it, either
side is right. `near_kink` is that band; its elements are left out, and a band that holds more than
MAX_KINK_SHARE of a tensor fails. Method after flash-attention's tests (Dao 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FACTOR = 2.0
GRADIENT_FACTOR = 3.0
SPREAD = 3.0
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
    same_dtype_reference: Tensor | Sequence[Tensor],
    fp64_reference: Tensor,
    *,
    gradient: bool = False,
    kink: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rms: bool = False,
    more: Callable[[], Sequence[Tensor]] | None = None,
) -> Verdict:
    """Judge `actual` by the rule of this module.

    Args:
        actual: the result to judge, of any shape.
        same_dtype_reference: plain PyTorch's result from the same inputs in the same dtype, or
            several (in other layouts), of which the worst counts. Nothing is wider than fp64:
            beside a double `actual` an fp32 result may stand (from inputs that are exact in fp32),
            whose error is scaled by eps(fp64)/eps(fp32); and k is one more, since the fp64
            reference is then as far from the truth as a good result.
        fp64_reference: plain PyTorch's result from the same inputs, widened to fp64.
        gradient: allow k = 3 instead of 2.
        kink: bool, like `actual`: elements to leave out (`near_kink`). NaN is found there too.
        dtype: of the arithmetic, where it is narrower than `actual`'s (fp32 gradients under bf16
            autocast); None takes `actual`'s.
        rms: compare root mean squares instead of maxima. For whole networks in 16 bits: there
            thousands of ReLUs change sides, in plain PyTorch as in `actual`, the largest element
            of an error is one of them, and which one is luck.
        more: makes further plain results, of the same shape, for an `actual` that fails beside
            those given.

    Returns:
        The verdict. NaN or infinity anywhere, another shape or dtype, or too wide a band fail.
        Integer and bool tensors must be equal; `error` is then the count of elements that differ.
    """
    many = not isinstance(same_dtype_reference, Tensor)
    references = list(same_dtype_reference) if many else [same_dtype_reference]
    double = actual.dtype == torch.float64
    for value in (fp64_reference, *references):
        if actual.shape != value.shape:
            shapes = f"{tuple(actual.shape)}, expected {tuple(value.shape)}"
            return Verdict(math.inf, 0.0, False, f"its shape is {shapes}")
    for value in references:
        if actual.dtype != value.dtype and not (double and value.dtype == torch.float32):
            dtypes = f"{_name(actual.dtype)}, expected {_name(value.dtype)}"
            return Verdict(math.inf, 0.0, False, f"its dtype is {dtypes}")
    if actual.numel() == 0:
        return Verdict(0.0, 0.0, True)
    share = 0.0 if kink is None else kink.double().mean().item()

    def outside(value: Tensor) -> Tensor:
        return value if kink is None else value[~kink]

    if not actual.is_floating_point():
        count = outside(actual != fp64_reference.to(actual)).sum().item()
        return _verdict(float(count), 0.0, share)
    expected = fp64_reference.to(actual.device).double()
    named = [("result", actual), ("fp64 result", expected)]
    for name, value in named + [("reference", value) for value in references]:
        if not torch.isfinite(value).all():
            return Verdict(math.inf, 0.0, False, f"NaN or infinity in the {name}")
    eps = torch.finfo(dtype or actual.dtype).eps
    own = 0.0
    for value in references:
        scale = eps / torch.finfo(value.dtype).eps if value.dtype != actual.dtype else 1.0
        difference = outside(value.to(expected) - expected)
        own = max(own, scale * max(_size(difference, rms), 0 if rms else SPREAD * _rms(difference)))
    error = _size(outside(actual.double() - expected), rms)
    factor = (GRADIENT_FACTOR if gradient else FACTOR) + double
    verdict = _verdict(error, factor * (own + eps * _size(expected, rms)), share)
    if verdict.ok or more is None:
        return verdict
    return compare(
        actual, [*references, *more()], fp64_reference,
        gradient=gradient, kink=kink, dtype=dtype, rms=rms,
    )  # fmt: skip


def assert_close(
    actual: Tensor,
    same_dtype_reference: Tensor | Sequence[Tensor],
    fp64_reference: Tensor,
    what: str = "",
    **options: Any,
) -> Verdict:
    """`compare`, with an AssertionError that says `what` and the figures where it fails."""
    verdict = compare(actual, same_dtype_reference, fp64_reference, **options)
    assert verdict.ok, f"{what or 'result'}: {verdict}"
    return verdict


def plain_runs(run: Callable[[], T]) -> Iterator[T]:
    """`run` of plain PyTorch by one thread and by three, with oneDNN and without."""
    threads = torch.get_num_threads()
    try:
        for count, enabled in itertools.product((1, 3), (True, False)):
            torch.set_num_threads(count)
            with torch.backends.mkldnn.flags(enabled=enabled):
                yield run()
    finally:
        torch.set_num_threads(threads)


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


def _size(value: Tensor, rms: bool) -> float:
    """max|value|, or its root mean square; 0 where there are no elements."""
    if value.numel() == 0:
        return 0.0
    return _rms(value) if rms else value.abs().max().item()


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item() if value.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
