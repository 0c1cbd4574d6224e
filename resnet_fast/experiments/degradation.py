"""Plain and residual nets by depth: He et al. 2015 (arXiv:1512.03385, sections 1 and 4.2).

A deeper net could copy a shallower one and make the other layers identities, so its training loss
need not be higher. In plain nets it is higher. In residual nets, where a block with F = 0 is the
identity, it is not.
"""

from __future__ import annotations

import argparse
from typing import Any

from . import compare, exercise, nets
from .findings import Claim, Findings, plain_axes
from .options import depths

KINDS = {"plain": "none", "residual": "zero_pad"}
SMALL = compare.DEFAULTS | {"epochs": 20, "depths": [8, 20, 32, 56]}
PAPER = SMALL | {
    "data": "cifar10", "depths": [20, 32, 44, 56, 110], "epochs": 164, "batch_size": 128,
    "lr": 0.1, "warmup": 1.0, "weight_decay": 1e-4, "schedule": "step",
}  # fmt: skip
PRESETS = {"small": SMALL, "paper": PAPER, "exercise": exercise.PRESET}

ABOUT = """\
The same recipe for every net: a 3×3 stem and three stages of n blocks of two convolutions with \
batch normalization, with and without a shortcut around each block (option A: no parameters). \
Plain and residual nets of equal depth have equally many parameters, start from the same values \
and see the same batches.

Look at the training loss: with overfitting, the deep plain nets would have a low one. They have \
a high one. They could represent a copy of the shallow net, but gradient descent does not find \
it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment degradation`."""
    shown = ",".join(map(str, SMALL["depths"]))
    parser.add_argument("--depths", type=depths, metavar="N,…",
                        help=f"numbers of layers, each 6n + 2 (default: {shown})")  # fmt: skip
    compare.add_training(parser, **SMALL)
    parser.add_argument(
        "--preset", choices=PRESETS, default="small",
        help="small: the defaults shown here; paper: CIFAR-10 (needs --path), 20 to 110 layers, "
        "164 epochs; exercise: 8 and 20 plain layers, 14 and 20 layers in basic blocks, 50 in "
        "bottlenecks, 30 epochs (default: small)",
    )  # fmt: skip
    parser.set_defaults(**dict.fromkeys(SMALL))  # `run` fills in those of the preset


def run(args: argparse.Namespace) -> Findings:
    """Train a plain and a residual net of every depth, or the nets of the exercise."""
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.preset == "exercise":
        if vars(args).pop("depths") is not None:
            raise ValueError("depths: --preset exercise has depths of its own; omit --depths")
        return exercise.run(args)
    data = compare.data_of(args)

    def build(depth: int, kind: str):
        return lambda: nets.net(
            depth, KINDS[kind], num_classes=data.num_classes, in_channels=data.channels,
            planes=args.planes, impl=args.impl,
        )  # fmt: skip

    builders = {f"{kind}-{depth}": build(depth, kind) for depth in args.depths for kind in KINDS}
    runs = compare.compare(builders, data, args)
    return Findings(
        "Degradation", ABOUT, _claims(runs, args.depths), compare.table(runs),
        compare.figures(runs), lambda figure: _draw(figure, runs, args.depths), (6.0, 5.4),
    )  # fmt: skip


def _claims(runs: compare.Runs, layers: list[int]) -> list[Claim]:
    shallow, deep = layers[0], layers[-1]
    loss = {name: compare.last(found, "train_loss") for name, found in runs.items()}
    right = {name: compare.last(found, "test_accuracy") for name, found in runs.items()}
    plain, residual = f"plain-{deep}", f"residual-{deep}"
    claims = [
        Claim(
            f"at {deep} layers the residual net has the lower training loss: {loss[residual]:.3f}",
            loss[residual] < loss[plain],
        ),
        Claim(
            f"and the higher test accuracy: {right[residual]:.1%}, the plain net "
            f"{right[plain]:.1%}",
            right[residual] > right[plain],
        ),
    ]
    if shallow == deep:
        return claims
    gained = {kind: right[f"{kind}-{deep}"] - right[f"{kind}-{shallow}"] for kind in KINDS}
    return [
        Claim(
            f"the plain net's training loss is higher with {deep} layers ({loss[plain]:.3f}) than "
            f"with {shallow} ({loss[f'plain-{shallow}']:.3f})",
            loss[plain] > loss[f"plain-{shallow}"],
        ),
        *claims,
        Claim(
            f"from {shallow} to {deep} layers the residual net's accuracy changes by "
            f"{100 * gained['residual']:+.1f} points, the plain net's by "
            f"{100 * gained['plain']:+.1f}",
            gained["residual"] > gained["plain"],
        ),
    ]


def _draw(figure: Any, runs: compare.Runs, layers: list[int]) -> None:
    from matplotlib import colormaps

    grid = figure.add_gridspec(2, 2)
    axes = [figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :])]
    count = max(len(layers) - 1, 1)
    shades = [colormaps["viridis"](0.15 + 0.7 * i / count) for i in range(len(layers))]
    top = 0.0
    for one, kind in zip(axes, KINDS, strict=False):
        mine = {name: found for name, found in runs.items() if name.startswith(kind)}
        styles = {f"{kind}-{d}": {"color": c} for d, c in zip(layers, shades, strict=True)}
        compare.draw_curves(one, mine, "train_loss", styles)
        one.set_title(f"training loss, {kind}", fontsize=10.5)
        top = max(top, one.get_ylim()[1])
    for one in axes[:2]:
        one.set_ylim(0, top)
    for kind, color in zip(KINDS, ("#4dabf7", "#e8590c"), strict=True):
        values = [100 * compare.last(runs[f"{kind}-{d}"], "test_accuracy") for d in layers]
        axes[2].plot(layers, values, marker="o", color=color, label=kind)
    axes[2].set(title="test accuracy, %, after the last epoch", xlabel="layers", xticks=layers)
    axes[2].set_ylim(0, 102)
    plain_axes(axes[2])
