"""Arguments for every op of `dispatch.ops`: by name, for any shape, dtype and layout.

`POINTWISE` and `CONVOLUTIONS` build the arguments of a variant. A variant is named "op" or
"op:special case". The tests use them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format
from ..spec.reference import bn_relu_max_pool, pack_mask

Arguments = list[Any]
EPS = 1e-5

SHAPES = {  # [N,C,H,W] of the ops without a convolution
    "7x7": (2, 24, 7, 7),
    "rgb": (3, 3, 9, 11),
    "one-channel": (2, 1, 5, 7),
    "one-image": (1, 8, 6, 6),
    "one-pixel": (5, 24, 1, 1),
    "one-value": (1, 1, 1, 1),
    "c17": (3, 17, 5, 3),
    "c531": (1, 531, 3, 2),  # more channels than the widest tile, 512
    "many-pixels": (2, 5, 67, 65),
    "vectors": (2, 72, 8, 8),
}


EMPTY = (0, 8, 5, 5)


@dataclass(frozen=True)
class Conv:
    """One convolution: input shape, number of filters, kernel size, and geometry as in the ops."""

    shape: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> list[Any]:
        return [list(self.stride), list(self.padding), list(self.dilation), self.groups]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.filters, self.shape[1] // self.groups, *self.kernel)

    @property
    def out_shape(self) -> tuple[int, ...]:
        weight = torch.empty(self.weight_shape, device="meta")
        x = torch.empty(self.shape, device="meta")
        return tuple(torch.conv2d(x, weight, None, *self.geometry).shape)


CONVS = {
    "1x1": Conv((2, 8, 7, 7), 24, (1, 1)),
    "1x1-stride2": Conv((2, 16, 7, 9), 24, (1, 1), (2, 2)),
    "3x3": Conv((2, 8, 7, 7), 24, (3, 3), padding=(1, 1)),
    "3x3-stride2": Conv((3, 5, 9, 6), 7, (3, 3), (2, 2), (1, 1)),
    "stem": Conv((2, 3, 17, 19), 24, (7, 7), (2, 2), (3, 3)),
    "grouped": Conv((2, 8, 7, 7), 12, (3, 3), padding=(1, 1), groups=4),
    "depthwise": Conv((2, 6, 7, 5), 6, (3, 3), padding=(1, 1), groups=6),
    "dilated": Conv((2, 4, 9, 9), 8, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "rectangle": Conv((2, 4, 6, 9), 8, (1, 3), (1, 2), (0, 1)),
    "one-channel": Conv((2, 1, 7, 7), 24, (3, 3), padding=(1, 1)),
    "three-filters": Conv((2, 8, 5, 5), 3, (1, 1)),
    "one-pixel": Conv((4, 24, 1, 1), 17, (1, 1)),
    "one-image": Conv((1, 8, 5, 5), 16, (3, 3), padding=(1, 1)),
    "c259": Conv((2, 259, 3, 3), 5, (1, 1)),
}
EMPTY_CONV = Conv((0, 8, 5, 5), 16, (3, 3), padding=(1, 1))


@dataclass(frozen=True)
class Draw:
    """Random arguments of one dtype, layout and device.

    Values are drawn in fp32 on the CPU, from `generator` or PyTorch's default generator. So fp64
    values are exact in fp32.
    """

    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    device: str = "cpu"
    generator: torch.Generator | None = None

    @property
    def vector_dtype(self) -> torch.dtype:
        return stats_dtype(torch.empty(0, dtype=self.dtype))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def activations(self, shape: Sequence[int], mean: float = 0.5) -> Tensor:
        """Values of `self.dtype`, dense in `self.layout`; the mean keeps sums away from 0."""
        x = (self.normal(*shape) + mean).to(self.dtype)
        return x.contiguous(memory_format=self.layout).to(self.device)

    def filters(self, conv: Conv, dtype: torch.dtype | None = None) -> Tensor:
        """Filters in `dtype` if activations have 16 bits, else in the dtype of the activations."""
        fan_in = conv.weight_shape[1] * conv.kernel[0] * conv.kernel[1]
        dtype = dtype if dtype is not None and self.dtype.itemsize == 2 else self.dtype
        w = (self.normal(*conv.weight_shape) / fan_in**0.5).to(dtype)
        return w.contiguous(memory_format=self.layout).to(self.device)

    def vector(self, size: int) -> Tensor:
        """One value per channel, in the dtype of statistics."""
        return self.normal(size).to(self.vector_dtype).to(self.device)

    def matrix(self, shape: Sequence[int]) -> Tensor:
        """One value per image and channel of [N,C,H,W], in the dtype of statistics."""
        return self.normal(*shape[:2]).to(self.vector_dtype).to(self.device)

    def positive(self, size: int, times: float = 1) -> Tensor:
        """Channel values of at least `times`/2, in the dtype of statistics."""
        values = (self.normal(size).abs() + 0.5) * times
        return values.to(self.vector_dtype).to(self.device)

    def mask(self, like: Tensor) -> Tensor:
        """A random ReLU bit mask for activations `like`."""
        bits = (self.normal(*like.shape) > -0.3).to(like.device)
        return pack_mask(bits.contiguous(memory_format=self.layout))


def _bn_act(affine, residual, relu, save_mask):
    def make(draw, shape):
        c = shape[1]
        z, res = draw.activations(shape), draw.activations(shape) if residual else None
        through = [draw.vector(c), draw.vector(c)] if residual == "dual" else [None, None]
        return [z, draw.vector(c), draw.vector(c), res, *through, relu, save_mask]

    def add(draw, shape):
        return [draw.activations(shape), draw.activations(shape), save_mask]

    return make if affine else add


def _finalize(affine):
    def make(draw, shape):
        n, c, h, w = shape
        vectors = [draw.vector(c), draw.vector(c)] if affine else [None, None]
        count = n * h * w
        return [draw.vector(c), draw.positive(c, count), count, *vectors, EPS]

    return make


def _fold(draw, shape):
    """Norms of two widths: with all vectors, with bias and statistics, folded, and a bias alone."""
    norms = []
    for size, there in ((shape[1], "11111"), (2 * shape[1], "10011"), (8, "01100"), (5, "10000")):
        own = [draw.vector(size) for _ in range(4)] + [draw.positive(size)]
        norms += [v if given == "1" else None for v, given in zip(own, there, strict=True)]
    return [draw.activations(shape), norms, [EPS, 2 * EPS, 0.0, 0.0]]


def _bwd_finalize(draw, shape):
    n, c, h, w = shape
    return [draw.vector(c), draw.vector(c), draw.vector(c), draw.positive(c), n * h * w]


def _add_relu_bwd(draw, shape):
    dy = draw.activations(shape)
    return [dy, draw.mask(dy)]


def _bwd_reduce(masked, dual):
    def make(draw, shape):
        c = shape[1]
        dy, z = draw.activations(shape), draw.activations(shape)
        args = [dy, draw.mask(dy) if masked else None, z]
        norm = [draw.vector(c), draw.positive(c), draw.vector(c)]
        other = [draw.activations(shape), draw.vector(c), draw.positive(c), draw.vector(c)]
        return args + norm + (other if dual else [None] * 4)

    return make


def _bwd_apply(masked, a, batch, residual):
    def make(draw, shape):
        c = shape[1]
        dy = draw.activations(shape)
        z = [draw.activations(shape), draw.vector(c)] if batch else [None, None]
        bc = [draw.vector(c), draw.vector(c)] if batch else [None, None]
        res = draw.activations(shape) if residual else None
        mask = draw.mask(dy) if masked else None
        return [dy, mask, draw.vector(c) if a else None, *z, *bc, res]

    return make


def _gated_act(residual, relu, save_mask=True):
    def make(draw, shape):
        z, res = draw.activations(shape), draw.activations(shape) if residual else None
        return [z, draw.matrix(shape), draw.matrix(shape), res, relu, save_mask]

    return make


def _gated_bwd_reduce(masked):
    def make(draw, shape):
        dy, z = draw.activations(shape), draw.activations(shape)
        return [dy, draw.mask(dy) if masked else None, z, draw.matrix(shape)]

    return make


def _gated_bwd_apply(batch):
    def make(draw, shape):
        vectors = [draw.matrix(shape), draw.matrix(shape)]
        through = [draw.activations(shape), draw.matrix(shape), draw.matrix(shape)]
        return [draw.activations(shape), *vectors, *(through if batch else [None] * 3)]

    return make


def _pool(affine, kernel, stride, padding, save_index=True):
    def make(draw, shape):
        vectors = [draw.vector(shape[1]), draw.vector(shape[1])] if affine else [None, None]
        windows = [list(kernel), list(stride), list(padding)]
        return [draw.activations(shape), *vectors, *windows, save_index]

    return make


def _pool_bwd(sums, *windows):
    forward = _pool(False, *windows)

    def make(draw, shape):
        x, _, _, *rest = forward(draw, shape)
        y, index = bn_relu_max_pool(x, None, None, *rest)
        vectors = [draw.vector(shape[1]), draw.positive(shape[1])] if sums else [None, None]
        dy = draw.activations(y.shape).contiguous(memory_format=memory_format(y))
        return [dy, index, x, *vectors, *rest[:3]]

    return make


STEM = (3, 3), (2, 2), (1, 1)
HALVES = (2, 2), (2, 2), (1, 1)
OBLONG = (5, 4), (3, 2), (2, 2)
POINTWISE = {  # variant → arguments for (Draw, [N,C,H,W]); the op is the part before ":"
    "bn_stats": lambda draw, shape: [draw.activations(shape)],
    "bn_stats:far": lambda draw, shape: [draw.activations(shape, mean=1000.0)],
    "image_stats": lambda draw, shape: [draw.activations(shape)],
    "image_stats:far": lambda draw, shape: [draw.activations(shape, mean=1000.0)],
    "gated_act": _gated_act(residual=True, relu=True),
    "gated_act:alone": _gated_act(residual=False, relu=True),
    "gated_act:linear": _gated_act(residual=True, relu=False),
    "gated_act:no-mask": _gated_act(residual=False, relu=True, save_mask=False),
    "gated_act_bwd_reduce": _gated_bwd_reduce(masked=True),
    "gated_act_bwd_reduce:linear": _gated_bwd_reduce(masked=False),
    "gated_act_bwd_apply": _gated_bwd_apply(batch=True),
    "gated_act_bwd_apply:frozen": _gated_bwd_apply(batch=False),
    "bn_relu_max_pool": _pool(True, *STEM),
    "bn_relu_max_pool:no-norm": _pool(False, *HALVES),
    "bn_relu_max_pool:no-index": _pool(True, *OBLONG, save_index=False),
    "bn_relu_max_pool:oblong": _pool(True, *OBLONG),
    "max_pool_bwd": _pool_bwd(True, *STEM),
    "max_pool_bwd:no-sums": _pool_bwd(False, *HALVES),
    "max_pool_bwd:oblong": _pool_bwd(True, *OBLONG),
    "global_avg_pool": lambda draw, shape: [draw.activations(shape)],
    "bn_finalize": _finalize(affine=True),
    "bn_finalize:no-affine": _finalize(affine=False),
    "bn_fold": _fold,
    "bn_bwd_finalize": _bwd_finalize,
    "bn_act": _bn_act(True, None, True, True),
    "bn_act:linear": _bn_act(True, None, False, False),
    "bn_act:linear-residual": _bn_act(True, "plain", False, True),
    "bn_act:no-mask": _bn_act(True, None, True, False),
    "bn_act:residual": _bn_act(True, "plain", True, True),
    "bn_act:dual": _bn_act(True, "dual", True, True),
    "add_relu": _bn_act(False, "plain", True, True),
    "add_relu:no-mask": _bn_act(False, "plain", True, False),
    "add_relu_bwd": _add_relu_bwd,
    "bn_act_bwd_reduce": _bwd_reduce(masked=True, dual=False),
    "bn_act_bwd_reduce:linear": _bwd_reduce(masked=False, dual=False),
    "bn_act_bwd_reduce:dual": _bwd_reduce(masked=True, dual=True),
    "bn_act_bwd_reduce:linear-dual": _bwd_reduce(masked=False, dual=True),
    "bn_act_bwd_apply": _bwd_apply(masked=True, a=True, batch=True, residual=False),
    "bn_act_bwd_apply:linear": _bwd_apply(masked=False, a=True, batch=True, residual=False),
    "bn_act_bwd_apply:residual": _bwd_apply(masked=True, a=True, batch=True, residual=True),
    "bn_act_bwd_apply:frozen": _bwd_apply(masked=True, a=True, batch=False, residual=False),
    "bn_act_bwd_apply:frozen-residual": _bwd_apply(True, True, False, True),
    "bn_act_bwd_apply:add": _bwd_apply(masked=True, a=False, batch=False, residual=True),
}


def _fprop(prologue, stats, filters=None, bias=False, residual=False, relu=False):
    def make(draw, conv):
        c = conv.shape[1]
        affine = [draw.vector(c), draw.vector(c)] if prologue else [None, None]
        x = draw.activations(conv.shape)
        vectors = [draw.vector(conv.filters), draw.vector(conv.filters)]
        norm = vectors if prologue and stats else [None, vectors[1] if bias else None]
        beside = draw.activations(conv.out_shape) if residual else None
        more = beside, relu, *conv.geometry
        return [x, draw.filters(conv, filters), *affine, stats, *norm, EPS, *more]

    return make


def _bprop(
    masked=True, batch=True, prologue=True, sums=True, kept=False, more=None, need=(1, 1),
    wide=False,
):  # fmt: skip
    """conv_bprop: mask and BN backward before it, the prologue's BN and a residual after it.

    The channels of that BN differ little: b is Σdx·xhat times scale·rstd, and the tolerance rule
    compares the errors of all channels.
    """

    def make(draw, conv):
        c, k = conv.shape[1], conv.filters
        dy, x = draw.activations(conv.out_shape), draw.activations(conv.shape)
        dz = [None] * 5
        if batch:
            z, vectors = draw.activations(conv.out_shape), [draw.vector(k) for _ in range(4)]
            dz = [vectors[0], z, *vectors[1:]]
        scale = draw.vector(c).sign() * draw.positive(c)
        affine = [scale, draw.vector(c)] if prologue else [None, None]
        inner = [draw.vector(c), 1 + draw.vector(c) / 8] if sums else [None, None]
        act = draw.activations(conv.shape).relu() if kept else None
        residual = draw.activations(conv.shape) if more else None
        residual_mask = draw.mask(residual) if more == "masked" else None
        mask = draw.mask(dy) if masked else None
        return [
            dy, draw.filters(conv), x, mask, *dz, *affine, *inner, act, residual, residual_mask,
            *conv.geometry, bool(need[0]), bool(need[1]), wide,
        ]  # fmt: skip

    return make


def _infer(bias=False, norm=True, affine=True, residual=False, relu=True, filters=None, kept=()):
    """conv_bn_act; norm: True, "folded" (no statistics) or None; `kept`: the dtypes of bias,
    bn_weight, bn_bias and the running statistics.
    """

    def make(draw, conv):
        k = conv.filters
        vectors = [draw.vector(k), draw.vector(k)] if norm and affine else [None, None]
        running = [draw.vector(k), draw.positive(k)] if norm is True else [None, None]
        vectors = [draw.vector(k) if bias else None, *vectors, *running]
        if kept:
            vectors = [v.to(dtype) for v, dtype in zip(vectors, kept, strict=True)]
        return [
            draw.activations(conv.shape), draw.filters(conv, filters), *vectors,
            draw.activations(conv.out_shape) if residual else None, relu, EPS, *conv.geometry,
        ]  # fmt: skip

    return make


def projection(stride=1, odd=False, norm=True, relu=True, channels=16, filters=None):
    """conv_add_projection; odd: the source has the least size that gives y's, else a multiple."""

    def make(draw, conv):
        n, k, p, q = conv.out_shape
        vectors = [draw.vector(k) for _ in range(4)] if norm else [None] * 4
        sizes = [(size - 1) * stride + 1 if odd else size * stride for size in (p, q)]
        own = Conv((n, channels, *sizes), k, (1, 1))
        return [
            draw.activations(conv.shape), draw.filters(conv, filters), *vectors[:2],
            draw.activations(own.shape), draw.filters(own, filters), *vectors[2:], relu,
            *conv.geometry, [stride, stride],
        ]  # fmt: skip

    return make


CONVOLUTIONS = {  # variant → arguments for (Draw, Conv)
    "conv_fprop": _fprop(prologue=False, stats=False),
    "conv_fprop:stats": _fprop(prologue=False, stats=True),
    "conv_fprop:prologue": _fprop(prologue=True, stats=True),
    "conv_fprop:fp32-filters": _fprop(True, True, torch.float32),
    "conv_fprop:bias-relu": _fprop(prologue=False, stats=False, bias=True, relu=True),
    "conv_fprop:bias-residual": _fprop(prologue=False, stats=False, bias=True, residual=True),
    "conv_fprop:prologue-residual": _fprop(prologue=True, stats=False, residual=True),
    "conv_fprop:all-but-stats": _fprop(True, False, torch.float32, True, True, True),
    "conv_bprop": _bprop(),
    "conv_bprop:bare": _bprop(masked=False, batch=False, prologue=False, sums=False),
    "conv_bprop:no-prologue": _bprop(prologue=False, sums=False),
    "conv_bprop:frozen-input": _bprop(masked=False, sums=False),
    "conv_bprop:wide": _bprop(wide=True),
    "conv_bprop:kept": _bprop(masked=False, kept=True),
    "conv_bprop:residual": _bprop(prologue=False, sums=False, more="plain"),
    "conv_bprop:residual-masked": _bprop(more="masked"),
    "conv_bprop:only-dx": _bprop(need=(1, 0)),
    "conv_bprop:only-dw": _bprop(sums=False, need=(0, 1)),
    "conv_bn_act": _infer(),
    "conv_bn_act:bias-residual": _infer(bias=True, residual=True),
    "conv_bn_act:linear": _infer(relu=False, affine=False),
    "conv_bn_act:folded": _infer(norm="folded", residual=True),
    "conv_bn_act:folded-bias": _infer(norm="folded", bias=True),
    "conv_bn_act:no-norm": _infer(norm=None, bias=True),
    "conv_bn_act:bare": _infer(norm=None, relu=False),
    "conv_bn_act:half-vectors": _infer(bias=True, kept=[torch.float16] * 5),
    "conv_bn_act:mixed-vectors": _infer(
        bias=True,
        kept=[torch.float32, torch.float16, torch.float64, torch.float32, torch.float16],
    ),
    "conv_bn_act:fp32-filters": _infer(residual=True, filters=torch.float32),
    "conv_add_projection": projection(),
    "conv_add_projection:stride2": projection(stride=2, channels=64),
    "conv_add_projection:odd": projection(stride=2, odd=True, relu=False),
    "conv_add_projection:bare": projection(norm=False, channels=3),
    "conv_add_projection:fp32-filters": projection(filters=torch.float32),
}


def op_of(variant: str) -> str:
    """The op of a variant."""
    return variant.partition(":")[0]


def cast(args: Arguments, dtype: torch.dtype = torch.float64) -> Arguments:
    """The arguments with every floating-point tensor in `dtype`, in the same memory format."""
    wide = [cast(a, dtype) if isinstance(a, list) else a for a in args]
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in wide]


VERIFIED = ("7x7", "rgb", "one-image")  # SHAPES and CONVS of `resnet-fast verify`
VERIFIED_CONVS = ("3x3", "1x1", "1x1-stride2", "stem", "grouped", "dilated")


def cases_of(op: str) -> Iterator[tuple[str, str]]:
    """(variant, name of the shape) for `resnet-fast verify`: the op itself with every shape, each
    other variant with one shape. `--quick` takes only the first case.
    """
    for variants, names in ((POINTWISE, VERIFIED), (CONVOLUTIONS, VERIFIED_CONVS)):
        own = [variant for variant in variants if op_of(variant) == op]
        for i, variant in enumerate(own):
            for name in names if i == 0 else names[i % len(names) :][:1]:
                yield variant, name


def build(variant: str, shape: str, draw: Draw) -> Arguments:
    """Arguments of a variant at one of SHAPES or CONVS."""
    if variant in POINTWISE:
        return POINTWISE[variant](draw, SHAPES[shape])
    return CONVOLUTIONS[variant](draw, CONVS[shape])
