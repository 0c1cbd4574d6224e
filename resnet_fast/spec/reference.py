"""The specification: every op in plain PyTorch.

One function per op of `dispatch.ops`, with the same arguments: what a kernel must compute.
`resnet_fast.blocks` specifies whole layers and blocks. Its modules use PyTorch's autograd and none
of the backward formulas here, so the tests compare these formulas with them.

Notation (Ioffe & Szegedy 2015, arXiv:1502.03167): for a channel with M values z,
mean = Σz/M, m2 = Σ(z − mean)², rstd = (m2/M + eps)^(−1/2), xhat = (z − mean)·rstd,
scale = weight·rstd, shift = bias − mean·scale, so that weight·xhat + bias = scale·z + shift.
Channel vectors are fp32 for tensors of every dtype, and fp64 for double tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import in_two
from .dtypes import stats_dtype
from .layout import is_channels_last, mask_shape, memory_format, values_per_channel

CHANNELS = (1, -1, 1, 1)
NONE = 255  # the index of a window whose result is 0
OVER_PIXELS = (0, 2, 3)
OF_IMAGE = (2, 3)


def _wide(x: Tensor) -> Tensor:
    return x.to(stats_dtype(x))


def _affine(z: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return _wide(z)
    # In fp64, like a fused multiply-add: for large |mean| the two terms nearly cancel.
    scale, shift = (v.double()[..., None, None] for v in (scale, shift))  # [C] or [N,C]
    wide = z.double() * scale + shift
    return wide.to(stats_dtype(z))


def _rows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).reshape(n * h * w, c)
    return x.reshape(n * c, h * w)


def pack_mask(positive: Tensor) -> Tensor:
    """Bool [N,C,H,W] → uint8 bit mask: element i of a row is bit i % 8 of the row's byte i // 8."""
    rows, width = mask_shape(positive)
    bits = _rows(positive).to(torch.uint8)
    bits = F.pad(bits, (0, 8 * width - bits.size(1))).view(rows, width, 8)
    place = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits * place).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """Inverse of `pack_mask`: bool tensor of the shape and format of dense `like`."""
    n, c, h, w = like.shape
    place = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = (mask.unsqueeze(-1) & place).ne(0).flatten(1)
    if is_channels_last(like):
        return bits[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2)
    return bits[:, : h * w].reshape(n, c, h, w)


def bn_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean, m2 of each channel over N, H, W; zeros for an empty batch."""
    wide = _wide(x)
    if x.numel() == 0:
        zero = wide.new_zeros(x.size(1))
        return zero, zero.clone()
    mean = wide.mean(OVER_PIXELS)
    return mean, (wide - mean.view(CHANNELS)).square().sum(OVER_PIXELS)


def bn_finalize(
    mean: Tensor, m2: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """scale, shift, rstd of a normalization over `count` values per channel.

    Computed in fp64, because for large |mean| shift is a small difference of large terms. shift
    uses scale as rounded to the result's dtype.
    """
    rstd = torch.rsqrt(m2.double() / max(count, 1) + eps)
    scale = (rstd if weight is None else weight.double() * rstd).to(mean.dtype)
    shift = -mean.double() * scale.double()
    shift = shift if bias is None else shift + bias.double()
    return scale.clone(), shift.to(mean.dtype), rstd.to(mean.dtype)


def bn_fold(x: Tensor, vectors: Sequence[Tensor | None], eps: Sequence[float]) -> list[Tensor]:
    """scale and shift of norms with running statistics, each after a convolution on x.

    scale = weight/√(var + eps), shift = bn_bias − (mean − bias)·scale, such that
    scale·z + shift = BN(z + bias).

    Args:
        x: a tensor of the dtype and device of the activations.
        vectors: bias of the convolution, weight and bias of the norm, running mean and variance of
            each norm in turn, [K] or None. Without statistics the norm is
            weight·(z + bias) + bn_bias.
        eps: of each norm.

    Returns:
        scale, shift of each norm in turn, [K], in the dtype of statistics.
    """
    results = []
    for i, rule in enumerate(eps):
        bias, weight, shift, mean, var = vectors[5 * i : 5 * i + 5]
        given = next(t for t in (bias, weight, shift, mean) if t is not None)
        zero = torch.zeros(given.shape, dtype=torch.float64, device=x.device)
        statistics = (zero, zero + 1, 0.0) if mean is None else (mean.double(), var.double(), rule)
        centre = statistics[0] if bias is None else statistics[0] - bias.double()
        scale = torch.rsqrt(statistics[1] + statistics[2])
        scale = (scale if weight is None else weight.double() * scale).to(stats_dtype(x))
        moved = -centre * scale.double()
        moved = moved if shift is None else moved + shift.double()
        results += [scale.clone(), moved.to(scale.dtype)]
    return results


def bn_bwd_finalize(
    sum_dy: Tensor, sum_dy_xhat: Tensor, scale: Tensor, rstd: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """b, c of dz = scale·dy + b·(z − mean) + c, the gradient through batch statistics.

    b = −scale·rstd·Σdy·xhat/M, c = −scale·Σdy/M (Ioffe & Szegedy 2015, section 3).
    """
    a = scale / max(count, 1)
    return -a * rstd * sum_dy_xhat, -a * sum_dy


def bn_act(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    res_scale: Tensor | None,
    res_shift: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """y = relu(scale·z + shift + (res_scale·residual + res_shift)), and the ReLU's bit mask."""
    y = _affine(z, scale, shift)
    if residual is not None:
        y = y + _affine(residual, res_scale, res_shift)
    return _activate(y, z, relu, save_mask)


def add_relu(x: Tensor, residual: Tensor, save_mask: bool) -> tuple[Tensor, Tensor]:
    """y = relu(x + residual), and the ReLU's bit mask."""
    return _activate(_wide(x) + _wide(residual), x, True, save_mask)


def _activate(y: Tensor, like: Tensor, relu: bool, save_mask: bool) -> tuple[Tensor, Tensor]:
    positive = ~(y <= 0)  # NaN counts as positive: it must reach the output and the gradient
    out = torch.where(positive, y, 0.0) if relu else y
    out = out.to(like.dtype).contiguous(memory_format=memory_format(like))
    if not (relu and save_mask):
        return out, torch.empty(0, dtype=torch.uint8, device=y.device)
    fmt = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return out, pack_mask(positive.contiguous(memory_format=fmt))


def add_relu_bwd(dy: Tensor, mask: Tensor) -> Tensor:
    """dx = dresidual = dy where the mask's bit is set, else 0."""
    return torch.where(unpack_mask(mask, dy), dy, 0.0).to(memory_format=memory_format(dy))


def bn_act_bwd_reduce(
    dy: Tensor,
    mask: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    res_mean: Tensor | None,
    res_rstd: Tensor | None,
    res_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Σdz', then for z Σdz'·xhat(z) and `bn_bwd_finalize` of both sums, then for residual the same.

    dz' = dy under the mask. Without a residual the last three are empty.
    """
    g = _masked(dy, mask)
    total, results = g.sum(OVER_PIXELS), []
    norms = (z, mean, rstd, scale), (residual, res_mean, res_rstd, res_scale)
    for value, center, spread, factor in norms:
        if value is None:
            results += [g.new_empty(0) for _ in range(3)]
        else:
            xhat = (_wide(value) - center.view(CHANNELS)) * spread.view(CHANNELS)
            sum_xhat = (g * xhat).sum(OVER_PIXELS)
            sums = total, sum_xhat
            results += [sum_xhat, *bn_bwd_finalize(*sums, factor, spread, values_per_channel(dy))]
    return total, *results


def _masked(dy: Tensor, mask: Tensor | None) -> Tensor:
    wide = _wide(dy)
    return wide if mask is None else torch.where(unpack_mask(mask, dy), wide, 0.0)


def bn_act_bwd_apply(
    dy: Tensor,
    mask: Tensor | None,
    a: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """dz = a·dz' + b·(z − mean) + c + residual with dz' = dy under the mask.

    Without `b` (frozen statistics) dz = a·dz' + residual; without `a` dz = dz' + residual.
    """
    dz = _masked(dy, mask)
    if a is not None:
        dz = dz * a.view(CHANNELS)
    if b is not None:
        dz = dz + (_wide(z) - mean.view(CHANNELS)) * b.view(CHANNELS) + c.view(CHANNELS)
    if residual is not None:
        dz = dz + _wide(residual)
    return dz.to(dy.dtype).contiguous(memory_format=memory_format(dy))


def image_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean, m2 [N,C] of each channel of each image over H, W; zeros without pixels."""
    wide = _wide(x)
    if x.numel() == 0:
        zero = wide.new_zeros(x.shape[:2])
        return zero, zero.clone()
    mean = wide.mean(OF_IMAGE)
    return mean, (wide - mean[..., None, None]).square().sum(OF_IMAGE)


def gated_act(
    z: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor]:
    """`bn_act` with scale and shift [N,C], one value per image and channel.

    y = relu(scale·z + shift + residual), and the ReLU's bit mask.
    """
    y = _affine(z, scale, shift)
    if residual is not None:
        y = y + _wide(residual)
    return _activate(y, z, relu, save_mask)


def gated_act_bwd_reduce(
    dy: Tensor, mask: Tensor | None, z: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dz' = dy under the mask; Σdz' and Σdz'·(z − mean) [N,C] over H, W.

    mean [N,C]: centres of the second sum. Without a mask dz' is dy and not returned (empty).
    """
    g = _masked(dy, mask)
    sums = g.sum(OF_IMAGE), (g * (_wide(z) - mean[..., None, None])).sum(OF_IMAGE)
    if mask is None:
        return dy.new_empty(0), *sums
    return g.to(dy.dtype).contiguous(memory_format=memory_format(dy)), *sums


def gated_act_bwd_apply(
    dy: Tensor,
    scale: Tensor,
    shift: Tensor,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    """dz = scale·dy + b·(z − mean) + shift, with vectors [N,C]; without `b` scale·dy + shift."""
    dz = _wide(dy) * scale[..., None, None] + shift[..., None, None]
    if b is not None:
        dz = dz + (_wide(z) - mean[..., None, None]) * b[..., None, None]
    return dz.to(dy.dtype).contiguous(memory_format=memory_format(dy))


def bn_relu_max_pool(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    save_index: bool,
) -> tuple[Tensor, Tensor]:
    """y = max over windows of relu(scale·z + shift), and the position of y in its window.

    The windows are those of `F.max_pool2d`. Without scale and shift, y = max of relu(z). index
    (uint8, shape of y) is r·S + s of the first maximum in an R×S window, and NONE where y is 0, so
    no gradient flows there.
    """
    u = _affine(z, scale, shift)
    u = torch.where(u <= 0, 0.0, u)
    y, flat = F.max_pool2d(u, kernel, stride, padding, return_indices=True)
    fmt = memory_format(z)
    out = y.to(z.dtype).contiguous(memory_format=fmt)
    if not save_index:
        return out, torch.empty(0, dtype=torch.uint8, device=z.device)
    row, column = flat // z.size(3), flat % z.size(3)
    r = row - _starts(y, 0, stride, padding)
    s = column - _starts(y, 1, stride, padding)
    index = torch.where(y == 0, NONE, r * kernel[1] + s).to(torch.uint8)
    return out, index.contiguous(memory_format=fmt)


def _starts(y: Tensor, axis: int, stride: list[int], padding: list[int]) -> Tensor:
    """The first row (axis 0) or column (axis 1) of each window, to broadcast over y."""
    first = torch.arange(y.size(2 + axis), device=y.device) * stride[axis] - padding[axis]
    return first.view((-1, 1) if axis == 0 else (1, -1))


def max_pool_bwd(
    dy: Tensor,
    index: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx: Σ of dy over the windows whose `index` points to the pixel; Σdx and Σdx·xhat(x).

    dx is the gradient through max-pool and ReLU of `bn_relu_max_pool` at x. The sums are for the
    backward pass of its normalization; without `mean` and `rstd` they are empty.
    """
    n, c, h, w = x.shape
    code = index.long()
    row = _starts(dy, 0, stride, padding) + code // kernel[1]
    column = _starts(dy, 1, stride, padding) + code % kernel[1]
    taken = index != NONE
    flat = torch.where(taken, row * w + column, 0).flatten(2)
    wide = _wide(dy).new_zeros(n, c, h * w)
    wide.scatter_add_(2, flat, torch.where(taken, _wide(dy), 0.0).flatten(2))
    wide = wide.view(n, c, h, w)
    sums = [wide.new_empty(0), wide.new_empty(0)]
    if mean is not None:
        xhat = (_wide(x) - mean.view(CHANNELS)) * rstd.view(CHANNELS)
        sums = [wide.sum(OVER_PIXELS), (wide * xhat).sum(OVER_PIXELS)]
    return wide.to(dy.dtype).contiguous(memory_format=memory_format(x)), *sums


def global_avg_pool(x: Tensor) -> Tensor:
    """y[n, c] = mean over H, W of x[n, c]: [N,C,H,W] → [N,C]."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1).contiguous()


def conv_fprop(
    x: Tensor,
    w: Tensor,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    stats: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z = conv(φ(x), w), and when `stats` z's mean and m2 and their `bn_finalize`, else empty.

    φ(x) = relu(in_scale·x + in_shift) when given (the prologue), else x. Padding is zero after φ.
    With `stats`, weight, bias and eps are those of the normalization of z. Without, no
    normalization follows: z = relu(conv(φ(x), w) + bias + residual).
    """
    h = x if in_scale is None else bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]
    geometry = stride, padding, dilation, groups
    if not stats:
        z = conv_bn_act(h, w, bias, None, None, None, None, residual, relu, 0.0, *geometry)
        empty = torch.empty(0, dtype=stats_dtype(x), device=x.device)
        return z, *(empty.clone() for _ in range(5))
    if residual is not None or relu:
        raise ValueError("conv_fprop: stats: expected False with a residual or a ReLU")
    z = F.conv2d(h, w.to(x.dtype), None, *geometry).contiguous(memory_format=memory_format(x, w))
    moments = bn_stats(z)
    return z, *moments, *bn_finalize(*moments, values_per_channel(z), weight, bias, eps)


def conv_bprop(
    dy: Tensor,
    w: Tensor,
    x: Tensor,
    dy_mask: Tensor | None,
    a: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    b: Tensor | None,
    c: Tensor | None,
    in_scale: Tensor | None,
    in_shift: Tensor | None,
    in_mean: Tensor | None,
    in_rstd: Tensor | None,
    in_act: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    wide_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw of z = conv(φ(x), w), fused with its neighbours in the chain.

    First dz = bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c). Then dx = dgrad(dz) + residual
    (under `residual_mask`). With a prologue, dx = 0 where in_scale·x + in_shift ≤ 0 (the ReLU's
    gradient). With `in_mean` and `in_rstd`, also Σdx, Σdx·xhat(x) and their `bn_bwd_finalize`, for
    the backward pass of that normalization. `in_act` is φ(x) if the caller stored it. dw has the
    dtype of w, or with `wide_dw` that of statistics. Results not requested are empty.
    """
    dz = dy
    if dy_mask is not None or a is not None:
        dz = bn_act_bwd_apply(dy, dy_mask, a, z, mean, b, c, None)
    h = x
    if in_act is not None:
        h = in_act
    elif in_scale is not None:
        h = bn_act(x, in_scale, in_shift, None, None, None, True, False)[0]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, h, w.to(x.dtype), None, stride, padding, dilation, False, [0, 0], groups,
        [need_dx, need_dw, False],
    )  # fmt: skip
    empty = torch.empty(0, dtype=stats_dtype(x), device=x.device)
    dtype = stats_dtype(x) if wide_dw else w.dtype
    dw = dw.to(dtype) if need_dw else torch.empty(0, dtype=dtype, device=w.device)
    if not need_dx:
        dx = torch.empty(0, dtype=x.dtype, device=x.device)
        return dx, dw, *(empty.clone() for _ in range(4))
    wide = _wide(dx)
    if residual is not None:
        wide = wide + _masked(residual, residual_mask)
    if in_scale is not None:
        wide = torch.where(_affine(x, in_scale, in_shift) <= 0, 0.0, wide)
    vectors = tuple(empty.clone() for _ in range(4))
    if in_mean is not None:
        xhat = (_wide(x) - in_mean.view(CHANNELS)) * in_rstd.view(CHANNELS)
        sums = wide.sum(OVER_PIXELS), (wide * xhat).sum(OVER_PIXELS)
        vectors = *sums, *bn_bwd_finalize(*sums, in_scale, in_rstd, values_per_channel(x))
    dx = wide.to(x.dtype).contiguous(memory_format=memory_format(x, w))
    return dx, dw, *vectors


def conv_bn_act(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Inference: y = relu(BN(conv(x, w) + bias) + residual) with running statistics.

    Without `running_mean`, BN(z) = bn_weight·z + bn_bias: a norm that `bn_fold` has folded, or with
    None for both no norm.
    """
    fmt = memory_format(x, w)
    y = _wide(F.conv2d(x, w.to(x.dtype), None, stride, padding, dilation, groups))
    vectors = [bias, bn_weight, bn_bias, running_mean, running_var]
    if any(t is not None for t in vectors):
        y = _affine(y, *bn_fold(x, vectors, [eps]))
    if residual is not None:
        y = y + _wide(residual)
    y = torch.where(y <= 0, 0.0, y) if relu else y
    return y.to(x.dtype).contiguous(memory_format=fmt)


def conv_add_projection(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    source: Tensor,
    source_w: Tensor,
    source_scale: Tensor | None,
    source_shift: Tensor | None,
    relu: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    source_stride: list[int],
) -> Tensor:
    """Inference: y = relu(scale·conv(x, w) + shift + s), the end of a block with a projection.

    s = source_scale·conv(source, source_w) + source_shift, with 1x1 filters source_w and without
    padding. Norms are folded (`bn_fold`), or None.
    """
    return in_two.conv_add_projection(
        conv_bn_act, x, w, scale, shift, source, source_w, source_scale, source_shift, relu,
        stride, padding, dilation, groups, source_stride,
    )  # fmt: skip
