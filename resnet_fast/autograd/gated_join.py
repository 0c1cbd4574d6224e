"""The end of a squeeze-and-excitation block, as two Functions around its gate.

With u = scale·z + shift (a norm, or scale = 1 and shift = 0):

    pooled = mean over H, W of u          e = gate(pooled)          y = relu(e·u + residual)

u is not stored: y = relu((scale·e)·z + shift·e + residual), one affine map per image and channel.
`PoolFunction` computes pooled from one pass over z, `GateFunction` y from a second. The gate is a
call between them that autograd records like any other, so its parameters and hooks are PyTorch's.

Backward: `GateFunction` masks dy and sums dy and dy·(z − mean) per image in one pass, which gives
de. After the gate's backward pass, `PoolFunction` forms dz in one pass (P = H·W, mean and rstd of
the norm, M values per channel; the last two terms only for batch statistics):

    du = e·dy + dpooled/P     dz = scale·(du − Σdu/M − xhat·Σdu·xhat/M)     xhat = (z − mean)·rstd

Both sums follow from those of the images, so du is not stored either. Therefore `GateFunction`
hands its masked dy, not e·dy, to `PoolFunction` as the gradient of the z that it got from there,
and e and the sums as the gradient of an empty tensor, `link`.

Saved: z, the residual's bit mask, vectors.
Source: Hu et al. 2018, arXiv:1709.01507, eq. 2 to 4; Ioffe & Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ops, replay
from ..spec.chain import Chain, NormParams
from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format, values_per_channel
from .chain import check_backward


class PoolFunction(torch.autograd.Function):
    """z, link, pooled, mean, scale, shift, center, m2 = PoolFunction.apply(chain, z, *NormParams).

    chain: `Chain.norms[0]` is the norm, or None. z [N,C,H,W] is dense. pooled [N,C]: means of
    scale·z + shift; mean [N,C]: those of z. scale, shift, center and m2 [C] are the norm's; center
    and m2 are statistics of the batch, or center is the running mean. z is returned for
    `GateFunction`, and link too. The others have no gradient.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, z: Tensor, *params: Tensor | None) -> tuple[Tensor, ...]:
        pooled, mean, scale, shift, center, m2, rstd = pool(chain, z, *params)
        ctx.chain, ctx.format = chain, memory_format(z)
        ctx.dtypes = [None if p is None else p.dtype for p in params[:2]]
        ctx.save_for_backward(z, mean, scale, center, rstd)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, scale, shift, center, m2)
        link = pooled.new_empty(3, *pooled.shape)
        return z, link, pooled, mean, scale, shift, center, m2

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, link: Tensor | None, dpooled: Tensor | None, *_: Any
    ) -> Any:
        check_backward(dy, link, dpooled)
        z, *vectors = ctx.saved_tensors
        mean = vectors[0]
        dy = torch.zeros_like(z) if dy is None else dy  # only pooled has a gradient
        link = mean.new_zeros(3, *mean.shape) if link is None else link
        dpooled = torch.zeros_like(mean) if dpooled is None else dpooled
        dense = (t.contiguous(memory_format=ctx.format) for t in (dy, z))
        fixed = (ctx.needs_input_grad[1],)
        dz, *grads = replay.run(_pool_backward, ctx.chain, fixed, (*dense, link, dpooled, *vectors))
        needs = ctx.needs_input_grad[2:4]
        grads = [g.to(d) if n else None for g, d, n in zip(grads, ctx.dtypes, needs, strict=True)]
        return None, dz, *grads, None, None


class GateFunction(torch.autograd.Function):
    """y = GateFunction.apply(chain, relu, z, link, gate, residual, mean, pooled, scale, shift).

    gate [N,C]: e. residual: as z, or None. z and link are those of `PoolFunction`, z in the dtype
    of y; without a gradient of z link is None. The others are results of `PoolFunction` that have
    no gradient here.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, relu: bool, z: Tensor, link: Tensor | None, gate: Tensor,
        residual: Tensor | None, *vectors: Tensor,
    ) -> Tensor:  # fmt: skip
        y, mask = join(chain, relu, True, z, gate, residual, *vectors[2:])
        ctx.chain, ctx.format = chain, memory_format(z)
        ctx.save_for_backward(z, mask if relu else None, gate, *vectors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        check_backward(dy)
        z, mask, *vectors = ctx.saved_tensors
        mask = None if mask is None else mask.contiguous()
        dense = [t.contiguous(memory_format=ctx.format) for t in (dy, z)]
        needs = ctx.needs_input_grad
        if not (needs[3] or needs[4]):
            masked = dense[0] if mask is None else ops.add_relu_bwd(dense[0], mask, ctx.chain.impl)
            return *[None] * 5, masked, *[None] * 4
        found = replay.run(_gate_backward, ctx.chain, (), (*dense, mask, *vectors))
        masked, link, dgate = found
        masked = dense[0] if mask is None else masked
        grads = zip((masked, link, dgate, masked), needs[2:6], strict=True)
        return *[None] * 2, *(grad if need else None for grad, need in grads), *[None] * 4


def pool(chain: Chain, z: Tensor, *params: Tensor | None) -> tuple[Tensor, ...]:
    """pooled, mean, scale, shift, center, m2 and rstd of `PoolFunction`, without a gradient."""
    return replay.run(_pool, chain, (), (z, *params))


def join(chain: Chain, relu: bool, save_mask: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """y of `GateFunction` and its mask, from z, gate, residual, scale and shift."""
    return replay.run(_gate, chain, (relu, save_mask), tensors)


def _pool(chain: Chain, z: Tensor, *params: Tensor | None) -> tuple[Tensor, ...]:
    norm, given, impl = chain.norms[0], NormParams(*params), chain.impl
    mean, m2 = ops.image_stats(z, impl)
    count = values_per_channel(z)
    if norm is None:
        one, zero = mean.new_ones(z.size(1)), mean.new_zeros(z.size(1))
        return mean.clone(), mean, one, zero, zero.clone(), zero.clone(), one.clone()
    if norm.batch_stats:
        center, m2 = _merged(mean, m2, count)
    else:
        (center, m2), count = (v.clone() for v in given.running(stats_dtype(z))), 1
    scale, shift, rstd = ops.bn_finalize(
        center, m2, count, given.weight, given.bias, norm.eps, impl
    )
    pooled = (mean - center) * scale
    pooled = pooled if given.bias is None else pooled + given.bias
    return pooled, mean, scale, shift, center, m2, rstd


def _merged(mean: Tensor, m2: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """mean and m2 [C] of the batch from those of its images, which have equal numbers of pixels.

    Σ(v − mean)² = Σ m2[n] + P·(mean[n] − mean)² (Chan, Golub & LeVeque 1983), in fp64.
    """
    images = max(mean.size(0), 1)
    means = mean.double()
    center = means.sum(0) / images
    spread = (means - center).square_().mul_(count / images).add_(m2)
    return center.to(mean.dtype), spread.sum(0).to(mean.dtype)


def _gate(
    chain: Chain, relu: bool, save_mask: bool, z: Tensor, gate: Tensor, residual: Tensor | None,
    scale: Tensor, shift: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gate = gate.to(stats_dtype(z))
    vectors = [(gate * v.to(gate.dtype)).contiguous() for v in (scale, shift)]
    return ops.gated_act(z, *vectors, residual, relu, save_mask, chain.impl)


def _gate_backward(
    chain: Chain, dy: Tensor, z: Tensor, mask: Tensor | None, gate: Tensor, mean: Tensor,
    pooled: Tensor, scale: Tensor, shift: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy under the mask (empty without), the gradient of link, and de = Σdy·u."""
    center = _finite(mean)
    given = dy, mask, z, center.to(stats_dtype(z))
    masked, sum_dy, sum_dy_z = ops.gated_act_bwd_reduce(*given, chain.impl)
    dgate = scale * sum_dy_z + torch.where(center == mean, pooled, shift) * sum_dy
    link = torch.stack([gate.to(mean.dtype), sum_dy.to(mean.dtype), sum_dy_z.to(mean.dtype)])
    return masked, link, dgate.to(gate.dtype)


def _finite(mean: Tensor) -> Tensor:
    """Centres of sums: an infinite mean would make NaN of them; PyTorch's would be infinite."""
    return mean.nan_to_num(0.0, 0.0, 0.0)


def _pool_backward(
    chain: Chain, need_z: bool, dy: Tensor, z: Tensor, link: Tensor, dpooled: Tensor,
    mean: Tensor, scale: Tensor, center: Tensor, rstd: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """dz, dweight and dbias."""
    norm, impl, count = chain.norms[0], chain.impl, values_per_channel(z)
    gate, sum_dy, sum_dy_z = link.unbind()
    du = gate * sum_dy + dpooled  # Σdu of each image
    du_z = gate * (sum_dy_z + (_finite(mean) - center) * sum_dy) + dpooled * (mean - center)
    sum_du, sum_du_xhat = du.sum(0), du_z.sum(0) * rstd
    if not need_z:
        return None, sum_du_xhat, sum_du
    shift, through = dpooled * (scale / max(count // max(z.size(0), 1), 1)), [None] * 3
    if norm is not None and norm.batch_stats:
        b, c = ops.bn_bwd_finalize(sum_du, sum_du_xhat, scale, rstd, count, impl)
        shift += c
        through = [z, *(v.expand_as(mean).contiguous() for v in (center, b))]
    dz = ops.gated_act_bwd_apply(dy, gate * scale, shift, *through, impl)
    return dz, sum_du_xhat, sum_du
