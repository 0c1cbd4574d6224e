"""`resnet-fast train DATA [PATH]`: a model's weights, checkpoints, metrics and curves in --out.

On several processes: `torchrun --nproc-per-node 2 -m resnet_fast train …`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models import create_model
from ..runtime.optional import MissingPackage
from ..training import History, Interrupted, Recipe, fit, load_data
from ..training.augment import AUGMENTATIONS
from ..training.checkpoint import ModelSpec
from ..training.distributed import processes, world
from ..training.recipe import PRECISIONS, SCHEDULES, recipe_for
from ..training.report import plot_curves
from .shared import add_data, add_where, check_where, model_name, refusing

MODELS = {"imagefolder": "resnet18"}
DEFAULT_MODEL = "cifar_resnet20"
KILLED = 128  # a shell's exit status of a signal is this and its number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast train`; those of the recipe bear the names of its attributes."""
    add_data(parser)
    add = parser.add_argument
    add("--model", type=model_name, metavar="NAME",
        help="default: resnet18 for folders, else cifar_resnet20")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="default: runs/DATA-MODEL")
    add("--resume", nargs="?", const=True, default=False, metavar="FILE",
        help="go on from the last checkpoint in --out, or from this one")  # fmt: skip
    add_where(parser)
    recipe = parser.add_argument_group(
        "recipe", "in brackets what cifar10 takes; other data sets have some values of their own"
    ).add_argument
    whole, real, switch = {"type": int}, {"type": float}, {"action": argparse.BooleanOptionalAction}
    for flag, options, metavar, what in (
        ("epochs", whole, "N", ""),
        ("batch-size", whole, "N", "images an optimizer step, over all processes"),
        ("lr", real, "LR", "learning rate after the warm-up"),
        ("momentum", real, "M", ""),
        ("nesterov", switch, None, ""),
        ("weight-decay", real, "W", ""),
        ("decay-norms", switch, None, "weight decay for normalizations and biases too"),
        ("schedule", {"choices": SCHEDULES}, None, ""),
        ("warmup", real, "EPOCHS", ""),
        ("label-smoothing", real, "SHARE", ""),
        ("ema", real, "DECAY", "test and keep a moving average of the weights"),
        ("clip", real, "NORM", "greatest norm of the gradient"),
        ("accumulate", whole, "N", "backward passes a step"),
        ("augment", {"choices": ("auto", *AUGMENTATIONS)}, None, ""),
        ("precision", {"choices": list(PRECISIONS)}, None, "autocast, fp16 with a scaler"),
        ("channels-last", switch, None, ""),
        ("compile", switch, None, "by torch.compile"),
        ("checkpointing", switch, None, "recompute residual blocks in the backward pass"),
        ("sync-bn", switch, None, "batch statistics over all processes"),
        ("deterministic", switch, None, "refuse operations that do not repeat"),
        ("seed", whole, "N", "of weights, order and augmentation"),
    ):  # fmt: skip
        named = {} if metavar is None else {"metavar": metavar}
        default = getattr(Recipe, flag.replace("-", "_"))
        shown = {"True": "yes", "False": "no", "None": "none"}.get(str(default), default)
        recipe(f"--{flag}", default=None, help=f"{what} ({shown})".lstrip(), **options, **named)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What was asked for, else what the data set asks for, else `Recipe`'s own."""
    asked = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    asked = {name: value for name, value in asked.items() if value is not None}
    return recipe_for(args.data, **asked)


@refusing("train")
def run(args: argparse.Namespace) -> int:
    """Train; 0, 2 where an argument or file does not fit, 128 and the signal that ended it."""
    recipe = recipe_of(args)
    check_where(args.impl, args.device, recipe.precision)
    data = load_data(args.data, args.path, size=args.size)
    name = args.model or MODELS.get(args.data, DEFAULT_MODEL)
    out = args.out or Path("runs", f"{args.data}-{name}")
    options = {"num_classes": data.num_classes, "in_channels": data.channels}
    torch.manual_seed(recipe.seed)
    model = create_model(name, impl=args.impl, **options)
    with processes(args.device) as device:
        if world().first:
            _announce(data, name, model, recipe, args.impl, device)
        try:
            history = fit(
                model, data, recipe, device=device, on_epoch=_Line(recipe.epochs), out=out,
                resume=args.resume, spec=ModelSpec(name, options), workers=args.workers,
                progress=True,
            )  # fmt: skip
        except Interrupted as stopped:
            if world().first:
                print(f"{stopped}: go on with --resume", flush=True)
            return KILLED + stopped.number
        if world().first:
            _finish(history, out, f"{name} on {data.name}")
    return 0


def _announce(data, name: str, model, recipe: Recipe, impl: str, device: torch.device) -> None:
    counts = " and ".join(f"{data.count(split)} {split}" for split in ("train", "test"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    count = world().size
    where = str(device) if count == 1 else f"{count} processes on {device.type}"
    changed = recipe.as_dict().items() - Recipe().as_dict().items() | {("epochs", recipe.epochs)}
    print(f"data    {data.name}: {counts} images, {data.num_classes} classes, {data.size} px")
    print(f"model   {name}, {millions:.2f} M parameters, impl {impl}, {where}")
    print("recipe  " + ", ".join(f"{key}={value}" for key, value in sorted(changed)))
    print(f"        resnet_fast {__version__}, PyTorch {torch.__version__}", flush=True)


class _Line:
    """Prints an epoch in a line, with the time that the rest will take."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, row: Mapping[str, Any]) -> None:
        left = timedelta(seconds=round((self.epochs - row["epoch"]) * row["seconds"]))
        print(
            f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}"
            f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}"
            f"  test loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2%}"
            f"  lr {row['lr']:.4f}  {row['images_per_second']:.0f} images/s"
            f"  {row['seconds']:.1f} s, {left} left",
            flush=True,
        )


def _finish(history: History, out: Path, title: str) -> None:
    written = ["model.pt", "metrics.csv", "metrics.jsonl"]
    try:
        plot_curves(history, out / "curves.png", title)
        written.append("curves.png")
    except MissingPackage as error:
        print(f"no curves.png: {error}")
    print(f"test accuracy {history.epochs[-1]['test_accuracy']:.2%}")
    print(f"in {out}: {', '.join(written)}")
