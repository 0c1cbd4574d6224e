"""Arguments for every op of `dispatch.ops`: random, repeatable, in any dtype and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import reference
from .check import Setting

Arguments = list[Any]
SIZES = {"8x7x5": (2, 8, 7, 5), "3x9x7": (3, 3, 9, 7), "24x7x7 N=1": (1, 24, 7, 7)}
AWAY = 0.1  # conv_bprop recomputes a ReLU: its inputs keep this far from the kink


@dataclass(frozen=True)
class Inputs:
    """A source of random tensors for one setting; equal seeds give equal values.

    All values are exact in `Setting.exact_dtype`, so fp64 sees what the kernel sees.
    """

    setting: Setting
    generator: torch.Generator

    def act(self, *shape: int) -> Tensor:
        """Activations or filters, standard normal."""
        return self.exact(torch.randn(shape, generator=self.generator))

    def exact(self, x: Tensor) -> Tensor:
        """x [N,C,H,W] rounded to what every run represents, in the setting's dtype and layout."""
        x = x.to(self.setting.exact_dtype).to(self.setting.device, self.setting.torch_dtype)
        return x.contiguous(memory_format=self.setting.memory_format)

    def vec(self, size: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        """A channel vector, uniform."""
        v = torch.rand(size, generator=self.generator) * (high - low) + low
        wide = torch.float64 if self.setting.dtype == "fp64" else torch.float32
        return v.to(self.setting.device, wide)

    def param(self, size: int, low: float = 0.5, high: float = 1.5) -> Tensor:
        """A parameter of a normalization, in the activations' dtype."""
        v = self.vec(size, low, high)
        return v.to(self.setting.exact_dtype).to(self.setting.torch_dtype)

    def mask(self, like: Tensor) -> Tensor:
        """A ReLU's bit mask beside `like`, half of it set."""
        bits = torch.rand(like.shape, generator=self.generator) < 0.5
        bits = bits.to(like.device).contiguous(memory_format=self.setting.memory_format)
        return reference.pack_mask(bits)


def _bn_stats(size: str, mean: float = 0.0) -> Callable[[Inputs], Arguments]:
    return lambda make: [make.exact(make.act(*SIZES[size]) + mean)]


def _global_avg_pool(size: str) -> Callable[[Inputs], Arguments]:
    return lambda make: [make.act(*SIZES[size])]


def _bn_finalize(affine: bool) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        weight, bias = (make.param(24), make.param(24, -1, 1)) if affine else (None, None)
        return [make.vec(24), make.vec(24, 1, 200), 98, weight, bias, 1e-5]

    return build


def _bn_bwd_finalize(make: Inputs) -> Arguments:
    return [make.vec(24), make.vec(24), make.vec(24, 0.5, 2), make.vec(24, 0.5, 2), 98]


def _bn_act(
    size: str, residual: bool = False, dual: bool = False, relu: bool = True, mask: bool = True
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = SIZES[size]
        scale, shift = make.vec(shape[1], -1.5, 1.5), make.vec(shape[1])
        skip = make.act(*shape) if residual or dual else None
        more = (make.vec(shape[1], 0.5, 1.5), make.vec(shape[1])) if dual else (None, None)
        return [make.act(*shape), scale, shift, skip, *more, relu, mask]

    return build


def _add_relu(size: str, mask: bool = True) -> Callable[[Inputs], Arguments]:
    return lambda make: [make.act(*SIZES[size]), make.act(*SIZES[size]), mask]


def _add_relu_bwd(size: str) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        dy = make.act(*SIZES[size])
        return [dy, make.mask(dy)]

    return build


def _bn_act_bwd_reduce(
    size: str, dual: bool = False, relu: bool = True
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = SIZES[size]
        dy, z = make.act(*shape), make.act(*shape)
        spread = make.vec(shape[1]), make.vec(shape[1], 0.5, 2)
        more = (make.act(*shape), make.vec(shape[1]), make.vec(shape[1], 0.5, 2))
        mask = make.mask(dy) if relu else None
        return [dy, mask, z, *spread, *(more if dual else (None,) * 3)]

    return build


def _bn_act_bwd_apply(
    size: str, relu: bool = True, batch: bool = True, norm: bool = True, residual: bool = False
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = SIZES[size]
        dy = make.act(*shape)
        a = make.vec(shape[1], 0.5, 2) if norm else None
        through = [make.act(*shape), *(make.vec(shape[1]) for _ in range(3))]
        skip = make.act(*shape) if residual else None
        mask = make.mask(dy) if relu else None
        return [dy, mask, a, *(through if norm and batch else (None,) * 4), skip]

    return build


WINDOWS = {"3x3 stride 2": ([3, 3], [2, 2], [1, 1]), "2x3": ([2, 3], [1, 2], [1, 0])}


def _bn_relu_max_pool(size: str, windows: str, norm: bool = True) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = SIZES[size]
        affine = (make.vec(shape[1], -1.5, 1.5), make.vec(shape[1])) if norm else (None, None)
        return [make.act(*shape), *affine, *WINDOWS[windows], False]

    return build


def _max_pool_bwd(size: str, windows: str, sums: bool = True) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        x = make.act(*SIZES[size])
        y, index = reference.bn_relu_max_pool(x, None, None, *WINDOWS[windows], True)
        spread = (make.vec(x.size(1)), make.vec(x.size(1), 0.5, 2)) if sums else (None, None)
        return [make.act(*y.shape), index, x, *spread, *WINDOWS[windows]]

    return build


@dataclass(frozen=True)
class Geometry:
    """A convolution's shapes: x, filters [K,R,R] and how they meet."""

    x: tuple[int, int, int, int]
    k: int
    r: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def args(self) -> tuple[list[int], list[int], list[int], int]:
        return [self.stride] * 2, [self.padding] * 2, [self.dilation] * 2, self.groups

    def tensors(self, make: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """x, w and a tensor like the output."""
        x = make.act(*self.x)
        w = make.act(self.k, self.x[1] // self.groups, self.r, self.r) * 0.25
        reach = self.dilation * (self.r - 1) + 1
        out = [(s + 2 * self.padding - reach) // self.stride + 1 for s in self.x[2:]]
        return x, w, make.act(self.x[0], self.k, *out)


GEOMETRIES = {
    "3x3": Geometry((2, 8, 7, 5), 16, 3, padding=1),
    "1x1": Geometry((2, 16, 7, 7), 24, 1),
    "1x1 stride 2": Geometry((2, 16, 9, 7), 24, 1, stride=2),
    "7x7 stride 2": Geometry((2, 3, 15, 13), 16, 7, stride=2, padding=3),
    "3x3 stride 2 groups 4": Geometry((2, 16, 9, 7), 16, 3, stride=2, padding=1, groups=4),
    "3x3 dilation 2": Geometry((1, 8, 9, 9), 8, 3, padding=2, dilation=2),
}


def _conv_fprop(
    geometry: str, prologue: bool, stats: bool, wide_filters: bool = False
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = GEOMETRIES[geometry]
        x, w, _ = shape.tensors(make)
        c = x.size(1)
        affine = (make.vec(c, 0.5, 1.5), make.vec(c)) if prologue else (None, None)
        return [x, _widened(w, wide_filters), *affine, stats, *shape.args()]

    return build


def _conv_bprop(
    geometry: str,
    norm: bool = True,
    prologue: bool = True,
    sums: bool = True,
    act: bool = False,
    relu: bool = False,
    residual: bool = False,
    wide_filters: bool = False,
    need: tuple[bool, bool] = (True, True),
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = GEOMETRIES[geometry]
        x, w, dy = shape.tensors(make)
        c, k = x.size(1), w.size(0)
        through = [make.vec(k, 0.5, 2), make.act(*dy.shape), *(make.vec(k) for _ in range(3))]
        affine = [make.vec(c, 0.5, 1.5), make.vec(c)]
        u = x.double() * affine[0].view(1, -1, 1, 1) + affine[1].view(1, -1, 1, 1)
        x = make.exact(torch.where(u.abs() < AWAY, x + torch.where(u < 0, -3, 3) * AWAY, x))
        spread = [make.vec(c), make.vec(c, 0.5, 2)]
        kept = reference.bn_act(x, *affine, None, None, None, True, False)[0] if act else None
        skip = [make.act(*x.shape), make.mask(x)] if residual else [None, None]
        return [
            dy, _widened(w, wide_filters), x, make.mask(dy) if relu else None,
            *(through if norm else [None] * 5), *(affine if prologue else [None] * 2),
            *(spread if prologue and sums else [None] * 2), kept, *skip, *shape.args(), *need,
        ]  # fmt: skip

    return build


def _conv_bn_act(
    geometry: str, norm: bool = True, bias: bool = False, residual: bool = False, relu: bool = True
) -> Callable[[Inputs], Arguments]:
    def build(make: Inputs) -> Arguments:
        shape = GEOMETRIES[geometry]
        x, w, like = shape.tensors(make)
        k = w.size(0)
        params = [make.param(k), make.param(k, -1, 1), make.param(k, -1, 1), make.param(k)]
        return [
            x, w, make.param(k, -1, 1) if bias else None, *(params if norm else [None] * 4),
            like if residual else None, relu, 1e-5, *shape.args(),
        ]  # fmt: skip

    return build


def _widened(w: Tensor, wide: bool) -> Tensor:
    """fp32 filters beside 16-bit activations, as under autocast."""
    return w.float() if wide and w.dtype.itemsize == 2 else w


CASES: dict[str, dict[str, Callable[[Inputs], Arguments]]] = {
    "bn_stats": {
        **{size: _bn_stats(size) for size in SIZES},
        "mean 1000, std 1": _bn_stats("8x7x5", 1000.0),
    },
    "global_avg_pool": {size: _global_avg_pool(size) for size in SIZES},
    "bn_finalize": {"weight, bias": _bn_finalize(True), "neither": _bn_finalize(False)},
    "bn_bwd_finalize": {"24 channels": _bn_bwd_finalize},
    "bn_act": {
        **{f"relu, {size}": _bn_act(size) for size in SIZES},
        "residual": _bn_act("8x7x5", residual=True),
        "normalized residual": _bn_act("24x7x7 N=1", dual=True),
        "no relu": _bn_act("8x7x5", residual=True, relu=False),
        "no mask": _bn_act("3x9x7", dual=True, mask=False),
    },
    "add_relu": {
        **{size: _add_relu(size) for size in SIZES},
        "no mask": _add_relu("8x7x5", mask=False),
    },
    "add_relu_bwd": {size: _add_relu_bwd(size) for size in SIZES},
    "bn_act_bwd_reduce": {
        **{f"relu, {size}": _bn_act_bwd_reduce(size) for size in SIZES},
        "normalized residual": _bn_act_bwd_reduce("24x7x7 N=1", dual=True),
        "no relu": _bn_act_bwd_reduce("8x7x5", relu=False),
    },
    "bn_act_bwd_apply": {
        **{f"relu, {size}": _bn_act_bwd_apply(size) for size in SIZES},
        "residual": _bn_act_bwd_apply("8x7x5", relu=False, residual=True),
        "frozen": _bn_act_bwd_apply("24x7x7 N=1", batch=False, residual=True),
        "no norm": _bn_act_bwd_apply("3x9x7", norm=False, residual=True),
    },
    "bn_relu_max_pool": {
        **{f"3x3 stride 2, {size}": _bn_relu_max_pool(size, "3x3 stride 2") for size in SIZES},
        "2x3, no norm": _bn_relu_max_pool("8x7x5", "2x3", norm=False),
    },
    "max_pool_bwd": {
        **{f"3x3 stride 2, {size}": _max_pool_bwd(size, "3x3 stride 2") for size in SIZES},
        "2x3, no sums": _max_pool_bwd("8x7x5", "2x3", sums=False),
    },
    "conv_fprop": {
        **{f"{g}, prologue, stats": _conv_fprop(g, True, True) for g in GEOMETRIES},
        "3x3": _conv_fprop("3x3", False, False),
        "1x1, stats, fp32 filters": _conv_fprop("1x1", False, True, wide_filters=True),
    },
    "conv_bprop": {
        **{f"{g}, norm, prologue, sums": _conv_bprop(g) for g in GEOMETRIES},
        "3x3": _conv_bprop("3x3", norm=False, prologue=False),
        "1x1, relu, residual": _conv_bprop("1x1", relu=True, residual=True),
        "3x3, kept activation": _conv_bprop("3x3", act=True),
        "1x1, prologue alone": _conv_bprop("1x1", norm=False, sums=False, wide_filters=True),
        "7x7, dw alone": _conv_bprop("7x7 stride 2", prologue=False, need=(False, True)),
        "1x1 stride 2, dx alone": _conv_bprop("1x1 stride 2", need=(True, False)),
    },
    "conv_bn_act": {
        **{g: _conv_bn_act(g) for g in GEOMETRIES},
        "3x3, residual": _conv_bn_act("3x3", residual=True),
        "1x1, bias, no relu": _conv_bn_act("1x1", bias=True, relu=False),
        "3x3, no norm": _conv_bn_act("3x3", norm=False, residual=True),
    },
}
"""Builders of each op's arguments by op and case; the first case is the one `--quick` runs."""
