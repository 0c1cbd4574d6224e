"""Whole models: a training step, the updated running statistics, and inference with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..blocks import ResidualBlock
from .check import GRADIENT, Runs, Setting, Trial
from .modules import compared, randomize

SMALL = "cifar_resnet20"
BATCH = 4
CLASSES = 100  # enough logits for a stable maximum error
IMAGE_SIZES = {"imagenet": 64, "cifar": 16}
BRANCH = 0.25


def trials(setting: Setting, name: str) -> Iterator[Trial]:
    """The trial of model `name`; `group` assigns its checks to table rows."""
    yield Trial("models", name, "train, infer", setting, _prepare(name, setting), group)


def group(tensor: str) -> str:
    """The table row of a tensor."""
    if tensor == GRADIENT + "x":
        return "input gradient"
    if tensor.startswith(GRADIENT):
        return "parameter gradients"
    return {"y": "forward", "infer y": "inference"}.get(tensor, "running statistics")


def plain_model(name: str) -> nn.Module:
    """Model `name` in plain PyTorch, from a fixed seed, in a state that reveals errors.

    Normalizations get random vectors, and each residual branch is scaled by BRANCH. Without that,
    every block of a newly initialized network amplifies errors; in a deep one, rounding then hides
    any other error. Running statistics are those of a batch of noise.
    """
    from .. import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = models.create_model(name, fused=False, num_classes=CLASSES)
    randomize(plain, torch.Generator().manual_seed(1))
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for block in plain.modules():
            if isinstance(block, ResidualBlock) and block.shortcut != "none":
                last = "conv" if block.preactivation else "bn"
                getattr(block, f"{last}{block.depth}").weight.mul_(BRANCH)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        plain.train()(_noise(plain, 2 * BATCH, 99))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return plain


def _noise(plain: nn.Module, batch: int, seed: int) -> Tensor:
    size = IMAGE_SIZES["cifar" if isinstance(plain.maxpool, nn.Identity) else "imagenet"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, plain.conv1.in_channels, size, size, generator=generator)


def _prepare(name: str, setting: Setting) -> Callable[[], Runs]:
    def prepare() -> Runs:
        from .. import models

        plain = plain_model(name)

        def draw(seed: int) -> list[Tensor]:
            return [_noise(plain, BATCH, seed).to(setting.exact_dtype).float()]

        def fused() -> nn.Module:
            return models.create_model(name, num_classes=CLASSES, impl=setting.impl)

        return compared(setting, plain, fused, draw, "train, infer", settled=not setting.narrow)

    return prepare
