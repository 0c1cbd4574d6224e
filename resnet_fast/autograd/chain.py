"""One autograd Function that runs any `Chain`: conv+BN+ReLU, BN+ReLU, add+ReLU, residual blocks.

Forward: for each convolution j, the raw output z[j] = h[j+1] is stored, with mean and m2 of its
channels. `conv_fprop` applies the normalization and ReLU before it: on a CPU as it loads its
input, on a GPU in a pass.
The join normalizes the last z and adds the shortcut in one pass. It keeps one bit per value for its
ReLU. With a pool, it also takes the maximum of each window and keeps one byte for its position.
Without a last norm, the last convolution adds bias and shortcut and applies the ReLU.

Backward, from the join to the input: one reduction gives Σdy and Σdy·xhat of the last norm. With a
pool, it also computes the gradient before the pool. Then each `conv_bprop` forms
dz = a·dy + b·(z − mean) + c and computes dx and dw. It masks dx by the ReLU recomputed from
the stored h, and sums it for the norm below (`reference.conv_bprop`).

A norm with a `Norm.group` shares its statistics and these sums with other processes (`sync`). Every
rank computes the sums, with or without a gradient, so that collectives match.

Saved: x, the filters (on a GPU in the dtype of x), one raw output h per convolution, four vectors
per norm, and the join's bit mask (or the index of each window's maximum; without a last norm, y).
Not saved: anything after a ReLU (unless `Chain.keeps`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import ops, replay
from ..spec.chain import Chain, Norm, NormParams, unflatten
from ..spec.dtypes import stats_dtype
from ..spec.layout import memory_format, values_per_channel
from . import sync

aten = torch.ops.aten
DOUBLE_BACKWARD = (
    "resnet_fast: the backward pass of a fused chain is not differentiable (create_graph=True); "
    "use resnet_fast.unfuse(model) or resnet_fast.spec.reference for second derivatives"
)
BATCHED = (
    "resnet_fast: the backward pass of a fused chain takes one gradient at a time, not "
    "is_grads_batched=True or vectorize=True; use resnet_fast.unfuse(model)"
)


class Affine(NamedTuple):
    """A norm as an affine map: y = scale·z + shift, xhat = (z − mean)·rstd; None without a norm.

    count [1]: only for a norm with a group: values per channel in all its processes, at least 1.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    count: Tensor | None = None


class Saved(NamedTuple):
    """Tensors that the backward pass reads.

    mask: bits of the join's ReLU, or the index of the maximum of each pool window; z_p: the
    projection's raw output; weights: filters of `Chain.all_convs` as `_cast` gives them; hs: h[j]
    of `spec.chain`, the last one y if a ReLU but no norm follows; acts: φ[j](h[j]) if kept;
    affines: one for each of `Chain.all_norms`.
    """

    mask: Tensor | None
    z_p: Tensor | None
    weights: list[Tensor]
    hs: list[Tensor | None]
    acts: list[Tensor | None]
    affines: list[Affine]

    def flat(self) -> list[Tensor | None]:
        """All tensors in order, for `save_for_backward`."""
        vectors = [t for affine in self.affines for t in affine]
        return [self.mask, self.z_p, *self.weights, *self.hs, *self.acts, *vectors]

    @classmethod
    def of(cls, chain: Chain, flat: Iterable[Tensor | None]) -> Saved:
        """Inverse of `flat`."""
        rest, n = iter(flat), len(chain.convs)

        def take(count: int) -> list[Any]:
            return list(itertools.islice(rest, count))

        return cls(
            *take(2), take(len(chain.all_convs)), take(n + 1), take(n),
            [Affine(*take(len(Affine._fields))) for _ in range(n + 2)],
        )  # fmt: skip

    def in_format(self, layout: Layout) -> Saved:
        """The same tensors in the memory formats in which they were saved.

        Hooks may change them: `torch.autograd.graph.save_on_cpu(pin_memory=True)` returns every
        tensor contiguous.
        """

        def dense(t: Tensor | None, fmt: torch.memory_format) -> Tensor | None:
            return t if t is None else t.contiguous(memory_format=fmt)

        fmt = layout.format
        bits = self.mask is None or self.mask.dim() == 4  # a pool's index follows z (before_pool)
        return self._replace(
            mask=self.mask if bits else self.mask.contiguous(),
            z_p=dense(self.z_p, fmt),
            weights=[dense(w, f) for w, f in zip(self.weights, layout.filters, strict=True)],
            hs=[dense(h, fmt) for h in self.hs],
            acts=[dense(a, fmt) for a in self.acts],
        )


def _ready(
    norm: Norm, p: NormParams, conv_bias: Tensor | None, h: Tensor, stats: Any, impl: str
) -> Affine:
    """The affine map of `norm` on h, from batch statistics or from running statistics.

    stats: mean and m2, and the count of a norm with a group. A convolution's bias cancels in batch
    statistics; with running statistics it shifts the mean.
    """
    if norm.batch_stats:
        mean, m2, *shared = stats
        count, total = values_per_channel(h), None
        if shared:  # the op takes a number as count: pass the variance and 1
            total = shared[0].clamp(min=1)
            m2, count = m2 / total, 1
        scale, shift, rstd = ops.bn_finalize(mean, m2, count, p.weight, p.bias, norm.eps, impl)
        return Affine(scale, shift, mean, rstd, total)
    mean, var = p.running(stats_dtype(h))
    if conv_bias is not None:
        mean = mean - conv_bias.to(mean.dtype)
    scale, shift, rstd = ops.bn_finalize(mean, var, 1, p.weight, p.bias, norm.eps, impl)
    return Affine(scale, shift, mean, rstd)


def _forward(
    chain: Chain, x: Tensor, residual: Tensor | None, *flat: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor | None]]:
    """y, the statistics and `Saved.flat` of `ChainFunction`."""
    convs, norms = unflatten(chain, flat)
    n, impl = len(chain.convs), chain.impl
    fmt = memory_format(x, convs[0].weight if n else None)
    weights = _cast([conv.weight for conv in convs], x, impl)
    statistics: list[Tensor] = []

    def ready(i: int, h: Tensor, found: Sequence[Tensor] | None) -> Affine:
        """found: mean, m2, scale, shift and rstd of h, if the convolution computed them."""
        norm, stats = chain.all_norms[i], None
        if norm is None:
            return Affine()
        conv_bias = None if i == 0 else convs[i - 1].bias
        if norm.batch_stats:
            if found is not None and conv_bias is None and norm.group is None:
                mean, m2, scale, shift, rstd = found
                statistics.extend((mean, m2))
                return Affine(scale, shift, mean, rstd)
            stats = ops.bn_stats(h, impl) if found is None else tuple(found[:2])
            if conv_bias is not None:  # it cancels if it is finite
                stats = (stats[0], stats[1] + 0.0 * conv_bias)
            if norm.group is not None:
                stats = sync.merge_moments(*stats, values_per_channel(h), norm.group)
            statistics.extend(stats)
        return _ready(norm, norms[i], conv_bias, h, stats, impl)

    def convolve(
        i: int, h: Tensor, affine: Affine, skip: Tensor | None = None, relu: bool = False
    ) -> tuple[Tensor, Affine]:
        """Convolution i of (convs, projection) on φ(h), and the affine map of the norm after it.

        Without a norm it adds the bias and `skip`, and with `relu` applies a ReLU.
        """
        norm, params = chain.all_norms[i + 1], norms[i + 1]
        batch_stats, eps = norm is not None and norm.batch_stats, 0.0 if norm is None else norm.eps
        bias = convs[i].bias if norm is None else params.bias if batch_stats else None
        z, *found = ops.conv_fprop(
            h, weights[i], affine.scale, affine.shift, batch_stats, params.weight, bias, eps,
            skip, relu, *chain.all_convs[i].args(), impl,
        )  # fmt: skip
        z = _dense(z, fmt)  # with a single channel, either format fits
        return z, ready(i + 1, z, found)

    hs, acts, affines = [x], [], [ready(0, x, None)]

    def read(j: int) -> tuple[Tensor, Affine]:
        """The input of convolution j, and what it applies to it."""
        act = acts[j]
        return (hs[j], affines[j]) if act is None else (act, Affine())

    shortcut, through = x if chain.shortcut == "identity" else residual, Affine()
    for j in range(n):
        keeps = chain.keeps(x) and affines[j].scale is not None
        acts.append(_activate(hs[j], affines[j], impl) if keeps else None)
        joins = j == n - 1 and chain.norms[n] is None
        if joins and chain.projection is not None:
            shortcut, through = convolve(n, *read(0))
        z, after = convolve(j, *read(j), *((shortcut, chain.relu) if joins else ()))
        hs.append(z)
        affines.append(after)
    if chain.projection is not None and chain.norms[n] is not None:
        shortcut, through = convolve(n, *read(0))

    last, mask = affines[n], None
    if chain.pool is not None:
        y, mask = ops.bn_relu_max_pool(
            hs[n], last.scale, last.shift, *chain.pool.args(), True, impl
        )
        y = _dense(y, fmt)
    elif last.scale is not None:
        y, mask = ops.bn_act(
            hs[n], last.scale, last.shift, shortcut, through.scale, through.shift,
            chain.relu, chain.relu, impl,
        )  # fmt: skip
    elif n > 0:
        y = hs[n]
    elif chain.relu:
        y, mask = ops.add_relu(x, shortcut, True, impl)
    else:
        y = x + shortcut
    reads_last = last.scale is not None or (n > 0 and chain.relu)
    saved = Saved(
        mask if chain.relu else None,
        shortcut if through.scale is not None else None,
        weights,
        [*hs[:n], hs[n] if reads_last else None],
        acts,
        [*affines, through],
    )
    return y, tuple(statistics), saved.flat()


class Layout(NamedTuple):
    """Memory format of x, those of the filters, and the dtypes of `Tensors.flat`."""

    format: torch.memory_format
    filters: tuple[torch.memory_format, ...]
    dtypes: tuple[torch.dtype | None, ...]

    @classmethod
    def of(cls, chain: Chain, x: Tensor, flat: Sequence[Tensor | None]) -> Layout:
        filters = [w for w in flat[: 2 * len(chain.all_convs) : 2] if w is not None]
        return cls(
            memory_format(x, filters[0] if filters else None),
            tuple(memory_format(w) for w in filters),
            tuple(None if t is None else t.dtype for t in flat),
        )


class ChainFunction(torch.autograd.Function):
    """y, *statistics = ChainFunction.apply(chain, kind, layout, x, residual, *Tensors.flat()).

    kind: `replay.kind_of` all tensors, and their `Layout`; both may be None. x [N,C,H,W] is dense
    in NCHW or channels_last; y has the same format. residual is like y for the shortcut "residual",
    else None. `statistics` holds mean and m2 of every norm with batch statistics, and the count if
    the norm has a group. They are in chain order, the projection's last, and have no gradient.
    """

    @staticmethod
    def forward(ctx, chain, kind, layout, x, residual, *flat):
        y, statistics, saved = replay.run(_forward, chain, (), (x, residual, *flat), kind)
        ctx.chain, ctx.layout = chain, layout or Layout.of(chain, x, flat)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return (y, *statistics)

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        check_backward(dy)
        fixed = ctx.layout, ctx.needs_input_grad
        return replay.run(_backward, ctx.chain, fixed, (dy, *ctx.saved_tensors))


def check_backward(*grads: Tensor | None) -> None:
    """Raise RuntimeError for a backward pass that a fused chain does not support."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    batched = torch._C._functorch.is_legacy_batchedtensor
    if any([grad is not None and batched(grad) for grad in grads]):
        raise RuntimeError(BATCHED)


def _with_own_memory(grads: Sequence[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """`grads`, cloned where one is dy or a repeated tensor, so that in-place changes are safe."""
    given, own = [dy], []
    for grad in grads:
        if grad is not None:
            if any([grad is other for other in given]):
                grad = grad.clone()
            given.append(grad)
        own.append(grad)
    return own


def _dense(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """t in `fmt`; no call if t already has it.

    The compiler of torch 2.11 treats t.contiguous() as a separate output, and computes a wrong
    gradient if it is t itself.
    """
    return t if t.is_contiguous(memory_format=fmt) else t.contiguous(memory_format=fmt)


def _cast(weights: list[Tensor], x: Tensor, impl: str) -> list[Tensor]:
    """Filters in the dtype of x, on a GPU by one launch for all of a chain.

    The CPU kernels take wider filters, and cast them as they pack them.
    """
    if not (x.is_cuda or impl == "triton"):
        return weights
    wide = [w for w in weights if w.dtype != x.dtype]
    if not wide:
        return weights
    casts = [torch.empty_like(w, dtype=x.dtype) for w in wide]
    torch._foreach_copy_(casts, wide)
    rest = iter(casts)
    return [w if w.dtype == x.dtype else next(rest) for w in weights]


def _activate(h: Tensor, affine: Affine, impl: str) -> Tensor:
    """φ(h) = relu(scale·h + shift)."""
    return ops.bn_act(h, affine.scale, affine.shift, None, None, None, True, False, impl)[0]


def _backward(
    chain: Chain,
    layout: Layout,
    needs: tuple[bool, ...],
    dy: Tensor,
    *saved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of `ChainFunction`'s arguments."""
    return _Backward(chain, layout, needs, Saved.of(chain, saved).in_format(layout)).run(dy)


class _Backward:
    """The backward pass of one chain, from the join to the input. Indices are those of
    `Chain.all_norms` and `Chain.all_convs`, with the projection last.
    """

    def __init__(
        self,
        chain: Chain,
        layout: Layout,
        needs: tuple[bool, ...],
        saved: Saved,
    ) -> None:
        self.chain, self.impl, self.format = chain, chain.impl, layout.format
        self.n, self.saved = len(chain.convs), saved
        self.dy_masked: Tensor | None = None
        self.relu_mask = None if chain.pool is not None else saved.mask
        self.need_x, self.need_residual = needs[3:5]
        self.need, self.dtypes = unflatten(chain, needs[5:]), unflatten(chain, layout.dtypes)
        convs, norms = len(chain.all_convs), len(chain.all_norms)
        self.conv_grads: list[list[Tensor | None]] = [[None, None] for _ in range(convs)]
        self.norm_grads: list[list[Tensor | None]] = [[None] * 4 for _ in range(norms)]

    def needs_sums(self, i: int) -> bool:
        """Whether norm i needs Σdy and Σdy·xhat, for batch statistics or parameter gradients."""
        norm = self.chain.all_norms[i]
        bias = 0 < i <= len(self.need.convs) and self.need.convs[i - 1].bias
        return norm is not None and (norm.batch_stats or any(self.need.norms[i]) or bias)

    def flows_below(self, j: int) -> bool:
        """Whether anything before convolution j, its input norm included, needs a gradient.

        Always true for a norm with a group, because other processes may wait for its sums.
        """
        norms = self.chain.norms[: j + 1]
        shared = any(norm is not None and norm.group is not None for norm in norms)
        below = self.need.norms[: j + 1] + self.need.convs[:j]
        return shared or self.need_x or any(any(needs) for needs in below)

    def through_norm(self, i: int, h: Tensor, sums: Any) -> tuple[Tensor | None, ...]:
        """(a, z, mean, b, c) of `ops.bn_act_bwd_apply` for norm i on h; stores its gradients.

        sums: Σdy and Σdy·xhat, and b and c of this process if they are computed already.
        """
        norm, affine = self.chain.all_norms[i], self.saved.affines[i]
        if norm is None:
            return (None,) * 5
        if sums is not None:
            self._store(i, norm, affine, sums[:2])
        if not norm.batch_stats:
            return affine.scale, None, None, None, None
        count = values_per_channel(h)
        if norm.group is not None:
            sums, count = sync.mean_sums(*sums[:2], affine.count, norm.group), 1
        if len(sums) > 2:
            return affine.scale, h, affine.mean, *sums[2:]
        b, c = ops.bn_bwd_finalize(*sums, affine.scale, affine.rstd, count, self.impl)
        return affine.scale, h, affine.mean, b, c

    def _store(self, i: int, norm: Norm, affine: Affine, sums: tuple[Tensor, Tensor]) -> None:
        sum_dy, sum_dy_xhat = sums
        for place, value in enumerate((sum_dy_xhat, sum_dy)):
            if self.need.norms[i][place]:
                self.norm_grads[i][place] = value.to(self.dtypes.norms[i][place])
        if i > 0 and self.need.convs[i - 1].bias:
            value = affine.scale * sum_dy
            if norm.batch_stats:  # a bias cancels in them: 0, or NaN if a term is
                value = (value + affine.scale * sum_dy_xhat) * 0.0
            self.conv_grads[i - 1][1] = value.to(self.dtypes.convs[i - 1].bias)

    def through_conv(self, i, g, g_mask, prologue, h, below, act, more, more_mask, sums):
        """dx of convolution i with input φ(h) under the norm `below`, and its sums; stores dw."""
        conv, need_dx = self.chain.all_convs[i], self.flows_below(i if i < self.n else 0)
        mean, rstd = (below.mean, below.rstd) if sums else (None, None)
        w, dtype = self.saved.weights[i], self.dtypes.convs[i].weight
        dx, dw, *found = ops.conv_bprop(
            g, w, h, g_mask, *prologue, below.scale, below.shift, mean, rstd, act, more, more_mask,
            *conv.args(), need_dx, self.need.convs[i].weight, w.dtype != dtype, self.impl,
        )  # fmt: skip
        if self.need.convs[i].weight:
            self.conv_grads[i][0] = dw
        if self.need.convs[i].bias and self.chain.all_norms[i + 1] is None:
            dz = g if g_mask is None else self.masked(g)
            value = dz.sum((0, 2, 3), dtype=stats_dtype(dz))
            self.conv_grads[i][1] = value.to(self.dtypes.convs[i].bias)
        return (dx if need_dx else None), (found if sums else None)

    def masked(self, dy: Tensor) -> Tensor:
        """dy masked by the join's ReLU, computed once."""
        if self.relu_mask is None:
            return dy
        if self.dy_masked is None:
            self.dy_masked = ops.add_relu_bwd(dy, self.relu_mask, self.impl)
        return self.dy_masked

    def run(self, dy: Tensor) -> tuple[Any, ...]:
        chain, n = self.chain, self.n
        hs, acts, affines = self.saved.hs, self.saved.acts, self.saved.affines
        x, z = hs[0], hs[n]
        given, dy = dy, dy.contiguous(memory_format=self.format)
        sums = sums_p = None
        if n > 0 and chain.relu and chain.norms[n] is None:
            dy = aten.threshold_backward(dy, z, 0).contiguous(memory_format=self.format)
        if chain.pool is not None:
            dy, sums = self.before_pool(dy, z)
        elif self.needs_sums(n) or self.needs_sums(n + 1):
            sums, sums_p = self.join_sums(dy, z)
        prologue = self.through_norm(n, z, sums)
        identity = chain.shortcut == "identity"
        dresidual = None
        if chain.shortcut == "residual" and self.need_residual:
            dresidual = self.masked(dy)

        g, g_mask = dy, self.relu_mask
        more, more_mask = None, None  # gradient that is added at the input of the first convolution
        if chain.projection is not None:
            prologue_p = self.through_norm(n + 1, self.saved.z_p, sums_p)
            more, _ = self.through_conv(
                n, dy, self.relu_mask, prologue_p, x, affines[0], acts[0], None, None,
                False,
            )  # fmt: skip
        elif identity and n and chain.norms[0] is None:
            more, more_mask = dy, self.relu_mask
        for j in reversed(range(n)):
            extra = (more, more_mask) if j == 0 else (None, None)
            g, sums = self.through_conv(
                j, g, g_mask, prologue, hs[j], affines[j], acts[j], *extra,
                self.needs_sums(j) and self.flows_below(j),
            )  # fmt: skip
            if g is None:
                break
            g_mask = None
            prologue = self.through_norm(j, hs[j], sums)
        dx = g if self.need_x else None
        if n == 0 and chain.norms[0] is None:
            dx = self.masked(dy) if self.need_x else None
        elif self.need_x and chain.norms[0] is not None:
            skip = self.masked(dy) if identity else None
            dx = ops.bn_act_bwd_apply(g, g_mask, *prologue, skip, self.impl)
        grads = [t for group in (*self.conv_grads, *self.norm_grads) for t in group]
        return (*[None] * 3, *_with_own_memory([dx, dresidual, *grads], given))

    def before_pool(self, dy: Tensor, z: Tensor) -> tuple[Tensor, Any]:
        """The gradient of the last norm's result, and its Σdy and Σdy·xhat, in one pass."""
        last, sums = self.saved.affines[self.n], self.needs_sums(self.n)
        mean, rstd = (last.mean, last.rstd) if sums else (None, None)
        fmt = memory_format(z)
        dy = dy.contiguous(memory_format=fmt)
        index = self.saved.mask.contiguous(memory_format=fmt)
        dx, total, xhat = ops.max_pool_bwd(
            dy, index, z, mean, rstd, *self.chain.pool.args(), self.impl
        )
        return dx, ((total, xhat) if sums else None)

    def join_sums(self, dy: Tensor, z: Tensor) -> tuple[Any, Any]:
        """Σdy, Σdy·xhat, b and c of the last norm and of the projection's norm, in one pass."""
        last, through = self.saved.affines[self.n :]
        dual = through.scale is not None
        total, *found = ops.bn_act_bwd_reduce(
            dy, self.relu_mask, z, last.mean, last.rstd, last.scale,
            *((self.saved.z_p, through.mean, through.rstd, through.scale) if dual else (None,) * 4),
            self.impl,
        )  # fmt: skip
        return (total, *found[:3]), ((total, *found[3:]) if dual else None)
