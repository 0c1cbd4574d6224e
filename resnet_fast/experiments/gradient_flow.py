"""The gradient's size: first through one block in NumPy, then by layer in real nets.

One block: F multiplies the gradient by its Jacobian; a shortcut adds the gradient itself, since
d(F(x) + x)/dx = dF/dx + 1 (He et al. 2016, arXiv:1603.05027, eq. 5).

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

CHANNELS, STD, SEED = 8, 0.01, 0
KINDS = {"plain": "none", "residual": "zero_pad"}

ABOUT = """\
One block, in NumPy: F(x) = W2·relu(W1·x), where W1 and W2 are {channels}×{channels} with values \
from N(0, {std}²): F is near zero. The gradient of the output is 1 in every channel. Back \
through F its norm is {plain:.6f}: many such layers make it vanish. Back through F(x) + x it is \
{residual:.6f}, {ratio:.1f} times as much: d(F(x) + x)/dx = dF/dx + 1, so the shortcut passes the \
gradient on, whose norm is √{channels} = {upstream:.6f}.

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


def toy_block(seed: int = SEED) -> dict[str, float]:
    """‖∂L/∂x‖ of y = F(x) and of y = F(x) + x, where F(x) = W2·relu(W1·x) and ∂L/∂y = 1.

    W1 and W2 [8,8] have values from N(0, 0.01²) and x [8] from N(0, 1), drawn in this order from
    `numpy.random.default_rng(seed)`.

    plain = ‖g‖ with g = W1ᵀ·((W1·x > 0) ⊙ W2ᵀ·1), residual = ‖g + 1‖, upstream = ‖1‖ = √8,
    ratio = residual / plain.
    """
    rng = np.random.default_rng(seed)
    w1, w2 = rng.normal(0, STD, (2, CHANNELS, CHANNELS))
    x, dy = rng.normal(0, 1, CHANNELS), np.ones(CHANNELS)
    dx = w1.T @ ((w1 @ x > 0) * (w2.T @ dy))
    plain, residual, upstream = (float(np.linalg.norm(v)) for v in (dx, dx + dy, dy))
    return {"plain": plain, "residual": residual, "upstream": upstream, "ratio": residual / plain}


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    """‖∂L/∂w‖ of every 3×3 convolution of `model`, in order; L is the cross-entropy of (x, y)."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    model.train()
    loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, [conv.weight for conv in convs])
    return [grad.norm().item() for grad in grads]


def run(args: argparse.Namespace) -> Findings:
    """Compute the norms of the toy block, and those by layer for every depth and kind of net."""
    from ..training import load_data

    data = load_data("digits")
    x = data.preprocessing.normalize(data.train_x[: args.batch_size]).to(args.device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = data.train_y[: args.batch_size].to(args.device)
    toy = toy_block()
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
        "Gradient flow", ABOUT.format(channels=CHANNELS, std=STD, **toy),
        _claims(toy, norms), _table(norms), {"toy_block": toy, "norms": norms},
        lambda figure: _draw(figure, norms), (6.0, 3.4),
    )  # fmt: skip


def _spread(values: list[float]) -> float:
    """Norm of the first layer over that of the last."""
    return values[0] / values[-1] if values[-1] else math.nan


def _claims(toy: dict[str, float], norms: dict[str, Any]) -> list[Claim]:
    deep = max(norms["plain"])
    plain, residual = (_spread(norms[kind][deep]) for kind in KINDS)
    bare = norms["plain, no normalization"]
    claims = [
        Claim(
            f"in one block in NumPy the shortcut raises the gradient's norm from "
            f"{toy['plain']:.6f} to {toy['residual']:.6f}, {toy['ratio']:.1f} times as much",
            math.isclose(toy["residual"], toy["upstream"], rel_tol=1e-3) and toy["ratio"] > 1e3,
        ),
        Claim(
            f"at {deep} layers the first layer's gradient is {plain:.3g} times the last layer's in "
            f"a plain net, {residual:.3g} times in a residual net",
            plain > 2 * residual and residual < 100,
        ),
    ]
    if len(bare) == 1:
        return claims
    return [
        *claims,
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
