"""Post-activation and pre-activation blocks at depth: He et al. 2016 (arXiv:1603.05027).

With normalization and ReLU before each convolution the path of the shortcuts is an identity:
x[L] = x[l] + Σ F(x[i]) (eq. 4), and the gradient reaches every block unchanged (eq. 5). In the
blocks of 2015 a ReLU follows every addition, which does not matter for few layers.
"""

from __future__ import annotations

import argparse

from ..modules import BasicBlock, PreActBasicBlock
from . import compare, nets
from .findings import Claim, Findings
from .options import depths

KINDS = {"post": BasicBlock, "pre": PreActBasicBlock}
COLORS = {"post": "#4dabf7", "pre": "#e8590c"}

ABOUT = """\
Nets of equal depth, of basic blocks with zero-pad shortcuts: post-activation (convolution, \
normalization, ReLU after the addition, as in 2015) and pre-activation (normalization and ReLU \
before the convolutions, nothing after the addition, as in 2016). The learning rate has its full \
value from the first step, without a warm-up.

In a shallow net the order hardly matters. A deep post-activation net does not train in its \
first epochs, or not at all: the paper of 2015 had to start its 110 layers with a tenth of the \
learning rate, and `--warmup 2` helps here. The pre-activation net needs no warm-up."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment preact`."""
    parser.add_argument("--depths", type=depths, default=[20, 110], metavar="N,…",
                        help="numbers of layers, each 6n + 2 (default: 20,110)")  # fmt: skip
    compare.add_training(parser, digits_size=8, planes=8, epochs=8, lr=0.1, warmup=0.0, repeats=2)


def run(args: argparse.Namespace) -> Findings:
    """Train a net of both kinds for every depth."""
    data = compare.data_of(args)

    def build(depth: int, kind: str):
        return lambda: nets.net(
            depth, "zero_pad", block=KINDS[kind], num_classes=data.num_classes,
            in_channels=data.channels, planes=args.planes, impl=args.impl,
        )  # fmt: skip

    builders = {f"{kind}-{depth}": build(depth, kind) for depth in args.depths for kind in KINDS}
    runs = compare.compare(builders, data, args)
    deep = args.depths[-1]
    styles = {
        f"{kind}-{depth}": {"color": COLORS[kind], "linestyle": "-" if depth == deep else ":"}
        for depth in args.depths for kind in KINDS
    }  # fmt: skip
    return Findings(
        "Pre-activation", ABOUT, _claims(runs, deep), compare.table(runs), compare.figures(runs),
        lambda figure: compare.draw_pair(figure, runs, styles),
    )  # fmt: skip


def _claims(runs: compare.Runs, deep: int) -> list[Claim]:
    loss = {kind: compare.course(runs[f"{kind}-{deep}"], "train_loss") for kind in KINDS}
    right = {kind: compare.last(runs[f"{kind}-{deep}"], "test_accuracy") for kind in KINDS}
    return [
        Claim(
            f"at {deep} layers the training loss, mean of all epochs, is {loss['pre']:.3f} with "
            f"pre-activation and {loss['post']:.3f} with post-activation",
            loss["pre"] < loss["post"],
        ),
        Claim(
            f"and the test accuracy is {right['pre']:.1%} with pre-activation and "
            f"{right['post']:.1%} with post-activation",
            right["pre"] > right["post"],
        ),
    ]
