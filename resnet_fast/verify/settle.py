"""A point at which a network is smooth: no ReLU's input, and no race in a max-pool, close to a tie.

The gradient of a ReLU network jumps where a pre-activation crosses zero, and one value within
rounding of it, on either side, throws the gradients of a whole layer. Among the millions of a
ResNet-50 some always are. Here the biases of the normalizations are moved by a few times BAND until
none is, so that fp64, fp32 and any correct kernel agree on every sign and differ by rounding alone.
16-bit activations are too coarse for it: there they flip in the plain run and the judged one alike.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 1e-4
POOL_BAND = 4e-6
STEPS = 64

aten = torch.ops.aten


def settle(module: nn.Module, *inputs: Tensor) -> bool:
    """Move the biases of plain PyTorch `module`, as it is (mode, dtype fp64), on `inputs`.

    Every ReLU must follow a BatchNorm2d, directly or through an addition: the last one that ran
    before it is the one whose bias moves, by a multiple of BAND, kept exact in fp32.

    Returns:
        Whether every |ReLU input| is at least BAND, and the two largest values of every max-pool
        window differ by POOL_BAND; else other inputs have to be tried.
    """
    probe = copy.deepcopy(module)
    norms = [m for m in probe.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(), _Settle() as mode:
        for norm in norms:
            norm.register_forward_hook(lambda norm, *_: setattr(mode, "norm", norm))
        probe(*inputs)
    biases = {name: p for name, p in probe.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in biases:
                parameter.copy_(biases[name])
    return mode.clear


class _Settle(TorchDispatchMode):
    """Sees every ReLU and max-pool of a forward pass, and moves the ReLU's input with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm: nn.BatchNorm2d | None = None
        self.clear = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.relu.default, aten.relu_.default) and self.norm is not None:
            u = args[0]
            shift, clear = _shift(u, self.norm.bias)
            self.norm.bias.add_(shift)
            self.clear = self.clear and clear
            u = u + shift.view(1, -1, 1, 1)
            return args[0].copy_(u.relu()) if func is aten.relu_.default else u.relu()
        if func is aten.max_pool2d_with_indices.default:
            self.clear = self.clear and _decided(*args)
        return func(*args, **(kwargs or {}))


def _shift(u: Tensor, bias: Tensor) -> tuple[Tensor, bool]:
    """What to add to each channel of u [N,C,H,W], and whether all of them then keep clear of 0."""
    shift = torch.zeros_like(bias)
    open_ = torch.ones_like(bias, dtype=torch.bool)
    for step in range(STEPS):
        offset = BAND * ((step + 1) // 2) * (1 if step % 2 else -1)  # 0, +1, −1, +2, … bands
        trial = (bias + offset).float().double() - bias
        clear = (u + trial.view(1, -1, 1, 1)).abs().amin((0, 2, 3)) >= BAND
        shift = torch.where(open_ & clear, trial, shift)
        open_ &= ~clear
        if not open_.any():
            break
    return shift, not open_.any().item()


def _decided(x: Tensor, kernel, stride, padding=(0, 0), *_) -> bool:
    """Whether the winner of every max-pool window of x ≥ 0 leads by POOL_BAND, or is 0."""
    n, c = x.shape[:2]
    windows = F.unfold(x.contiguous(), kernel, padding=padding, stride=stride)
    first, second = windows.view(n, c, kernel[0] * kernel[1], -1).topk(2, dim=2).values.unbind(2)
    return ((first - second >= POOL_BAND) | (first <= 0)).all().item()
