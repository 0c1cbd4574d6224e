"""Counts the layers that a call executes in plain PyTorch, and the share that runs fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable")
NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
)  # fmt: skip
RELUS = ("relu", "relu_")
ADDITIONS = ("add", "add_")


class Counts(NamedTuple):
    """Calls of PyTorch's own ops whose result is an image of more than one pixel.

    Attributes:
        convolutions: 2-D convolutions, transposed ones too.
        norms: batch norms. PyTorch computes an instance norm as the batch norm of one image.
        relus: calls of `relu` and `relu_`; ReLU6 is another op.
        additions: sums of two 4-D tensors of one shape, without a factor.
    """

    convolutions: int = 0
    norms: int = 0
    relus: int = 0
    additions: int = 0

    def within(self, most: Counts) -> bool:
        """Whether no count is larger than in `most`; norms are not compared."""
        pairs = zip(self._replace(norms=0), most, strict=True)
        return all(count <= limit for count, limit in pairs)


class Executed(TorchDispatchMode):
    """A context that counts what is executed in it, in `counts`.

    Ops of resnet_fast are opaque: what they call does not count. Neither do layers on an image of
    one pixel, such as the 1x1 convolutions of squeeze-excitation, nor layers on other dimensions.
    Call a model with at least two images: the batch norm of a single image counts as an instance
    norm.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _kind(func, args, kwargs or {}, result)
        if kind is not None:
            self.counts = self.counts._replace(**{kind: getattr(self.counts, kind) + 1})
        return result


def _kind(func: Any, args: Any, kwargs: Any, result: Any) -> str | None:
    """The field of `Counts` in which this call counts, or None."""
    namespace, _, name = func.name().partition("::")
    y = result[0] if isinstance(result, tuple | list) and result else result
    if namespace != "aten" or not isinstance(y, Tensor) or y.dim() != 4:
        return None
    if y.shape[2:].numel() < 2:
        return None
    name = name.partition(".")[0]
    if name in CONVOLUTIONS:
        return "convolutions"
    if name in NORMS:
        return "norms" if y.shape[0] > 1 else None
    if name in RELUS:
        return "relus"
    if name in ADDITIONS and kwargs.get("alpha", 1) == 1:
        shapes = [value.shape for value in args[:2] if isinstance(value, Tensor)]
        return "additions" if len(shapes) == 2 and shapes[0] == shapes[1] else None
    return None


def executed(run: Callable[[], object], *, gradients: bool) -> Counts:
    """What run() executes in plain PyTorch, with or without `gradients`."""
    with Executed() as mode, torch.set_grad_enabled(gradients):
        run()
    return mode.counts
