"""Compares every fused module with every shortcut: forward, backward, statistics, inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import blocks, modules
from ..spec.layers import Parts
from .check import Runs, Setting, Trial
from .modules import MODES, compared, randomize


class _BNAct(blocks.ChainBlock):
    """relu(BN(x) + residual)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = self.bn(x)
        return F.relu(h if residual is None else h + residual)

    def parts(self) -> Parts:
        return Parts((), (self.bn,), True, "none")


class _FusedBNAct(modules.Fused, _BNAct):
    forward = modules.ConvBNAct2d.forward


class _AddReLU(blocks.ChainBlock):
    """relu(x + residual)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.relu(x if residual is None else x + residual)

    def parts(self) -> Parts:
        return Parts((), (None,), True, "none")


class _FusedAddReLU(modules.Fused, _AddReLU):
    forward = modules.ConvBNAct2d.forward


KINDS = {
    "BN+ReLU": (_FusedBNAct, _BNAct),
    "add+ReLU": (_FusedAddReLU, _AddReLU),
    **{fused.__name__: (fused, plain) for fused, plain in modules.PLAIN.items()},
}


@dataclass(frozen=True)
class Case:
    """One block: constructor arguments and options, `size` (N, H, W) of x, and its inputs."""

    kind: str
    shortcut: str
    name: str
    args: tuple[int, ...]
    size: tuple[int, int, int] = (2, 7, 5)
    options: dict[str, Any] = field(default_factory=dict)
    keep_activations: bool = False
    residual: bool = False

    @property
    def what(self) -> str:
        return f"{self.kind} {self.shortcut}".strip()

    def plain(self) -> nn.Module:
        return KINDS[self.kind][1](*self.args, **self.options)

    def fused(self, impl: str) -> nn.Module:
        keep = {"keep_activations": True} if self.keep_activations else {}
        return KINDS[self.kind][0](*self.args, **self.options, impl=impl, **keep)

    def draw(self, seed: int, exact: torch.dtype) -> list[Tensor]:
        """x, and residual if the block takes one."""
        generator = torch.Generator().manual_seed(100 + seed)
        n, h, w = self.size
        shape = (n, self.args[0] if self.args else 8, h, w)
        x = torch.randn(shape, generator=generator).to(exact).float()
        if not self.residual:
            return [x]
        with torch.no_grad():
            shape = self.plain()(x).shape
        return [x, torch.randn(shape, generator=generator).to(exact).float()]


def _residual_cases(kind: str, channels: int) -> Iterator[Case]:
    """Cases of a residual block with 8 planes and `channels` output channels."""

    def case(shortcut: str, name: str, *args: int, **more: Any) -> Case:
        options = {"shortcut": shortcut} | more.pop("options", {})
        return Case(kind, shortcut, name, args, options=options, **more)

    yield case("identity", "7x5", channels, 8)
    yield case("identity", "N=1", channels, 8, size=(1, 7, 7))
    yield case("identity", "kept activations", channels, 8, keep_activations=True)
    yield case("projection", "stride 2", 12, 8, 2)
    yield case("projection", "stride 1", 12, 8)
    yield case("projection", "kept activations", 12, 8, 2, keep_activations=True)
    yield case("projection", "dilation 2", 12, 8, options={"dilation": 2})
    if "Bottleneck" in kind:
        grouped = {"groups": 4, "base_width": 32}
        yield case("projection", "groups 4, stride 2", 16, 8, 2, options=grouped)
    yield case("zero_pad", "stride 2", 6, 8, 2)
    yield case("none", "stride 2", 12, 8, 2)
    yield case("none", "3 channels", 3, 8)


def cases() -> Iterator[Case]:
    """All cases, grouped by kind and shortcut."""
    yield Case("add+ReLU", "", "7x5", (), residual=True)
    yield Case("BN+ReLU", "", "7x5", (12,))
    yield Case("BN+ReLU", "residual", "7x5", (12,), residual=True)
    yield Case("ConvBNAct2d", "", "3x3", (8, 12, 3))
    yield Case("ConvBNAct2d", "", "7x7, stride 2, 3 channels", (3, 8, 7, 2), (1, 15, 13))
    yield Case("ConvBNAct2d", "", "groups 4, no relu", (8, 12, 3, 1, 1, 1, 4),
               options={"relu": False})  # fmt: skip
    yield Case("ConvBNAct2d", "residual", "3x3, stride 2", (8, 12, 3, 2), residual=True)
    yield from _residual_cases("BasicBlock", 8)
    yield from _residual_cases("Bottleneck", 32)
    yield from _residual_cases("PreActBasicBlock", 8)
    yield from _residual_cases("PreActBottleneck", 32)


def trials(setting: Setting, quick: bool) -> Iterator[Trial]:
    """All cases in all modes; if `quick`, the first of each kind and shortcut, in training."""
    seen: set[str] = set()
    for case in cases():
        if quick and case.what in seen:
            continue
        seen.add(case.what)
        for mode in ("train",) if quick else MODES:
            yield Trial(
                "blocks", case.what, f"{case.name}, {mode}", setting, _prepare(case, setting, mode)
            )


def _prepare(case: Case, setting: Setting, mode: str) -> Callable[[], Runs]:
    def prepare() -> Runs:
        generator = torch.Generator().manual_seed(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            plain = case.plain()
        randomize(plain, generator)
        return compared(
            setting, plain, lambda: case.fused(setting.impl),
            lambda seed: case.draw(seed, setting.exact_dtype), mode,
        )  # fmt: skip

    return prepare
