"""`resnet-fast train DATA [PATH]`: train; write weights, checkpoints, metrics, curves to --out.

With several processes: `torchrun --nproc-per-node 2 -m resnet_fast train …`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..dispatch import backends
from ..models import create_model
from ..runtime.optional import MissingPackage
from ..runtime.options import output_folder
from ..spec.values import printable
from ..training import History, Interrupted, Recipe, fit, load_data
from ..training.augment import AUGMENTATIONS
from ..training.checkpoint import ModelSpec
from ..training.distributed import gathered, processes, world
from ..training.recipe import PRECISIONS, SCHEDULES, recipe_for
from ..training.report import plot_curves
from ..training.weights import load_weights
from .shared import (
    add_bad_images,
    add_data,
    add_weights,
    add_where,
    check_where,
    note,
    note_folder,
    note_unreadable,
)  # fmt: skip

MODELS = {"imagefolder": "resnet18"}
DEFAULT_MODEL = "cifar_resnet20"
KILLED = 128  # a shell reports a signal as this plus its number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast train`; those of the recipe are named after its attributes."""
    add_data(parser)
    add = parser.add_argument
    add_weights(parser, False, "start from these weights; a head of other classes is replaced")
    add("--out", type=output_folder, metavar="DIR",
        help="output folder (default: runs/DATA-MODEL)")  # fmt: skip
    add("--resume", nargs="?", const=True, default=False, metavar="FILE",
        help="continue from the last checkpoint in --out, or from FILE")  # fmt: skip
    add_bad_images(parser)
    add_where(parser)
    recipe = parser.add_argument_group(
        "recipe", "defaults of cifar10 in parentheses; other data sets change some of them"
    ).add_argument
    whole, real, switch = {"type": int}, {"type": float}, {"action": argparse.BooleanOptionalAction}
    for flag, options, metavar, what in (
        ("epochs", whole, "N", "passes over the training images"),
        ("batch-size", whole, "N", "images per optimizer step, over all processes"),
        ("lr", real, "LR", "learning rate after the warm-up"),
        ("momentum", real, "M", "momentum of SGD"),
        ("nesterov", switch, None, "Nesterov momentum"),
        ("weight-decay", real, "W", "weight decay of SGD"),
        ("decay-norms", switch, None, "weight decay also for normalizations and biases"),
        ("schedule", {"choices": SCHEDULES}, None, "decay of the learning rate"),
        ("warmup", real, "EPOCHS", "epochs of linear warm-up; by default at most a fifth of "
         "--epochs"),
        ("label-smoothing", real, "SHARE", "share of the label spread over all classes"),
        ("ema", real, "DECAY", "test and save a moving average of the weights"),
        ("clip", real, "NORM", "clip the norm of the gradient to NORM"),
        ("accumulate", whole, "N", "backward passes per optimizer step"),
        ("augment", {"choices": ("auto", *AUGMENTATIONS)}, None, "auto is the data set's own"),
        ("precision", {"choices": list(PRECISIONS)}, None,
         "fp32, or autocast in bf16 or fp16 (fp16 with a gradient scaler)"),
        ("channels-last", switch, None, "memory format of model and images"),
        ("compile", switch, None, "run the model with torch.compile"),
        ("checkpointing", switch, None, "recompute residual blocks in the backward pass"),
        ("sync-bn", switch, None, "batch statistics over all processes"),
        ("deterministic", switch, None, "raise an error for nondeterministic operations"),
        ("seed", whole, "N", "seed of weights, image order and augmentation"),
    ):  # fmt: skip
        named = {} if metavar is None else {"metavar": metavar}
        default = getattr(Recipe, flag.replace("-", "_"))
        shown = {"True": "yes", "False": "no", "None": "none"}.get(str(default), default)
        recipe(f"--{flag}", default=None, help=f"{what} ({shown})".lstrip(), **options, **named)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options given; defaults are those of the data set, then those of `Recipe`."""
    asked = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    asked = {name: value for name, value in asked.items() if value is not None}
    return recipe_for(args.data, **asked)


def run(args: argparse.Namespace) -> int:
    """Train; returns 0, or 128 + the signal that stopped it."""
    recipe = recipe_of(args)
    check_where(args.impl, args.device, recipe.precision)
    if args.key is not None and args.weights is None:
        raise ValueError("--key: expected --weights too")
    data = load_data(args.data, args.path, size=args.size, on_bad_image=args.on_bad_image)
    torch.manual_seed(recipe.seed)
    model, spec, notes = _model(args, data)
    name = spec.name
    out = args.out or Path("runs", f"{args.data}-{name}")
    with processes(args.device) as device:
        if world().first:
            note_folder("train", data)
            note("train", *notes)
            _announce(data, name, model, recipe, args.impl, device)
        try:
            history = fit(
                model, data, recipe, device=device, on_epoch=_Line(recipe.epochs), out=out,
                resume=args.resume, spec=spec, workers=args.workers,
                progress=True,
            )  # fmt: skip
        except Interrupted as stopped:
            if world().first:
                print(f"{stopped}; continue with --resume", flush=True)
            return KILLED + stopped.number
        parts = gathered(getattr(data, "unreadable", {}))
        if world().first:
            note_unreadable("train", {path: why for part in parts for path, why in part.items()})
            _finish(history, out, f"{name} on {data.name}")
    return 0


def _model(
    args: argparse.Namespace, data: Any
) -> tuple[nn.Module, ModelSpec, tuple[str, ...]]:
    """A new model, or that of --weights; how to create it again; notes on the file."""
    if args.weights is not None:
        loaded = load_weights(
            args.weights, args.model, key=args.key, classes=data.classes, impl=args.impl
        )
        return loaded.model, loaded.spec, loaded.notes
    name = args.model or MODELS.get(args.data, DEFAULT_MODEL)
    spec = ModelSpec(name, {"num_classes": data.num_classes, "in_channels": data.channels})
    return create_model(name, impl=args.impl, **spec.options), spec, ()


def _announce(data, name: str, model, recipe: Recipe, impl: str, device: torch.device) -> None:
    counts = " and ".join(f"{data.count(split)} {split}" for split in ("train", "test"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    count = world().size
    where = str(device) if count == 1 else f"{count} processes on {device.type}"
    changed = recipe.as_dict().items() - Recipe().as_dict().items() | {("epochs", recipe.epochs)}
    print(f"data    {data.name}: {counts} images, {data.num_classes} classes, {data.size} px")
    runs = _runs(impl, device.type, recipe)
    print(f"model   {name}, {millions:.2f} M parameters, {runs}, {where}")
    print("recipe  " + ", ".join(f"{key}={value}" for key, value in sorted(changed)))
    print(f"        resnet_fast {__version__}, PyTorch {torch.__version__}", flush=True)


def _runs(impl: str, device: str, recipe: Recipe) -> str:
    """The implementation that runs the fused blocks; for plain PyTorch by "auto", also why."""
    where = device, PRECISIONS[recipe.precision]
    chosen = backends.chosen("bn_act", impl, *where)
    if chosen != "reference" or impl == "reference":
        return f"impl {chosen}"
    return f"impl reference, plain PyTorch ({backends.refusal('native', 'bn_act', *where)})"


class _Line:
    """Prints one line per epoch, with the estimated time left."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, row: Mapping[str, Any]) -> None:
        left = (self.epochs - row["epoch"]) * max(row["seconds"], 0)  # a clock may be set back
        print(
            f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}"
            f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}"
            f"  test loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2%}"
            f"  lr {row['lr']:.4f}  {row['images_per_second']:.0f} images/s"
            f"  {row['seconds']:.1f} s, {timedelta(seconds=round(left))} left",
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
    print(f"wrote to {printable(str(out))}: {', '.join(written)}")
