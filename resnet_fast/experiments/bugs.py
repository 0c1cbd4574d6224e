"""Two wrong blocks that run without an error and only train worse.

ReLU before the addition: relu(F(x)) + x can only add, so values grow from block to block, and no
block can subtract what an earlier one added (He et al. 2016, arXiv:1603.05027, fig. 4c).

No normalization: with He initialization F(x) is as large as x, so the signal's variance doubles in
every block (Zhang et al. 2019, arXiv:1901.09321).

Only this experiment uses these classes: subclasses with the submodules of the right block.
"""

from __future__ import annotations

import argparse

import torch.nn.functional as F
from torch import Tensor

from .. import blocks, modules
from ..blocks import zero_pad
from ..functional import add_relu
from . import compare, nets
from .findings import Claim, Findings
from .options import add_depth

RIGHT, EARLY, BARE = "right", "ReLU before the addition", "no normalization"

ABOUT = """\
Three nets with zero-pad shortcuts; only one line of their blocks differs. Right: relu(F(x) + \
x). ReLU before the addition: relu(F(x)) + x. No normalization: relu(F(x) + x), where F is two \
convolutions with a ReLU between them.

There is no error, the shapes fit and the loss may even fall, so such a bug is easy to miss. A \
comparison with the right net shows it."""


class PlainEarlyReLU(blocks.BasicBlock):
    """y = relu(F(x)) + shortcut(x), in plain PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return h + zero_pad(x, self.stride, self.out_channels)


class FusedEarlyReLU(modules.BasicBlock):
    """The same, with F as a fused chain without a shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        h = modules.run_fused(self.parts()._replace(shortcut="none"), x, impl=self.impl)
        return h + zero_pad(x, self.stride, self.out_channels)


class PlainNoNorm(blocks.BasicBlock):
    """y = relu(conv2(relu(conv1(x))) + shortcut(x)); the block's norms are unused."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return F.relu(h + zero_pad(x, self.stride, self.out_channels))


class FusedNoNorm(modules.BasicBlock):
    """The same with the fused addition and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x)))
        return add_relu(h, zero_pad(x, self.stride, self.out_channels), impl=self.impl)


BLOCKS = {
    RIGHT: (blocks.BasicBlock, modules.BasicBlock),
    EARLY: (PlainEarlyReLU, FusedEarlyReLU),
    BARE: (PlainNoNorm, FusedNoNorm),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment bugs`."""
    add_depth(parser, 32)
    compare.add_training(parser, digits_size=8, epochs=12, repeats=2)


def run(args: argparse.Namespace) -> Findings:
    """Train the three nets."""
    data = compare.data_of(args)

    def build(name: str):
        return lambda: nets.net(
            args.depth, "zero_pad", block=BLOCKS[name][args.impl != "reference"],
            num_classes=data.num_classes, in_channels=data.channels, planes=args.planes,
            impl=args.impl,
        )  # fmt: skip

    runs = compare.compare({name: build(name) for name in BLOCKS}, data, args)
    return Findings(
        "Two mistakes", ABOUT, _claims(runs), compare.table(runs, "block"), compare.figures(runs),
        lambda figure: compare.draw_pair(figure, runs),
    )  # fmt: skip


def _claims(runs: compare.Runs) -> list[Claim]:
    loss = {name: compare.course(found, "train_loss") for name, found in runs.items()}
    right = {name: compare.last(found, "test_accuracy") for name, found in runs.items()}
    return [
        Claim(
            f"{name}: training loss, mean of all epochs, {loss[name]:.3f} (right: "
            f"{loss[RIGHT]:.3f}), test accuracy {right[name]:.1%} (right: {right[RIGHT]:.1%})",
            not loss[name] <= loss[RIGHT],  # so that NaN, of a net that diverged, counts as worse
        )
        for name in (EARLY, BARE)
    ]
