"""The gradient's size by layer: first a product of derivatives, then real nets.

On paper: a stack of layers multiplies the gradient by each layer's derivative; a shortcut around
the stack adds 1, since d(F(x) + x)/dx = dF/dx + 1 (He et al. 2016, arXiv:1603.05027, eq. 5).

In nets, before training: ‖∂L/∂w‖ of every 3×3 convolution. In a plain net batch normalization
keeps the signal's size, and the gradient grows from layer to layer in the backward pass (Yang et
al. 2019, arXiv:1902.08129). Without it the gradient shrinks. In a residual net it hardly changes.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import nets
from .findings import Claim, Findings, plain_axes
from .options import add_count, depths

LAYERS, LOW, HIGH, SEED = 18, 0.4, 0.8, 42
KINDS = {"plain": "none", "residual": "zero_pad"}

ABOUT = """\
On paper. Each layer multiplies the gradient by its derivative. With {layers} layers whose \
derivatives NumPy draws from {low} to {high} (seed {seed}) the product is {plain:.2g}: the \
gradient vanishes. One shortcut around the stack makes it 1 + {plain:.2g} = {residual:.6f}, as \
d(F(x) + x)/dx = dF/dx + 1: {ratio:.2g} times as much. A shortcut around every layer makes it \
the product of all 1 + d = {each:.3g}: it does not vanish, but if all derivatives have one sign \
it grows, so real blocks need a normalization. (This example is often quoted with 4.6e-5, \
1.000046 and 2.2e4, without a seed; the layers, the range and the seed are chosen to reproduce \
these numbers.)

In nets. The norm of the gradient of every 3×3 convolution, from the image to the classifier, \
for one batch before the first step. In a plain net with batch normalization the gradient grows \
by a factor per layer in the backward pass, so no learning rate suits all layers. Without \
normalization it shrinks in all layers at once, and the net cannot learn. In a residual net the \
first and the last layer are within a small factor of each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment gradient-flow`."""
    add = parser.add_argument
    add("--depths", type=depths, default=[8, 20, 56, 110], metavar="N,…",
        help="numbers of layers, each 6n + 2 (default: 8,20,56,110)")  # fmt: skip
    add_count(parser, "--planes", nets.PLANES, "channels of the first stage")
    add_count(parser, "--batch-size", 128, "images in the batch")


def product(
    layers: int = LAYERS, low: float = LOW, high: float = HIGH, seed: int = SEED
) -> dict[str, float]:
    """The gradient through `layers` derivatives d, drawn uniformly from [low, high).

    plain = Π d, residual = 1 + Π d (one shortcut around the stack), each = Π (1 + d) (a shortcut
    around every layer), ratio = residual / plain.
    """
    derivatives = np.random.RandomState(seed).uniform(low, high, layers)
    plain = float(np.prod(derivatives))
    residual = 1 + plain
    each = float(np.prod(1 + derivatives))
    return {"plain": plain, "residual": residual, "each": each, "ratio": residual / plain}


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """‖∂L/∂w‖ of every 3×3 convolution of `model`, in order; L is the cross-entropy of (x, y)."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    model.train()
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, [conv.weight for conv in convs])
    return [grad.norm().item() for grad in grads]


def run(args: argparse.Namespace) -> Findings:
    """Compute the product, and the norms by layer for every depth and kind of net."""
    from ..training import load_data

    data = load_data("digits")
    x = data.preprocessing.normalize(data.train_x[: args.batch_size]).to(args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = data.train_y[: args.batch_size].to(args.device)
    paper = product()
    cases = [(d, kind, norm) for d in args.depths for kind in KINDS for norm in (True, False)]
    norms: dict[str, dict[int, list[float]]] = {}
    bar = tqdm(cases, desc="gradient-flow", unit="net", leave=False, disable=None)
    for depth, kind, norm in bar:
        if not norm and kind == "residual":
            continue  # its variance doubles in every block, which `bugs` shows
        torch.manual_seed(args.seed)
        model = nets.net(
            depth, KINDS[kind], num_classes=data.num_classes, in_channels=data.channels,
            planes=args.planes, impl=args.impl,
        )  # fmt: skip
        model = (model if norm else nets.without_norms(model)).to(args.device)
        name = kind if norm else f"{kind}, no normalization"
        norms.setdefault(name, {})[depth] = gradient_norms(model, x, y)
    return Findings(
        "Gradient flow", ABOUT.format(layers=LAYERS, low=LOW, high=HIGH, seed=SEED, **paper),
        _claims(paper, norms), _table(norms), {"product": paper, "norms": norms},
        lambda figure: _draw(figure, norms), (6.0, 3.4),
    )  # fmt: skip


def _spread(values: list[float]) -> float:
    """Norm of the first layer over that of the last."""
    return values[0] / values[-1] if values[-1] else math.nan


def _claims(paper: dict[str, float], norms: dict[str, Any]) -> list[Claim]:
    deep = max(norms["plain"])
    plain, residual = (_spread(norms[kind][deep]) for kind in KINDS)
    bare = norms["plain, no normalization"]
    return [
        Claim(
            f"on paper one shortcut raises the gradient from {paper['plain']:.2g} to "
            f"{paper['residual']:.6f}, {paper['ratio']:.2g} times as much",
            paper["ratio"] > 1e4,
        ),
        Claim(
            f"at {deep} layers the first layer's gradient is {plain:.3g} times the last layer's in "
            f"a plain net, {residual:.3g} times in a residual net",
            plain > 2 * residual and residual < 100,
        ),
        Claim(
            f"without normalization the first layer's gradient is {bare[deep][0]:.2g} in a plain "
            f"net of {deep} layers, {bare[min(bare)][0]:.2g} in one of {min(bare)}",
            bare[deep][0] < bare[min(bare)][0],
        ),
    ]


def _table(norms: dict[str, Any]) -> list[list[str]]:
    lines = [["net", "layers", "first layer", "middle", "last layer", "first / last"]]
    for name, found in norms.items():
        for depth, values in found.items():
            cells = (values[0], values[len(values) // 2], values[-1], _spread(values))
            lines.append([name, str(depth), *(f"{value:.3g}" for value in cells)])
    return lines


def _draw(figure: Any, norms: dict[str, Any]) -> None:
    axes = figure.subplots(1, len(norms), sharey=True)
    for one, (name, found) in zip(axes, norms.items(), strict=True):
        for number, (depth, values) in enumerate(found.items()):
            share = number / max(len(found) - 1, 1)
            places = [i / (len(values) - 1) for i in range(len(values))]
            one.plot(
                places, values, color="#e8590c" if name == "residual" else "#4dabf7",
                alpha=0.35 + 0.65 * share, linewidth=1 + share, label=f"{depth} layers",
            )  # fmt: skip
        one.set(title=name, yscale="log")
    figure.supxlabel("place in the net, image to classifier", fontsize=10)
    axes[0].set_ylabel("‖∂L/∂w‖ of a 3×3 convolution")
    plain_axes(*axes)
