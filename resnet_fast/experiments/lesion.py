"""Delete or exchange blocks of a trained net: Veit et al. 2016 (arXiv:1605.06431).

n residual blocks form 2^n paths, since a path takes either the block or its shortcut. Without one
block half of the paths are left. A plain net is a single path.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any

from torch import nn
from tqdm import tqdm

from ..training import evaluate
from . import compare, nets, surgery
from .findings import Claim, Findings, plain_axes
from .nets import blocks_of
from .options import add_count, add_depth

KINDS = {"plain": "none", "residual": "zero_pad"}
COLORS = {"plain": "#4dabf7", "residual": "#e8590c"}

ABOUT = """\
A plain and a residual net of equal depth are trained by the same recipe. Then, without further \
training, blocks are deleted (replaced by the identity), one at a time or several at random. In \
the same way pairs of blocks of a stage are exchanged. Only blocks whose output has the shape of \
their input are used. The figures are test errors (shares of test images predicted wrongly), for \
random choices the mean of {draws} draws.

In the plain net every block depends on the output of the block before it, and deleting any \
block ruins the result. In the residual net a block adds a correction to its input: one missing \
block costs little, several cost more, step by step, and the order of blocks matters less than \
in a plain net."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment lesion`."""
    add_depth(parser, 32)
    add_count(parser, "--most", 8, "maximum number of blocks or pairs at once")
    add_count(parser, "--draws", 20, "random choices for each number of them")
    compare.add_training(parser, epochs=15, digits_size=8, repeats=None)


def run(args: argparse.Namespace) -> Findings:
    """Train both nets, then delete and exchange blocks and evaluate."""
    if blocks_of(args.depth) < 2:
        raise ValueError(f"depth: expected at least 14, to exchange blocks, got {args.depth}")
    data = compare.data_of(args)

    def build(kind: str):
        return lambda: nets.net(
            args.depth, KINDS[kind], num_classes=data.num_classes, in_channels=data.channels,
            planes=args.planes, impl=args.impl,
        )  # fmt: skip

    runs = compare.compare({kind: build(kind) for kind in KINDS}, data, args)
    errors = {}
    for kind, (trained,) in runs.items():
        model = trained.model

        def error(model: nn.Module = model) -> float:
            return 1 - evaluate(model, data, device=args.device).accuracy

        places, pairs = surgery.places(model), surgery.pairs(model)
        alone = [_under(surgery.deleted([place]), error) for place in places]
        errors[kind] = {
            "whole": error(),
            "alone": alone,
            "deleted": _several(surgery.deleted, places, args, error, f"{kind}: delete"),
            "exchanged": _several(surgery.exchanged, pairs, args, error, f"{kind}: exchange"),
        }
    return Findings(
        "Lesions", ABOUT.format(draws=args.draws), _claims(errors), _table(errors),
        {"errors": errors, "training": compare.figures(runs)},
        lambda figure: _draw(figure, errors), (6.0, 5.4),
    )  # fmt: skip


def _under(operation: AbstractContextManager, error: Callable[[], float]) -> float:
    with operation:
        return error()


def _several(
    operation: Callable[[Sequence[Any]], AbstractContextManager],
    choices: Sequence[Any],
    args: argparse.Namespace,
    error: Callable[[], float],
    what: str,
) -> list[float]:
    """The error with 1, 2, … random `choices` at once, each the mean of `args.draws` draws."""
    generator = random.Random(args.seed)
    means = []
    most = min(args.most, len(choices))
    for count in tqdm(range(1, most + 1), desc=what, leave=False, disable=None):
        draws = (generator.sample(choices, count) for _ in range(args.draws))
        means.append(fmean(_under(operation(chosen), error) for chosen in draws))
    return means


def _claims(errors: dict[str, Any]) -> list[Claim]:
    plain, residual = (errors[kind] for kind in KINDS)
    cost = {kind: fmean(found["alone"]) - found["whole"] for kind, found in errors.items()}
    gone = residual["deleted"]
    return [
        Claim(
            f"deleting one block adds {100 * cost['residual']:.1f} points of error in the residual "
            f"net, {100 * cost['plain']:.1f} in the plain net",
            cost["residual"] < cost["plain"] / 2,
        ),
        Claim(
            f"the residual net's error grows with the number of deleted blocks: "
            f"{residual['whole']:.1%} with none, {gone[0]:.1%} with 1, {gone[-1]:.1%} with "
            f"{len(gone)}",
            residual["whole"] < gone[0] < gone[-1],
        ),
        Claim(
            f"with two blocks exchanged it is {residual['exchanged'][0]:.1%}, the plain net's "
            f"{plain['exchanged'][0]:.1%}",
            residual["exchanged"][0] < plain["exchanged"][0],
        ),
    ]


def _table(errors: dict[str, Any]) -> list[list[str]]:
    most = max(len(found["deleted"]) for found in errors.values())
    lines = [["error", "whole", *(str(count) for count in range(1, most + 1))]]
    for what in ("deleted", "exchanged"):
        for kind, found in errors.items():
            cells = [f"{value:.1%}" for value in (found["whole"], *found[what])]
            lines.append([f"{kind}, {what}", *cells, *[""] * (most + 1 - len(cells))])
    return lines


def _draw(figure: Any, errors: dict[str, Any]) -> None:
    grid = figure.add_gridspec(2, 2)
    alone = figure.add_subplot(grid[0, :])
    deleted = figure.add_subplot(grid[1, 0], sharey=alone)
    exchanged = figure.add_subplot(grid[1, 1], sharey=alone)
    for kind, found in errors.items():
        style = {"color": COLORS[kind], "label": kind}
        alone.plot(
            range(1, len(found["alone"]) + 1), [100 * v for v in found["alone"]],
            marker="o", ms=4, linestyle="none", **style,
        )  # fmt: skip
        alone.axhline(100 * found["whole"], color=COLORS[kind], linewidth=0.8, linestyle=":")
        for axes, what in ((deleted, "deleted"), (exchanged, "exchanged")):
            values = [100 * v for v in (found["whole"], *found[what])]
            axes.plot(range(len(values)), values, marker="o", ms=4, **style)
    alone.set(title="test error, %, without one block", xlabel="which block", ylim=(0, 100))
    deleted.set(title="without several", xlabel="blocks deleted")
    exchanged.set(title="in another order", xlabel="pairs exchanged")
    plain_axes(alone, deleted, exchanged, counts=True)
