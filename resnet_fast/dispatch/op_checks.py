"""Checks of the arguments of every op, before a Triton kernel reads raw pointers.

A kernel takes sizes and memory order from one activation. It would read an argument of another
size, dtype, device or memory order out of bounds, or as another type.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.chain import Conv, Pool
from ..spec.dtypes import stats_dtype
from ..spec.layout import call_format, is_channels_last, mask_shape, memory_format

# Kinds of arguments: X activations like the input; Y like the output; Y_STRIDED the same with any
# strides; W filters; BITS the ReLU mask of another argument, one bit per value; C and K vectors in
# the dtype of statistics, one value per input or output channel; PARAMETER one value per output
# channel, of any dtype; Y_BYTES one byte per output value; NORMS a list of five parameters or None
# per norm, of one size; SOURCE activations whose 1x1 convolution has the output's shape; NC values
# in the dtype of statistics, one per image and channel. Output: of the convolution or pool.
X, Y, Y_STRIDED, W, BITS, C, K, PARAMETER, Y_BYTES, NORMS, SOURCE, NC = range(12)

_NORM = dict.fromkeys(("bias", "bn_weight", "bn_bias", "running_mean", "running_var"), PARAMETER)
ARGUMENTS = {
    "bn_stats": {"x": X},
    "global_avg_pool": {"x": X},
    "bn_relu_max_pool": {"z": X, "scale": C, "shift": C},
    "max_pool_bwd": {"dy": Y, "index": Y_BYTES, "x": X, "mean": C, "rstd": C},
    "bn_finalize": {"mean": C, "m2": C, "weight": PARAMETER, "bias": PARAMETER},
    "bn_fold": {"x": X, "vectors": NORMS},
    "bn_bwd_finalize": {"sum_dy": C, "sum_dy_xhat": C, "scale": C, "rstd": C},
    "bn_act": {"z": X, "scale": C, "shift": C, "residual": X, "res_scale": C, "res_shift": C},
    "add_relu": {"x": X, "residual": X},
    "add_relu_bwd": {"dy": X, "mask": BITS},
    "bn_act_bwd_reduce": {
        "dy": X, "mask": BITS, "z": X, "mean": C, "rstd": C, "scale": C,
        "residual": X, "res_mean": C, "res_rstd": C, "res_scale": C,
    },
    "bn_act_bwd_apply": {
        "dy": X, "mask": BITS, "a": C, "z": X, "mean": C, "b": C, "c": C, "residual": X,
    },
    "image_stats": {"x": X},
    "gated_act": {"z": X, "scale": NC, "shift": NC, "residual": X},
    "gated_act_bwd_reduce": {"dy": X, "mask": BITS, "z": X, "mean": NC},
    "gated_act_bwd_apply": {"dy": X, "scale": NC, "shift": NC, "z": X, "mean": NC, "b": NC},
    "conv_fprop": {
        "x": X, "w": W, "in_scale": C, "in_shift": C, "weight": PARAMETER, "bias": PARAMETER,
        "residual": Y_STRIDED,
    },
    "conv_bprop": {
        "dy": Y, "w": W, "x": X, "dy_mask": BITS, "a": K, "z": Y, "mean": K, "b": K, "c": K,
        "in_scale": C, "in_shift": C, "in_mean": C, "in_rstd": C,
        "in_act": X, "residual": X, "residual_mask": BITS,
    },
    "conv_bn_act": {"x": X, "w": W, **_NORM, "residual": Y_STRIDED},
    "conv_add_projection": {
        "x": X, "w": W, "scale": K, "shift": K,
        "source": SOURCE, "source_w": W, "source_scale": K, "source_shift": K,
    },
}  # fmt: skip
MASK_OF = {"mask": "dy", "dy_mask": "dy", "residual_mask": "residual"}
TOGETHER = (  # all of them or none
    ("in_scale", "in_shift"), ("in_mean", "in_rstd"), ("res_scale", "res_shift"),
    ("scale", "shift"), ("mean", "rstd"), ("running_mean", "running_var"),
    ("source_scale", "source_shift"),
    ("z", "mean", "b"), ("z", "mean", "b", "c"), ("residual", "res_mean", "res_rstd", "res_scale"),
)  # fmt: skip
NEEDS = {  # argument → the argument that it requires
    "res_scale": "residual", "in_mean": "in_scale", "in_act": "in_scale",
    "residual_mask": "residual",
}  # fmt: skip


class _Expected(NamedTuple):
    """Expected properties of arguments: the reference activation x, formats and shapes by kind."""

    name: str
    x: Tensor
    formats: dict[int, torch.memory_format]
    shapes: dict[int, Any]

    def check(self, name: str, t: Tensor, kind: int, masked: Tensor | None) -> None:
        """Raise ValueError if the argument `name` is not as expected for its kind."""
        if t.device != self.x.device:
            _wrong(name, "device", f"{self.x.device} as {self.name}", t.device)
        if kind == W:
            wider = t.dtype == torch.float32 and self.x.element_size() == 2
            if t.dtype != self.x.dtype and not wider:
                _wrong(name, "dtype", f"{self.x.dtype} (or float32 beside 16 bits)", t.dtype)
            return
        shape = mask_shape(masked) if kind == BITS else self.shapes[kind]
        if t.shape != shape:
            _wrong(name, "shape", tuple(shape), tuple(t.shape))
        if kind == PARAMETER:
            if not t.is_floating_point():
                _wrong(name, "dtype", "floating point", t.dtype)
        else:
            dtype = self._dtype(kind)
            if t.dtype != dtype:
                _wrong(name, "dtype", dtype, t.dtype)
        fmt = self.formats.get(kind, torch.contiguous_format)
        if kind != Y_STRIDED and not t.is_contiguous(memory_format=fmt):
            _wrong(name, "memory", fmt, f"strides {t.stride()}")

    def check_norms(self, name: str, vectors: Sequence[Tensor | None], norms: int) -> None:
        """Raise ValueError unless `vectors` has five vectors of one size or None for each norm."""
        if len(vectors) != 5 * norms:
            _wrong(name, "length", f"{5 * norms}, five per entry of eps", len(vectors))
        for i in range(norms):
            own = {f"{name}[{j}]": vectors[j] for j in range(5 * i, 5 * i + 5)}
            there = {at: t for at, t in own.items() if t is not None}
            if not there or (vectors[5 * i + 3] is None) != (vectors[5 * i + 4] is None):
                _wrong(name, "vectors", f"both or neither statistics of norm {i}", list(there))
            shapes = {PARAMETER: (max(t.numel() for t in there.values()),)}
            for at, t in there.items():
                self._replace(shapes=shapes).check(at, t, PARAMETER, None)

    def _dtype(self, kind: int) -> torch.dtype:
        if kind in (BITS, Y_BYTES):
            return torch.uint8
        return stats_dtype(self.x) if kind in (C, K, NC) else self.x.dtype


def _order(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _wrong(name: str, what: str, expected: Any, got: Any) -> None:
    said = f"{name}: expected {what} {expected}, got {got}"
    raise ValueError(said.replace("torch.", ""))


def _check_projection(source: Tensor, w: Tensor, stride: tuple[int, ...], output: Any) -> None:
    """Raise ValueError unless the 1x1 convolution of source has the shape `output`."""
    if source.dim() != 4:
        _wrong("source", "shape", "[N, C, H, W]", tuple(source.shape))
    if w.shape[2:] != (1, 1):
        _wrong("source_w", "shape", "[K, C, 1, 1]", tuple(w.shape))
    given = Conv(stride).output_shape(source.shape, w.shape, "source_w")
    if given != tuple(output):
        _wrong("source", "projection of shape", tuple(output), given)


def checked(run: Callable[..., Any]) -> Callable[..., Any]:
    """The op `run` with checks: ValueError names the op, the argument and what was expected."""
    op, names = run.__name__, list(inspect.signature(run).parameters)
    position = {name: i for i, name in enumerate(names)}
    kinds = [(position[name], name, kind) for name, kind in ARGUMENTS[op].items()]
    masked = {i: position[MASK_OF[name]] for i, name, kind in kinds if kind == BITS}
    first = names[position.get("x", 0)]
    groups = [group for group in TOGETHER if set(group) <= set(names)]
    needs = [(name, other) for name, other in NEEDS.items() if {name, other} <= set(names)]

    def check(args: tuple[Any, ...]) -> None:
        for group in groups:
            there = [name for name in group if args[position[name]] is not None]
            if there and len(there) < len(group):
                missing = next(name for name in group if name not in there)
                raise ValueError(f"{missing}: expected a tensor together with {there[0]}, got None")
        for name, other in needs:
            if args[position[name]] is not None and args[position[other]] is None:
                raise ValueError(f"{other}: expected a tensor together with {name}, got None")
        x = args[position[first]]
        formats = {}
        if ARGUMENTS[op][first] == C:
            shapes = {C: x.shape[:1], PARAMETER: x.shape[:1]}
        elif x.dim() != 4:
            _wrong(first, "shape", "[N, C, H, W]", tuple(x.shape))
        else:
            shapes = {X: x.shape, C: x.shape[1:2], NC: x.shape[:2]}
            formats[X] = _order(x)
        if "w" in names:
            w = args[position["w"]]
            at = position["stride"]
            conv = Conv(*(tuple(v) for v in args[at : at + 3]), args[at + 3])
            shapes[Y] = shapes[Y_STRIDED] = conv.output_shape(x.shape, w.shape, "w")
            shapes[K] = shapes[PARAMETER] = w.shape[:1]
            either = x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            formats[Y] = _order(args[0]) if either else formats[X]
        if "source" in names:
            source, stride = args[position["source"]], tuple(args[position["source_stride"]])
            shapes[SOURCE], formats[SOURCE] = source.shape, call_format(x, w)
            _check_projection(source, args[position["source_w"]], stride, shapes[Y])
        if "kernel" in names:
            at = position["kernel"]
            shapes[Y] = Pool(*(tuple(v) for v in args[at : at + 3])).output_shape(x.shape)
            shapes[Y_BYTES] = shapes[Y]
            formats[Y] = formats[Y_BYTES] = memory_format(x)
        expected = _Expected(first, x, formats, shapes)
        for i, name, kind in kinds:
            if kind == NORMS:
                expected.check_norms(name, args[i], len(args[position["eps"]]))
            elif args[i] is not None:
                expected.check(name, args[i], kind, args[masked[i]] if kind == BITS else None)

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        try:
            check(args)
        except ValueError as error:
            raise ValueError(f"{op}: {error}") from None
        return run(*args)

    return call
