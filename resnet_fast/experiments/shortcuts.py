"""Kinds of shortcut: He et al. 2015 (arXiv:1512.03385, table 3), 2016 (arXiv:1603.05027, table 1).

none         a plain net
identity     x if the block keeps the shape, else nothing
A            identity; zeros in the new channels if the shape changes: no parameters
B            identity; a 1×1 projection if the shape changes
C            a projection in every block
"""

from __future__ import annotations

import argparse

from ..models import ResNet
from . import compare, nets
from .findings import Claim, Findings
from .options import add_depth

KINDS = {
    "none": "none",
    "identity": "zero_pad",
    "A: zero-pad": "zero_pad",
    "B: projection": None,
    "C: all projections": "projection",
}
NONE, IDENTITY, A, B, C = KINDS

ABOUT = """\
One net with five kinds of shortcut. None: no shortcuts. Identity: x in every block that keeps \
the shape, nothing in the two blocks that change it. A, B: as identity, but in these two blocks \
zeros in the new channels (A) or a 1×1 projection (B). C: projections in every block.

What matters is to have shortcuts. Zeros or a projection in the two blocks that change the shape \
make little difference; B became usual. Projections in every block have more parameters and \
train worse, since no block passes x on unchanged. (The paper of 2015 found C a little better \
than B on ImageNet, at 34 layers; the one of 2016 found 1×1 convolutions on the shortcuts of \
110 layers much worse than the identity.)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment shortcuts`."""
    add_depth(parser, 32)
    compare.add_training(parser, digits_size=8, epochs=12, repeats=2)


def identity_only(model: ResNet) -> ResNet:
    """Remove the zero-pad shortcuts of blocks that change shapes, in place; returns `model`."""
    for module in model.modules():
        if getattr(module, "shortcut", None) == "zero_pad":
            module.shortcut = "none"
    return model


def run(args: argparse.Namespace) -> Findings:
    """Train the five nets."""
    data = compare.data_of(args)

    def build(kind: str):
        def made() -> ResNet:
            model = nets.net(
                args.depth, KINDS[kind], num_classes=data.num_classes, in_channels=data.channels,
                planes=args.planes, impl=args.impl,
            )  # fmt: skip
            return identity_only(model) if kind == IDENTITY else model

        return made

    runs = compare.compare({kind: build(kind) for kind in KINDS}, data, args)
    return Findings(
        "Shortcuts", ABOUT, _claims(runs), compare.table(runs, "shortcut"), compare.figures(runs),
        lambda figure: compare.draw_pair(figure, runs),
    )  # fmt: skip


def _claims(runs: compare.Runs) -> list[Claim]:
    loss = {kind: compare.last(found, "train_loss") for kind, found in runs.items()}
    right = {kind: compare.last(found, "test_accuracy") for kind, found in runs.items()}
    count = {kind: nets.parameters(found[0].model) for kind, found in runs.items()}
    apart, gap = abs(right[A] - right[B]), min(right[A], right[B]) - right[NONE]
    return [
        Claim(
            f"every shortcut gives a lower training loss than none ({loss[NONE]:.3f}): "
            + ", ".join(f"{kind} {loss[kind]:.3f}" for kind in KINDS if kind != NONE),
            all(loss[kind] < loss[NONE] for kind in KINDS if kind != NONE),
        ),
        Claim(
            f"A and B differ by {100 * apart:.1f} points in test accuracy; the worse of them is "
            f"{100 * gap:.1f} points above none",
            apart < gap,
        ),
        Claim(
            f"C, without identities, has a higher training loss ({loss[C]:.3f}) than A "
            f"({loss[A]:.3f}) and B ({loss[B]:.3f})",
            loss[C] > max(loss[A], loss[B]),
        ),
        Claim(
            f"A adds no parameters; B adds {count[B] - count[A]:,}, C {count[C] - count[A]:,}",
            count[NONE] == count[A] < count[B] < count[C],
        ),
    ]
