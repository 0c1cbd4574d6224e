"""Residual chains beyond the blocks': what `run_chain` promises for any `Chain`."""

import dataclasses

import torch

from resnet_fast.spec.chain import Chain, Conv, ConvParams, Norm, NormParams, Pool, Tensors

C3, C3S2, C1, C1S2 = Conv((1, 1), (1, 1)), Conv((2, 2), (1, 1)), Conv(), Conv((2, 2))
GROUPED, DILATED = Conv((1, 1), (1, 1), (1, 1), 2), Conv((1, 1), (2, 2), (2, 2))
N, FROZEN = Norm(), Norm(1e-3, batch_stats=False)
POOL = Pool((3, 3), (2, 2), (1, 1))
CHANNELS = 4

CHAINS = {
    "conv-norm": Chain((C3,), (None, N)),
    "conv-frozen-residual": Chain((C3,), (None, FROZEN), True, "residual"),
    "conv-norm-linear-identity": Chain((C3,), (None, N), False, "identity"),
    "conv-relu": Chain((C3S2,), (None, None)),
    "conv-relu-residual": Chain((C3,), (None, None), True, "residual"),
    "norm-conv-relu": Chain((C3,), (N, None)),
    "conv-relu-identity": Chain((C3,), (None, None), True, "identity"),
    "conv-bare": Chain((C3S2,), (None, None), False),
    "conv-add": Chain((C3,), (None, None), False, "residual"),
    "conv-norm-pool": Chain((C3,), (None, N), pool=POOL),
    "conv-frozen-pool": Chain((C3,), (None, FROZEN), pool=POOL),
    "norm-conv-norm-pool": Chain((C3,), (N, N), pool=Pool((2, 3), (1, 2), (0, 1))),
    "norm-pool": Chain((), (N,), pool=Pool((2, 2), (2, 2))),
    "norm": Chain((), (N,)),
    "norm-identity": Chain((), (N,), True, "identity"),
    "norm-linear-residual": Chain((), (FROZEN,), False, "residual"),
    "add-relu": Chain((), (None,), True, "residual"),
    "add": Chain((), (None,), False, "residual"),
    "basic": Chain((C3, C3), (None, N, N), True, "identity"),
    "basic-projection": Chain((C3S2, C3), (None, N, N), True, "projection", C1S2, N),
    "basic-projection-linear": Chain((C3S2, C3), (None, N, N), False, "projection", C1S2, N),
    "basic-bare-projection": Chain((C3S2, C3), (None, N, N), True, "projection", C1S2),
    "basic-frozen-projection": Chain((C3S2, C3), (None, N, N), True, "projection", C1S2, FROZEN),
    "basic-mixed": Chain((C3, C3), (None, FROZEN, N), True, "identity"),
    "basic-frozen-last": Chain((C3, C3), (None, N, FROZEN), True, "identity"),
    "no-norm-between": Chain((C1, C3), (None, None, N), True, "residual"),
    "bottleneck": Chain((C1, C3, C1), (None, N, N, N), True, "identity"),
    "bottleneck-grouped": Chain((C1, GROUPED, C1), (None, N, N, N), True, "identity"),
    "bottleneck-dilated": Chain((C1, DILATED, C1), (None, N, N, N), True, "residual"),
    "preact": Chain((C3, C3), (N, N, None), False, "identity"),
    "preact-projection": Chain((C3S2, C3), (N, N, None), False, "projection", C1S2),
    "preact-residual": Chain((C1, C3, C1), (N, N, N, None), False, "residual"),
    "preact-frozen": Chain((C3, C3), (FROZEN, N, None), False, "identity"),
    "preact-relu": Chain((C3, C3), (N, N, None), True, "identity"),
    "preact-norm-last": Chain((C3, C3), (N, N, N), True, "identity"),
    "preact-norm-last-projection": Chain((C3S2, C3), (N, N, N), True, "projection", C1S2, N),
    "four-convs": Chain((C1, C3, C3, C1), (N, N, N, N, N), True, "identity"),
}


def draw(chain, layout, dtype=torch.float64, bias=False, seed=0):
    """x, residual or None, and the chain's `Tensors`, all of them leaves that want gradients.

    x is [2,4,5,4]; with `bias` every convolution has one.
    """
    torch.manual_seed(seed)

    def leaf(*shape, shift=0.0, scale=1.0):
        value = torch.randn(shape, dtype=torch.float64) * scale + shift
        value = value.to(dtype)
        if len(shape) == 4:
            value = value.contiguous(memory_format=layout)
        return value.requires_grad_()

    x = leaf(2, CHANNELS, 5, 4)
    convs, shape = [], x.shape
    for i, conv in enumerate(chain.all_convs):
        kernel = 1 if conv.padding == (0, 0) else 3
        weight = leaf(CHANNELS, CHANNELS // conv.groups, kernel, kernel, scale=0.5)
        convs.append(ConvParams(weight, leaf(CHANNELS) if bias else None))
        if i < len(chain.convs):
            sizes = [conv.output_size(shape[2 + axis], kernel, axis) for axis in (0, 1)]
            shape = (*shape[:2], *sizes)
    norms = [NormParams() if norm is None else _norm(leaf) for norm in chain.all_norms]
    if chain.pool is not None:
        shape = chain.pool.output_shape(shape)
    residual = leaf(*shape) if chain.shortcut == "residual" else None
    return x, residual, Tensors(tuple(convs), tuple(norms))


def _norm(leaf):
    mean, spread = leaf(CHANNELS, scale=0.3).detach(), leaf(CHANNELS).detach().abs() + 0.5
    return NormParams(leaf(CHANNELS, shift=1.0, scale=0.2), leaf(CHANNELS), mean, spread)


def leaves(x, residual, tensors):
    """The tensors of `draw` that want gradients, in a fixed order."""
    return [t for t in (x, residual, *tensors.flat()) if t is not None and t.requires_grad]


def rebuild(x, residual, tensors, values):
    """x, residual, tensors with `values` in the places of `leaves`."""
    values = iter(values)

    def put(t):
        return next(values) if t is not None and t.requires_grad else t

    x, residual = put(x), put(residual)
    convs = tuple(ConvParams(*map(put, conv)) for conv in tensors.convs)
    norms = tuple(NormParams(*map(put, norm)) for norm in tensors.norms)
    return x, residual, Tensors(convs, norms)


def with_options(chain, impl, keep=False):
    """`chain` under an implementation, with or without kept activations."""
    return dataclasses.replace(chain, impl=impl, keep_activations=keep)
