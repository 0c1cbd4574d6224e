"""Train several nets by one recipe on one data set, each with one or more seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..runtime.options import positive
from ..training import Recipe, fit, load_data
from ..training.data import DATA
from . import nets
from .findings import plain_axes

DEFAULTS = {
    "data": "digits", "digits_size": 16, "epochs": 10, "batch_size": 64, "lr": 0.05, "warmup": None,
    "weight_decay": 5e-4, "schedule": "cosine", "planes": nets.PLANES, "repeats": 1,
}  # fmt: skip
MOST_WARMUP = 2.0  # epochs


def add_training(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Options of training; `defaults` override DEFAULTS; repeats=None leaves out --repeats."""
    values = DEFAULTS | defaults
    add = parser.add_argument
    whole, real = {"type": positive(int), "metavar": "N"}, {"type": float, "metavar": "X"}
    helps = {
        "--data": ("data set", {"choices": DATA}),
        "--epochs": ("passes over the training images", whole),
        "--batch-size": ("images per optimizer step", whole),
        "--lr": ("learning rate", real),
        "--warmup": ("epochs of linear warm-up", real),
        "--weight-decay": ("weight decay", real),
        "--planes": ("channels of the first stage", whole),
        "--repeats": ("training runs of each net, with different seeds", whole),
    }
    if values["repeats"] is None:
        del helps["--repeats"]
        parser.set_defaults(repeats=1)
    for flag, (what, options) in helps.items():
        default = values[flag.lstrip("-").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        if flag == "--warmup" and default is None:
            shown = f" (default: a quarter of --epochs, at most {MOST_WARMUP:g})"
        add(flag, default=default, help=what + shown, **options)
    add("--path", type=Path, metavar="PATH", help="file or folder of cifar10 or imagefolder")
    add("--size", type=positive(int), metavar="PX",
        help=f"height and width of an image in pixels (default: {values['digits_size']} for "
        "digits, 224 for imagefolder, 32 for others)")  # fmt: skip
    parser.set_defaults(schedule=values["schedule"], digits_size=values["digits_size"])


def data_of(args: argparse.Namespace) -> Any:
    """The data set that `args` name."""
    size = args.digits_size if args.size is None and args.data == "digits" else args.size
    return load_data(args.data, args.path, size=size)


def recipe_of(args: argparse.Namespace, seed: int = 0) -> Recipe:
    """SGD with momentum and the options of `add_training`."""
    warmup = args.warmup
    if warmup is None:
        warmup = min(MOST_WARMUP, args.epochs / 4)
    return Recipe(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, warmup=warmup,
        weight_decay=args.weight_decay, schedule=args.schedule, seed=seed,
    )  # fmt: skip


@dataclass
class Trained:
    """A trained net: the model, and its metrics, one row per epoch (`History.epochs`)."""

    model: nn.Module
    rows: list[dict[str, Any]]


Runs = Mapping[str, Sequence[Trained]]


def compare(
    builders: Mapping[str, Callable[[], nn.Module]],
    data: Any,
    args: argparse.Namespace,
) -> dict[str, list[Trained]]:
    """Train the net of every builder `args.repeats` times; print one line per run.

    Runs with equal seeds see equal batches.
    """
    found: dict[str, list[Trained]] = {name: [] for name in builders}
    total = len(builders) * args.repeats * args.epochs
    with tqdm(total=total, unit="epoch", leave=False, disable=None) as bar:
        for repeat in range(args.repeats):
            seed = args.seed + repeat
            for name, build in builders.items():
                bar.set_description(name)
                torch.manual_seed(seed)
                model = build()

                def tell(row: Mapping[str, Any]) -> None:
                    bar.update()
                    bar.set_postfix_str(f"test accuracy {row['test_accuracy']:.1%}")

                history = fit(
                    model, data, recipe_of(args, seed), device=args.device,
                    callbacks={"epoch": tell},
                )  # fmt: skip
                found[name].append(Trained(model, history.epochs))
                row, seconds = history.epochs[-1], sum(row["seconds"] for row in history.epochs)
                bar.write(
                    f"{name}, seed {seed}: training loss {row['train_loss']:.4f}, "
                    f"test accuracy {row['test_accuracy']:.2%}, {seconds:.0f} s"
                )
        bar.write("")
    return found


def last(runs: Sequence[Trained], key: str) -> float:
    """`key` after the last epoch, mean over repeats."""
    return fmean(run.rows[-1][key] for run in runs)


def course(runs: Sequence[Trained], key: str) -> float:
    """`key`, mean over all epochs and repeats: low for a loss that falls early."""
    return fmean(row[key] for run in runs for row in run.rows)


def figures(runs: Runs) -> dict[str, Any]:
    """Number of parameters, and metrics per epoch and repeat, as plain values."""
    return {
        name: {"parameters": nets.parameters(repeats[0].model),
               "repeats": [run.rows for run in repeats]}
        for name, repeats in runs.items()
    }  # fmt: skip


def table(runs: Runs, head: str = "net") -> list[list[str]]:
    """Rows: name, parameters, last training loss, last test accuracy (mean, worst, best)."""
    lines = [[head, "parameters", "training loss", "test accuracy", "worst", "best"]]
    for name, repeats in runs.items():
        accuracies = [run.rows[-1]["test_accuracy"] for run in repeats]
        cells = (fmean(accuracies), min(accuracies), max(accuracies))
        lines.append([
            name, f"{nets.parameters(repeats[0].model):,}", f"{last(repeats, 'train_loss'):.4f}",
            *(f"{value:.2%}" for value in cells),
        ])  # fmt: skip
    return lines


def draw_curves(axes: Any, runs: Runs, key: str, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """`key` by epoch, one line per net: mean over repeats, with their range as a band."""
    factor = 100 if key.endswith("accuracy") else 1
    for name, repeats in runs.items():
        courses = [[factor * row[key] for row in run.rows] for run in repeats]
        columns = list(zip(*courses, strict=True))
        epochs = range(1, len(columns) + 1)
        (line,) = axes.plot(epochs, [fmean(c) for c in columns], label=name, **styles.get(name, {}))
        if len(repeats) > 1:
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_title({"train_loss": "training loss", "test_accuracy": "test accuracy, %"}[key])
    plain_axes(axes, counts=True)


def draw_pair(
    figure: Any, runs: Runs, styles: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Training loss and test accuracy by epoch, side by side."""
    for axes, key in zip(figure.subplots(1, 2), ("train_loss", "test_accuracy"), strict=True):
        draw_curves(axes, runs, key, styles or {})
