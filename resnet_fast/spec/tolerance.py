"""The one tolerance rule, for `resnet-fast verify` and for every test.

The error of a result against plain PyTorch in fp64 is compared with the error of plain PyTorch in
the result's dtype:

    max|actual − fp64| ≤ k·(worst|reference − fp64| + eps·max|fp64|),   k = 2, for gradients 3

Each max is over a whole tensor, because single elements of the reference may be exact by chance.
In a small tensor even the largest error may be small by chance, so `worst` is at least SPREAD times
the root mean square; for normal errors this matters below about a hundred elements. The rule has no
constants for single ops. Compare tensors whose parts differ in size (one channel of mean 1000, one
of mean 1) part by part. PyTorch's error also depends on the number of threads and on the
convolution algorithm, so a result that fails against one run can be compared with more of them
(`plain_runs`).

The gradient of a ReLU jumps at zero, so both sides are correct where its input is within rounding
of zero. `near_kink` marks that band. Its elements are left out, and a band of more than
MAX_KINK_SHARE of a tensor fails. Method after flash-attention's tests (Dao 2022, arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

FACTOR = 2.0
GRADIENT_FACTOR = 3.0
SPREAD = 3.0
KINK_WIDTH = 8.0
MAX_KINK_SHARE = 0.01


@dataclass(frozen=True)
class Verdict:
    """Result of `compare`: the error, the allowed error, and the reason if `ok` is False."""

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
    """Compare `actual` with the references by the rule of this module.

    Args:
        actual: the result, of any shape.
        same_dtype_reference: plain PyTorch's result from the same inputs in the same dtype, or
            several (in other layouts); the largest error counts. For a double `actual` it may be an
            fp32 result from inputs that are exact in fp32; its error is scaled by
            eps(fp64)/eps(fp32). k is then one more, because the fp64 reference itself has an error
            of that size.
        fp64_reference: plain PyTorch's result from the same inputs in fp64.
        gradient: True allows k = 3 instead of 2.
        kink: bool tensor of `actual`'s shape: elements to leave out (`near_kink`). NaN in them
            still fails.
        dtype: dtype of the arithmetic if it is narrower than `actual`'s (fp32 gradients under bf16
            autocast); None is `actual`'s.
        rms: True compares root mean squares instead of maxima. This is for whole networks in 16
            bits, where thousands of ReLUs change sides, in plain PyTorch too; the largest error is
            at one of them, by chance.
        more: function that returns further plain results of the same shape, called if `actual`
            fails against those given.

    Returns:
        The verdict. NaN or infinity, another shape or dtype, or too wide a band fail. Integer and
        bool tensors must be equal; `error` is then the number of different elements.
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
    """`compare`; raises AssertionError with `what` and the figures if it fails."""
    verdict = compare(actual, same_dtype_reference, fp64_reference, **options)
    assert verdict.ok, f"{what or 'result'}: {verdict}"
    return verdict


def plain_runs(run: Callable[[], T]) -> Iterator[T]:
    """Results of `run` in plain PyTorch by one thread and three, each with oneDNN, without it, and
    with every fp32 convolution by it: PyTorch computes small ones itself on some CPUs.
    """
    threads, there = torch.get_num_threads(), torch.backends.mkldnn.is_available()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for enabled in (True, False):
                with torch.backends.mkldnn.flags(enabled=enabled):
                    yield run()
            if there:
                with _ByOneDnn():
                    found = run()
                yield found
    finally:
        torch.set_num_threads(threads)


class _ByOneDnn(TorchDispatchMode):
    """Runs fp32 convolutions on a CPU by oneDNN, except those of one channel."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, w, bias, stride, padding, dilation, transposed, _, groups = args
            fits = x.is_cpu and x.dtype == torch.float32 and x.size(1) > 1 and x.numel() > 0
            if fits and not transposed:
                return torch.mkldnn_convolution(x, w, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))


def near_kink(preactivation: Tensor, dtype: torch.dtype) -> Tensor:
    """The band |u| ≤ KINK_WIDTH·eps(dtype)·max|u| of a ReLU's fp64 input u.

    `dtype` is the dtype of the arithmetic that computes u (fp32 inside a bf16 kernel).
    """
    size = preactivation.abs()
    if size.numel() == 0:
        return size.bool()
    return size <= KINK_WIDTH * torch.finfo(dtype).eps * size.max()


def _verdict(error: float, allowed: float, share: float) -> Verdict:
    why = ""
    if share > MAX_KINK_SHARE:
        why = f"{share:.1%} of it is at the ReLU's kink, allowed are {MAX_KINK_SHARE:.0%}"
    return Verdict(error, allowed, error <= allowed and not why, why, share)


def _size(value: Tensor, rms: bool) -> float:
    """max|value|, or its root mean square; 0 without elements."""
    if value.numel() == 0:
        return 0.0
    return _rms(value) if rms else value.abs().max().item()


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item() if value.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
