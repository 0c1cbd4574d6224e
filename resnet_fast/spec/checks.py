"""Argument checks of the public functions; every message names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .chain import IMPLS, Chain, Conv, ConvParams, NormParams
from .dtypes import DTYPES
from .values import check_flag, check_number, given


def check_options(training: bool, momentum: float, relu: bool) -> None:
    """Check the types of a normalization's options."""
    check_flag(training, "training")
    check_number(momentum, "momentum")
    check_flag(relu, "relu")


def check_impl(impl: str) -> str:
    """Return `impl` if it is one of `spec.chain.IMPLS`, else raise ValueError."""
    if not isinstance(impl, str) or impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {given(impl)}")
    return impl


def check_keep(value: bool | str) -> bool | str:
    """Return `value` if it is valid for `Chain.keep_activations`, else raise ValueError."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f"keep_activations: expected True, False or 'auto', got {given(value)}")
    return value


def check_chain(
    chain: Chain,
    x: Tensor,
    convs: Sequence[ConvParams],
    norms: Sequence[NormParams],
    residual: Tensor | None,
) -> list[int]:
    """Check the tensors of a chain against each other; return M, the values per channel, per norm.

    Raises ValueError for a wrong shape, dtype, device, geometry, missing statistics, or batch
    statistics of one value per channel (`autograd.sync` checks this over several processes).
    """
    check_impl(chain.impl)
    check_activations(x)
    n = len(chain.convs)
    shapes = [tuple(x.shape)]
    for conv, params in zip(chain.convs, convs[:n], strict=True):
        shapes.append(_conv_shape(shapes[-1], conv, params, x))
    out = shapes[-1]
    if chain.projection is not None:
        shapes.append(_conv_shape(shapes[0], chain.projection, convs[n], x, "projection "))
        _match("projection", shapes[-1], out)
    else:
        shapes.append(out)
    if chain.shortcut == "identity":
        _match("x (the identity shortcut)", shapes[0], out)
    if (residual is not None) != (chain.shortcut == "residual"):
        wanted = "a tensor" if residual is None else "None"
        raise ValueError(f"residual: expected {wanted} with shortcut={chain.shortcut!r}")
    if residual is not None:
        _match("residual", tuple(residual.shape), out)
        _same_device("residual", residual, x)
    if chain.pool is not None:
        chain.pool.output_shape(out)
    counts = []
    for i, norm in enumerate(chain.all_norms):
        shape = shapes[i]
        counts.append(shape[0] * shape[2] * shape[3])
        if norm is None:
            continue
        _check_norm(norms[i], shape[1], x, needs_running=not norm.batch_stats)
        if norm.batch_stats and norm.group is None and counts[-1] == 1:
            raise ValueError(
                f"x: expected more than 1 value per channel when training, got input size {shape}"
            )
    return counts


def check_activations(x: Tensor) -> None:
    """Check that x is [N,C,H,W] in a dtype of the ops."""
    if x.is_nested or x.dim() != 4:
        shape = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
        raise ValueError(f"x: expected 4 dimensions [N, C, H, W], got {shape}")
    if x.dtype not in DTYPES:
        names = ", ".join(_name(d) for d in DTYPES)
        raise ValueError(f"x: expected one of {names}, got {_name(x.dtype)}")


def _conv_shape(
    shape: tuple[int, ...], conv: Conv, params: ConvParams, x: Tensor, where: str = ""
) -> tuple[int, ...]:
    w, name = params.weight, f"{where}weight"
    out = conv.output_shape(shape, w.shape, name)
    if w.dtype != x.dtype and not (w.dtype == torch.float32 and x.dtype.itemsize == 2):
        raise ValueError(f"{name}: expected x's dtype {_valid(x.dtype)}, got {_name(w.dtype)}")
    _same_device(name, w, x)
    if params.bias is not None:
        _vector(f"{where}bias", params.bias, w.size(0), x)
    return out


def _check_norm(params: NormParams, channels: int, x: Tensor, needs_running: bool) -> None:
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    for name, value in zip(names, params, strict=True):
        if value is not None:
            _vector(name, value, channels, x)
        elif needs_running and name.startswith("running"):
            raise ValueError(f"{name}: expected a tensor of {channels} values when not training")
    if (params.running_mean is None) != (params.running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither")


def _vector(name: str, value: Tensor, size: int, x: Tensor) -> None:
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},), got {tuple(value.shape)}")
    if value.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64) != (
        value.dtype == torch.float64
    ):
        raise ValueError(
            f"{name}: expected {_valid(x.dtype)} for x in {_name(x.dtype)}, "
            f"got {_name(value.dtype)}"
        )
    _same_device(name, value, x)


def _same_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {value.device}")


def _match(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"{name}: expected the output's shape {expected}, got {shape}")


def _valid(dtype: torch.dtype) -> str:
    """The dtypes of parameters for activations of `dtype`."""
    return _name(dtype) + (" or float32" if dtype.itemsize == 2 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
