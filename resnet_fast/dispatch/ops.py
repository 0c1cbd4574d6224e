"""The contract: schema, fake kernel and dispatch of every op, in one place.

`torch.ops.resnet_fast.NAME(..., impl)` is what `torch.compile`, `torch.export` and `opcheck` see.
`spec.reference.NAME` defines the result of each op; `dispatch.backends` picks the implementation.
Activations are dense 4-D tensors in NCHW or channels_last (`spec.layout`). Filters may be wider
than the activations (fp32 filters with bf16 activations). Channel vectors are fp32 (fp64 for fp64
activations). Ops are functional: they return new tensors and update nothing in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime import trace
from ..spec.chain import Conv, Pool
from ..spec.dtypes import stats_dtype
from ..spec.layout import call_format, mask_shape, memory_format
from . import auto_impl, backends
from .guard import function_modes

LIBRARY = torch.library.Library("resnet_fast", "DEF")
NAMES: list[str] = []
IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}  # operator → function that runs it
# index of geometry
CONVOLUTIONS = {"conv_fprop": 10, "conv_bprop": 16, "conv_bn_act": 10, "conv_add_projection": 9}
# index of the residual or its source, counted after x
RESIDUALS = {"conv_fprop": 7, "conv_bn_act": 6, "conv_add_projection": 3}
_WINDOWS = "int[2] kernel, int[2] stride, int[2] padding"
_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"


def _op(signature: str, returns: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a fake kernel: define the op `signature` and return a function that calls it."""
    name = signature.partition("(")[0]

    def define(fake: Callable[..., Any]) -> Callable[..., Any]:
        schema = f"{signature[:-1]}, str impl) -> {returns}"
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

        def run(x: Tensor, *args: Any) -> Any:
            *args, impl = args
            if name in RESIDUALS:
                x = _in_format(x, args, RESIDUALS[name])
            choice = backends.resolve(name, impl, x, args)
            if trace.on():
                return _traced(name, choice, (x, *args))
            return choice.run(x, *args)

        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"resnet_fast::{name}", fake, lib=LIBRARY)
        NAMES.append(name)
        op = getattr(torch.ops.resnet_fast, name).default
        IMPLEMENTATIONS[op] = run

        @functools.wraps(fake)
        def call(x: Tensor, *args: Any) -> Any:
            alone = type(x) is Tensor and not torch.is_grad_enabled() and not watched()
            return (run if alone else op)(x, *args)

        call.__doc__ = f"resnet_fast::{schema}"
        return call

    return define


def _in_format(x: Tensor, args: list[Any], residual: int | None) -> Tensor:
    """Convert x (returned) and args[residual] to the format of x or the filters args[0].

    A compiled graph relies on the output's strides, which it knows from its example: with
    channels_last filters they must not depend on the format of x.
    """
    beside = None if residual is None else args[residual]
    if any(t is not None and t.dim() != 4 for t in (x, args[0], beside)):
        return x  # the op's checks name it
    fmt = call_format(x, args[0])
    if beside is not None:
        args[residual] = beside.contiguous(memory_format=fmt)
    return x.contiguous(memory_format=fmt)


def _traced(name: str, choice: backends.Choice, args: tuple[Any, ...]) -> Any:
    """choice.run(*args), with a line in the trace."""
    tensors = auto_impl.signature([t for t in args if isinstance(t, Tensor) and t.dim() > 1])
    with trace.op(f"{name} {tensors}: {choice.impl} ({choice.why})"):
        if choice.impl == "native" and name in CONVOLUTIONS:
            at = CONVOLUTIONS[name]
            route = backends.native_ops().conv_route
            trace.note(*route(args[0], args[1], *args[at : at + 4], name))
        return choice.run(*args)


def watched() -> bool:
    """Whether ops must go through PyTorch's dispatcher: if `traced`, or under a profiler.

    Otherwise a call without gradients goes directly to its implementation, because the dispatcher
    takes more host time than most kernel launches.
    """
    return traced() or torch.autograd._profiler_enabled()


def traced() -> bool:
    """True under compile, tracing, a function or dispatch mode, or a transform of torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or function_modes()
        or torch._C._are_functorch_transforms_active()
    )


def _vector(x: Tensor, size: Any) -> Tensor:
    return x.new_empty(size, dtype=stats_dtype(x))


def _like(x: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=memory_format(x))
    return y, x.new_empty(mask_shape(x) if save_mask else 0, dtype=torch.uint8)


def _conv_output(x: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    conv = Conv(stride, padding, dilation)
    size = [conv.output_size(x.size(2 + i), w.size(2 + i), i) for i in (0, 1)]
    size, fmt = (x.size(0), w.size(0), *size), call_format(x, w)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=fmt)


@_op("bn_stats(Tensor x)", "(Tensor mean, Tensor m2)")
def bn_stats(x, impl):
    return _vector(x, x.size(1)), _vector(x, x.size(1))


@_op(
    "bn_finalize(Tensor mean, Tensor m2, SymInt count, Tensor? weight, Tensor? bias, float eps)",
    "(Tensor scale, Tensor shift, Tensor rstd)",
)
def bn_finalize(mean, m2, count, weight, bias, eps, impl):
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


@_op("bn_fold(Tensor x, Tensor?[] vectors, float[] eps)", "Tensor[]")
def bn_fold(x, vectors, eps, impl):
    norms = [vectors[5 * i : 5 * i + 5] for i in range(len(eps))]
    sizes = [next(t.size(0) for t in norm if t is not None) for norm in norms]
    return [_vector(x, size) for size in sizes for _ in range(2)]


@_op(
    "bn_bwd_finalize(Tensor sum_dy, Tensor sum_dy_xhat, Tensor scale, Tensor rstd, SymInt count)",
    "(Tensor b, Tensor c)",
)
def bn_bwd_finalize(sum_dy, sum_dy_xhat, scale, rstd, count, impl):
    return torch.empty_like(sum_dy), torch.empty_like(sum_dy)


@_op(
    "bn_act(Tensor z, Tensor scale, Tensor shift, Tensor? residual, Tensor? res_scale, "
    "Tensor? res_shift, bool relu, bool save_mask)",
    "(Tensor y, Tensor mask)",
)
def bn_act(z, scale, shift, residual, res_scale, res_shift, relu, save_mask, impl):
    return _like(z, relu and save_mask)


@_op("add_relu(Tensor x, Tensor residual, bool save_mask)", "(Tensor y, Tensor mask)")
def add_relu(x, residual, save_mask, impl):
    return _like(x, save_mask)


@_op("add_relu_bwd(Tensor dy, Tensor mask)", "Tensor")
def add_relu_bwd(dy, mask, impl):
    return _like(dy, False)[0]


@_op(
    "bn_act_bwd_reduce(Tensor dy, Tensor? mask, Tensor z, Tensor mean, Tensor rstd, Tensor scale, "
    "Tensor? residual, Tensor? res_mean, Tensor? res_rstd, Tensor? res_scale)",
    "(Tensor sum_dy, Tensor sum_dy_xhat, Tensor b, Tensor c, Tensor sum_dy_res_xhat, Tensor res_b, "
    "Tensor res_c)",
)
def bn_act_bwd_reduce(
    dy, mask, z, mean, rstd, scale, residual, res_mean, res_rstd, res_scale, impl
):  # fmt: skip
    own = [torch.empty_like(mean) for _ in range(4)]
    size = 0 if residual is None else mean.size(0)
    return *own, *(_vector(dy, size) for _ in range(3))


@_op(
    "bn_act_bwd_apply(Tensor dy, Tensor? mask, Tensor? a, Tensor? z, Tensor? mean, Tensor? b, "
    "Tensor? c, Tensor? residual)",
    "Tensor",
)
def bn_act_bwd_apply(dy, mask, a, z, mean, b, c, residual, impl):
    return _like(dy, False)[0]


@_op("image_stats(Tensor x)", "(Tensor mean, Tensor m2)")
def image_stats(x, impl):
    return _vector(x, x.shape[:2]), _vector(x, x.shape[:2])


@_op(
    "gated_act(Tensor z, Tensor scale, Tensor shift, Tensor? residual, bool relu, bool save_mask)",
    "(Tensor y, Tensor mask)",
)
def gated_act(z, scale, shift, residual, relu, save_mask, impl):
    return _like(z, relu and save_mask)


@_op(
    "gated_act_bwd_reduce(Tensor dy, Tensor? mask, Tensor z, Tensor mean)",
    "(Tensor dy_masked, Tensor sum_dy, Tensor sum_dy_z)",
)
def gated_act_bwd_reduce(dy, mask, z, mean, impl):
    masked = dy.new_empty(0) if mask is None else _like(dy, False)[0]
    return masked, torch.empty_like(mean), torch.empty_like(mean)


@_op(
    "gated_act_bwd_apply(Tensor dy, Tensor scale, Tensor shift, Tensor? z, Tensor? mean, "
    "Tensor? b)",
    "Tensor",
)
def gated_act_bwd_apply(dy, scale, shift, z, mean, b, impl):
    return _like(dy, False)[0]


@_op(
    f"bn_relu_max_pool(Tensor z, Tensor? scale, Tensor? shift, {_WINDOWS}, bool save_index)",
    "(Tensor y, Tensor index)",
)
def bn_relu_max_pool(z, scale, shift, kernel, stride, padding, save_index, impl):
    size = Pool(tuple(kernel), tuple(stride), tuple(padding)).output_shape(z.shape)
    y = torch.empty(size, dtype=z.dtype, device=z.device, memory_format=memory_format(z))
    index = torch.empty_like(y, dtype=torch.uint8)
    return y, index if save_index else index.new_empty(0)


@_op(
    f"max_pool_bwd(Tensor dy, Tensor index, Tensor x, Tensor? mean, Tensor? rstd, {_WINDOWS})",
    "(Tensor dx, Tensor sum_dx, Tensor sum_dx_xhat)",
)
def max_pool_bwd(dy, index, x, mean, rstd, kernel, stride, padding, impl):
    size = 0 if mean is None else x.size(1)
    return _like(x, False)[0], _vector(x, size), _vector(x, size)


@_op("global_avg_pool(Tensor x)", "Tensor")
def global_avg_pool(x, impl):
    return x.new_empty(x.size(0), x.size(1))


@_op(
    "conv_fprop(Tensor x, Tensor w, Tensor? in_scale, Tensor? in_shift, bool stats, "
    f"Tensor? weight, Tensor? bias, float eps, Tensor? residual, bool relu, {_GEOMETRY})",
    "(Tensor z, Tensor mean, Tensor m2, Tensor scale, Tensor shift, Tensor rstd)",
)
def conv_fprop(
    x, w, in_scale, in_shift, stats, weight, bias, eps, residual, relu,
    stride, padding, dilation, groups, impl,
):  # fmt: skip
    z = _conv_output(x, w, stride, padding, dilation)
    size = w.size(0) if stats else 0
    return z, *(_vector(x, size) for _ in range(5))


@_op(
    "conv_bprop(Tensor dy, Tensor w, Tensor x, Tensor? dy_mask, Tensor? a, Tensor? z, "
    "Tensor? mean, Tensor? b, Tensor? c, Tensor? in_scale, Tensor? in_shift, Tensor? in_mean, "
    "Tensor? in_rstd, Tensor? in_act, Tensor? residual, Tensor? residual_mask, "
    f"{_GEOMETRY}, bool need_dx, bool need_dw, bool wide_dw)",
    "(Tensor dx, Tensor dw, Tensor sum_dx, Tensor sum_dx_xhat, Tensor b, Tensor c)",
)
def conv_bprop(
    dy, w, x, dy_mask, a, z, mean, b, c, in_scale, in_shift, in_mean, in_rstd, in_act,
    residual, residual_mask, stride, padding, dilation, groups, need_dx, need_dw, wide_dw, impl,
):  # fmt: skip
    dx = x.new_empty(0)
    if need_dx:
        dx = torch.empty_like(x, memory_format=memory_format(x, w))
    dtype = stats_dtype(x) if wide_dw else w.dtype
    dw = torch.empty_like(w, dtype=dtype) if need_dw else w.new_empty(0, dtype=dtype)
    size = x.size(1) if need_dx and in_mean is not None else 0
    return dx, dw, *(_vector(x, size) for _ in range(4))


@_op(
    "conv_bn_act(Tensor x, Tensor w, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
    "Tensor? running_mean, Tensor? running_var, Tensor? residual, bool relu, float eps, "
    f"{_GEOMETRY})",
    "Tensor",
)
def conv_bn_act(
    x, w, bias, bn_weight, bn_bias, running_mean, running_var, residual, relu, eps,
    stride, padding, dilation, groups, impl,
):  # fmt: skip
    return _conv_output(x, w, stride, padding, dilation)


@_op(
    "conv_add_projection(Tensor x, Tensor w, Tensor? scale, Tensor? shift, Tensor source, "
    "Tensor source_w, Tensor? source_scale, Tensor? source_shift, bool relu, "
    f"{_GEOMETRY}, SymInt[2] source_stride)",
    "Tensor",
)
def conv_add_projection(
    x, w, scale, shift, source, source_w, source_scale, source_shift, relu,
    stride, padding, dilation, groups, source_stride, impl,
):  # fmt: skip
    return _conv_output(x, w, stride, padding, dilation)
