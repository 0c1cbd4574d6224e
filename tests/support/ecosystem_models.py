"""Structures that people fuse, by name: what builds each, its input, and what must run fused."""

from functools import partial
from typing import NamedTuple

import ecosystem_blocks as blocks
import ecosystem_nets as nets
import ecosystem_norms as norms
import torch
from torch import nn

from bench.executed import Counts

NONE = Counts()


class Goal(NamedTuple):
    """At most so many layers run in plain PyTorch; the executed share of the others is 1.

    training: None for a model without a training mode.
    """

    evaluation: Counts = NONE
    training: Counts | None = NONE


ALL = Goal()
PREACT = Goal(NONE, Counts(additions=2))  # after a convolution, and no norm follows


def left(convolutions=0, relus=0, additions=0):
    """A goal that leaves so many layers, in both modes."""
    most = Counts(convolutions, 0, relus, additions)
    return Goal(most, most)


def of(build, *args, **options):
    """Several of one block in a `Sequential`, which is how nets hold them."""
    return lambda: nn.Sequential(*(build(*args, **options) for _ in range(2)))


def pooled_shortcut(*pool):
    """An average pool, then a projection with its norm."""
    return nn.Sequential(nn.AvgPool2d(*pool), *norms.conv_norm(4, 4, 1, act=None))


def blurred():
    """As resnetblur's blocks: the stride is a blur after the first ReLU."""
    return blocks.Basic(between=blocks.BlurPool(4), shortcut=pooled_shortcut(2))


def averaged():
    """As resnetaa's blocks: the stride is an average after the first ReLU."""
    return blocks.Basic(between=nn.AvgPool2d(2), shortcut=pooled_shortcut(2))


def resnet_d():
    """As ResNet-D's blocks: an average pool in the shortcut."""
    return blocks.Basic(stride=2, shortcut=pooled_shortcut(2, 2, 0, True, False))


def preact():
    """A projecting block and one with an identity shortcut."""
    return nn.Sequential(blocks.NormActPreAct(4, 8, 2), blocks.NormActPreAct(8, 8))


BLOCK, IMAGE = (3, 4, 8, 8), (3, 3, 32, 32)
ECOSYSTEM = {
    "norm-act-preact": (preact, BLOCK, PREACT),
    "norm-act-regnet": (of(blocks.RegNet, stride=1), BLOCK, ALL),
    "norm-act-regnet-projection": (blocks.RegNet, BLOCK, ALL),
    "norm-act-silu": (of(blocks.SiLUBlock), BLOCK, ALL),
    "frozen-torchvision": (of(blocks.Basic, norms.Frozen), BLOCK, ALL),
    "frozen-detr": (of(blocks.Basic, norms.FrozenConstant), BLOCK, ALL),
    "frozen-detectron": (of(blocks.Basic, norms.FrozenBranch), BLOCK, ALL),
    "frozen-act": (of(blocks.FrozenUnits, norms.FrozenAct), BLOCK, ALL),
    "hugging-face": (nets.HuggingFaceNet, BLOCK, ALL),
    "conv-module": (of(blocks.OrderedBlock), BLOCK, ALL),
    "gate-before-addition": (lambda: blocks.Basic(tail=blocks.Gate(4)), BLOCK, ALL),
    "gate-in-the-middle": (
        lambda: blocks.Middle(nn.Sequential(*norms.conv_norm(4, 4), blocks.Gate(4))), BLOCK, ALL,
    ),
    "eca": (lambda: blocks.Basic(tail=blocks.ChannelAttention1d()), BLOCK, ALL),
    "cbam": (lambda: blocks.Basic(tail=blocks.ChannelAndSpace(4)), BLOCK, ALL),
    "split-attention": (lambda: blocks.Middle(blocks.SplitAttention()), BLOCK, ALL),
    "res2net": (blocks.Res2Net, BLOCK, left(additions=2)),  # of parts, read by a convolution
    "ibn": (blocks.InstanceBlock, BLOCK, left(convolutions=1, relus=1)),
    "hrnet": (nets.HighResolution, BLOCK, left(additions=1)),  # of two of three, upsampled
    "dla": (blocks.Tree, BLOCK, ALL),
    "inception": (blocks.Inception, BLOCK, ALL),
    "dense": (blocks.Dense, BLOCK, ALL),
    "drop-path": (lambda: blocks.Basic(tail=blocks.DropPath()), BLOCK, ALL),
    "drop-block": (
        lambda: blocks.Basic(drop=blocks.DropBlock()), BLOCK, Goal(NONE, Counts(relus=1)),
    ),
    "wide-dropout": (blocks.WideDropout, BLOCK, left(convolutions=1, additions=1)),
    "clip": (nets.Clip, IMAGE, ALL),
    "resnet-d": (resnet_d, BLOCK, ALL),
    "blur-pool": (blurred, BLOCK, left(convolutions=1)),  # the blur itself
    "average-pool": (averaged, BLOCK, ALL),
    "mobilenet": (of(blocks.Inverted), BLOCK, ALL),
    "repvgg": (of(blocks.Branches), BLOCK, ALL),
    "shuffle": (of(blocks.Shuffle), (3, 8, 8, 8), ALL),
    "pre-activation": (of(blocks.PreActivation), BLOCK, PREACT),
    "feature-extractor": (nets.feature_extractor, IMAGE, ALL),
    "exported": (nets.exported, (2, 3, 32, 32), Goal(NONE, None)),
    "layer-getter": (nets.layer_getter, IMAGE, ALL),
    "layer-getter-frozen": (partial(nets.layer_getter, norms.Frozen), IMAGE, ALL),
    "pyramid": (
        lambda: nets.Pyramid(nets.layer_getter()), IMAGE, left(convolutions=4, additions=1),
    ),
    "dilated": (nets.Dilated, IMAGE, left(convolutions=1)),
    "u-net": (nets.UNet, IMAGE, left(convolutions=2)),
    "shared-head": (nets.Retina, BLOCK, left(convolutions=2)),
    "shared-head-without-norms": (
        partial(nets.Retina, norms=False), BLOCK, left(convolutions=6, relus=4),
    ),
}  # fmt: skip
"""name → (what builds the model, the shape of its input, its Goal)."""


def built(name):
    """The model in fp64, with statistics and affine maps drawn, and an input for it."""
    build, shape, _ = ECOSYSTEM[name]
    model = build().double()
    for module in model.modules():
        if getattr(module, "weight", None) is None or getattr(module, "bias", None) is None:
            continue
        if hasattr(module, "running_var") or isinstance(module, nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if getattr(module, "running_var", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model, torch.randn(shape, dtype=torch.float64)
