"""Activation checkpointing of residual blocks (Chen et al. 2016, arXiv:1604.06174).

Only the input of a block is stored; the backward pass runs the block again. The batch must not
count twice in the running statistics (pytorch/pytorch#96136), so the second run leaves them as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..blocks import ResidualBlock


@contextmanager
def checkpointing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within it, training stores only the inputs of the model's residual blocks.

    Raises ValueError for a model without residual blocks.
    """
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)] if enabled else []
    if enabled and not blocks:
        raise ValueError("checkpointing: expected a model with residual blocks of resnet_fast")
    for block in blocks:
        block.forward = partial(_run, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _run(block: ResidualBlock, *inputs: Tensor) -> Tensor:
    forward = partial(type(block).forward, block)
    if not block.training:
        return forward(*inputs)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(block: ResidualBlock):
    """The contexts of `torch.utils.checkpoint`: for the first run and for the second."""
    return nullcontext(), _still(block)


@contextmanager
def _still(block: ResidualBlock) -> Iterator[None]:
    """Within it, running statistics have momentum 0, and a copy of the counter is incremented.

    They are still passed to the op: autograd saves them, and must save as many tensors as before.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, counter in before:
        norm.momentum, norm.num_batches_tracked = 0.0, counter.clone()
    try:
        yield
    finally:
        for norm, momentum, counter in before:
            norm.momentum, norm.num_batches_tracked = momentum, counter
