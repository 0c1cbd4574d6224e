"""Delete or exchange blocks of a trained net: Veit et al. 2016 (arXiv:1605.06431).

n residual blocks are 2^n paths, since each may be passed by its shortcut; without one of them half
of the paths are left. A plain net is a single path.
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
A plain and a residual net of equal depth are trained by the same recipe. Then, without any \
further training, blocks are deleted (the identity stands in their place), each one alone and \
several at random; and pairs of blocks of a stage are exchanged. Only blocks that keep shapes \
take part. The figures are the share of test images read wrong, the mean of {draws} draws.

In the plain net every block reads what the one before it wrote, and without any one of them all \
is lost. In the residual net a block adds a correction to what passes it by: a missing one costs \
a little, several cost more, step by step, and even their order matters less than one would \
think."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment lesion`."""
    add_depth(parser, 32)
    add_count(parser, "--most", 8, "blocks that go at once, at most")
    add_count(parser, "--draws", 20, "random choices of them")
    compare.add_training(parser, epochs=15, digits_size=8, repeats=None)


def run(args: argparse.Namespace) -> Findings:
    """Train both nets, then operate on them."""
    if blocks_of(args.depth) < 2:
        raise ValueError(f"depth: {args.depth} layers have no two blocks to exchange")
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
        lambda figure: _draw(figure, errors), (10.5, 3.6),
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
    """The mean error under 1, 2, … of `choices` at once, drawn `args.draws` times each."""
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
            f"one block less costs a residual net {100 * cost['residual']:.1f} points of error, a "
            f"plain net {100 * cost['plain']:.1f}",
            cost["residual"] < cost["plain"] / 2,
        ),
        Claim(
            f"a residual net's error grows with the number of blocks that go: "
            f"{residual['whole']:.1%} with none, {gone[0]:.1%} with 1, {gone[-1]:.1%} with "
            f"{len(gone)}",
            residual["whole"] < gone[0] < gone[-1],
        ),
        Claim(
            f"with two blocks exchanged it is {residual['exchanged'][0]:.1%}, a plain net's "
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
    alone, deleted, exchanged = figure.subplots(1, 3, sharey=True)
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
