"""The exercise of courses on residual nets: plain layers, basic blocks and bottlenecks.

`degradation --preset exercise` runs it. Net A is a chain of convolutions, net B has shortcuts (He
et al. 2015, arXiv:1512.03385). Both get deeper, to 20 layers; then bottlenecks of three layers
replace the blocks of two, and the net has 50 layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..modules import Bottleneck
from . import compare, nets
from .findings import Claim, Findings, plain_axes
from .html_page import GREY

PRESET = compare.DEFAULTS | {"digits_size": 8, "epochs": 30, "lr": 0.1, "repeats": 2}
NETS: dict[str, Callable[..., nn.Module]] = {
    "A, plain-8": partial(nets.chain, 8),
    "B, basic-14": partial(nets.net, 14, None),
    "plain-20": partial(nets.chain, 20),
    "basic-20": partial(nets.net, 20, None),
    "bottleneck-50": partial(nets.net, [5, 6, 5], None, block=Bottleneck),
}
A, B, PLAIN, BASIC, BOTTLENECK = NETS
BASIC_50 = "basic-50 (not trained)"
COLORS = dict(zip(NETS, ("#4dabf7", "#e8590c", "#4dabf7", "#e8590c", "#7048e8"), strict=True))

ABOUT = """\
Net A is a chain of 8 plain layers: 3×3 convolution, batch normalization, ReLU. Net B is a 3×3 \
convolution and three stages of two basic blocks, with projections where shapes change. Then 20 \
layers of each kind, and 50 layers in three stages of 5, 6 and 5 bottlenecks. SGD with momentum \
0.9, learning rate {lr:g} after {warmup:g} epochs of warm-up, weight decay {weight_decay:g}, \
cosine schedule, {epochs} epochs.

Plain nets have four stages of equal length: two layers each in net A, five in the net of 20. \
Each later stage starts with stride 2 and twice the channels. The plain net of 20 layers thus has \
three times the parameters of the net of 20 layers in basic blocks: if its training loss is \
higher, that is not a lack of capacity.

A bottleneck has three layers in place of two. Its 3×3 convolution works on a quarter of the \
channels, so 50 layers have fewer parameters than 50 layers in basic blocks."""


def run(args: argparse.Namespace) -> Findings:
    """Train the five nets."""
    data = compare.data_of(args)
    options = {
        "num_classes": data.num_classes, "in_channels": data.channels, "planes": args.planes,
        "impl": args.impl,
    }  # fmt: skip
    runs = compare.compare({name: partial(f, **options) for name, f in NETS.items()}, data, args)
    parameters = {name: nets.parameters(found[0].model) for name, found in runs.items()}
    parameters[BASIC_50] = nets.parameters(nets.net(50, None, **options))
    about = ABOUT.format(**vars(args) | {"warmup": compare.recipe_of(args).warmup})
    return Findings(
        "Exercise", about, _claims(runs, parameters), compare.table(runs),
        {"nets": compare.figures(runs), "parameters": parameters},
        lambda figure: _draw(figure, runs, parameters), (6.0, 5.4),
    )  # fmt: skip


def _claims(runs: compare.Runs, parameters: dict[str, int]) -> list[Claim]:
    loss = {name: compare.course(found, "train_loss") for name, found in runs.items()}
    right = {name: compare.last(found, "test_accuracy") for name, found in runs.items()}
    times = {name: count / parameters[BASIC] for name, count in parameters.items()}
    return [
        Claim(
            f"the plain net's training loss, mean of all epochs, is higher with 20 layers "
            f"({loss[PLAIN]:.3f}) than with 8 ({loss[A]:.3f})",
            loss[PLAIN] > loss[A],
        ),
        Claim(
            f"at 20 layers that of the basic blocks is lower: {loss[BASIC]:.3f}, with "
            f"{parameters[BASIC]:,} parameters for the plain net's {parameters[PLAIN]:,}",
            loss[BASIC] < loss[PLAIN],
        ),
        Claim(
            f"and their test accuracy is higher: {right[BASIC]:.1%}, the plain net "
            f"{right[PLAIN]:.1%}",
            right[BASIC] > right[PLAIN],
        ),
        Claim(
            f"50 layers of bottlenecks have {times[BOTTLENECK]:.1f} times the parameters of 20 "
            f"layers of basic blocks; 50 layers of basic blocks have {times[BASIC_50]:.1f} times",
            1 < times[BOTTLENECK] < times[BASIC_50],
        ),
    ]


def _draw(figure: Any, runs: compare.Runs, parameters: dict[str, int]) -> None:
    curves, sizes = figure.subfigures(2, 1, height_ratios=(3, 2))
    styles = {
        name: {"color": COLORS[name], "linestyle": ":" if name in (A, B) else "-"} for name in NETS
    }
    compare.draw_pair(curves, runs, styles)
    loss, accuracy = curves.axes
    loss.set_yscale("log")
    loss.get_legend().remove()
    accuracy.set_ylim(0, 102)
    bars = sizes.subplots()
    names, counts = list(parameters), [count / 1e6 for count in parameters.values()]
    drawn = bars.barh(names, counts, color=[COLORS.get(name, GREY) for name in names])
    bars.bar_label(drawn, [f" {count:.2f}" for count in counts], color=GREY, fontsize=9)
    bars.set(title="million parameters", xlim=(0, 1.1 * max(counts)))
    bars.invert_yaxis()
    plain_axes(bars)
