"""Moves a network to a point where rounding decides no ReLU and no max-pool.

The gradient of a ReLU network jumps where a pre-activation crosses zero. One value within rounding
of zero changes the gradients of a whole layer, and the millions of values of a ResNet-50 always
include some. Here the biases of the normalizations are moved by a few times BAND until there are
none. Then fp64, the plain run and any correct kernel agree on every sign and differ only by
rounding. In 16 bits, channels with thousands of values have no gap that is wide enough. So in whole
models signs flip in the plain run and in the tested run, and the tolerance compares their errors.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BAND = 1e-4
BAND_EPS = 4
POOL_BAND = 4e-6
STEPS = 128

aten = torch.ops.aten


def settle(module: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Move the biases of the plain fp64 `module`, in its current mode, for the fp64 `inputs`.

    Every ReLU must follow a BatchNorm2d, directly or through an addition. The bias of the last
    BatchNorm2d before the ReLU moves by a multiple of the band, exact in fp32. The band is BAND, or
    BAND_EPS·eps(dtype) if that is larger.

    Returns:
        True if every |ReLU input| is at least the band, and the two largest values of every
        max-pool window differ by at least POOL_BAND. If False, try other inputs.
    """
    band = max(BAND, BAND_EPS * torch.finfo(dtype).eps)
    probe = copy.deepcopy(module)
    norms = [m for m in probe.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(), _Settle(band) as mode:
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
    """Handles every ReLU and max-pool of a forward, and moves each ReLU's input by its norm."""

    def __init__(self, band: float) -> None:
        super().__init__()
        self.band = band
        self.norm: nn.BatchNorm2d | None = None
        self.clear = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.relu.default, aten.relu_.default) and self.norm is not None:
            u = args[0]
            shift, clear = _shift(u, self.norm.bias, self.band)
            self.norm.bias.add_(shift)
            self.clear = self.clear and clear
            u = u + shift.view(1, -1, 1, 1)
            return args[0].copy_(u.relu()) if func is aten.relu_.default else u.relu()
        if func is aten.max_pool2d_with_indices.default:
            self.clear = self.clear and decided(*args)
        return func(*args, **(kwargs or {}))


def _shift(u: Tensor, bias: Tensor, band: float) -> tuple[Tensor, bool]:
    """The shift of each channel of u [N,C,H,W], and whether all are then at least `band` from 0."""
    shift = torch.zeros_like(bias)
    left = torch.arange(bias.numel(), device=bias.device)  # channels with values too close to 0
    values = u.transpose(0, 1).flatten(1)
    for step in range(STEPS):
        offset = band * ((step + 1) // 2) * (1 if step % 2 else -1)  # 0, +1, −1, +2, … bands
        trial = (bias[left] + offset).float().double() - bias[left]
        clear = (values + trial.unsqueeze(1)).abs().amin(1) >= band
        shift[left[clear]] = trial[clear]
        left, values = left[~clear], values[~clear]
        if left.numel() == 0:
            break
    return shift, left.numel() == 0


def decided(x: Tensor, kernel, stride, padding=(0, 0), *_, lead: float = POOL_BAND) -> bool:
    """Whether the maximum of every window of x ≥ 0 is larger than the next by `lead`, or is 0."""
    n, c = x.shape[:2]
    windows = F.unfold(x.contiguous(), kernel, padding=padding, stride=stride)
    first, second = windows.view(n, c, kernel[0] * kernel[1], -1).topk(2, dim=2).values.unbind(2)
    return ((first - second >= lead) | (first <= 0)).all().item()


class Kinks(TorchDispatchMode):
    """Records the inputs of every ReLU and max-pool that runs in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.relus: list[Tensor] = []
        self.pools: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (aten.relu.default, aten.relu_.default):
            self.relus.append(args[0].detach().to(torch.float64, copy=True))
        if func is aten.max_pool2d_with_indices.default:
            self.pools.append((args[0].detach().double(), *args[1:]))
        return func(*args, **(kwargs or {}))

    @property
    def least(self) -> float:
        """The smallest |input| of a ReLU; infinite if no ReLU ran."""
        return min((u.abs().amin().item() for u in self.relus), default=float("inf"))

    def outlast(self, other: Kinks) -> bool:
        """Whether each input is further from a tie than it differs from `other`.

        other: another run of the same computation. If True, rounding decides no ReLU or max-pool.
        """
        relus = zip(self.relus, other.relus, strict=True)
        pools = zip(self.pools, other.pools, strict=True)
        clear = (u.abs() > (u - v).abs().max() for u, v in relus if u.numel())
        won = (decided(*p, lead=(p[0] - v[0]).abs().max()) for p, v in pools)
        return all(c.all() for c in clear) and all(won)
