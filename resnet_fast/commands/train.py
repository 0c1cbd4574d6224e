"""`resnet-fast train DATA [PATH]`: train; write weights, checkpoints, metrics, curves to --out.

With several processes: `torchrun --nproc-per-node 2 -m resnet_fast train …`.
"""

from __future__ import annotations

import argparse
import sys
import time
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
from ..models.pretrained import DEFAULT, TORCHVISION
from ..runtime.optional import MissingPackage
from ..runtime.options import output_folder, whole
from ..spec.values import printable
from ..training import History, Interrupted, Recipe, checkpoint, fit, load_data
from ..training.augment import AUGMENTATIONS
from ..training.checkpoint import ModelSpec, name_of
from ..training.checks import MOST
from ..training.distributed import gathered, processes, world
from ..training.preprocessing import Preprocessing
from ..training.recipe import OPTIMIZERS, PRECISIONS, SCHEDULES, recipe_for
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

LOG_EVERY = 100
RANDAUGMENT = 9
RECIPE = """\
Defaults of cifar10 in parentheses. imagefolder has those of PyTorch's ImageNet example and of
torchvision's reference training of ResNets: 90 epochs, 256 images, SGD with lr 0.1, momentum 0.9,
weight decay 1e-4, no warm-up, a factor of 0.1 after a third and two thirds of the epochs, random
resized crops of 224 pixels, flips; the test crops 224 of 256 pixels. The incomplete last batch of
an epoch is left out. digits: 10 epochs, 32 images, lr 0.05, Nesterov momentum, warm-up 2.
synthetic: 2 epochs, 100 images, lr 0.05. adamw: lr 0.001, weight decay 0.05. lars: lr 1. muon: lr
0.001, momentum 0.95, weight decay 0.05. All three: cosine schedule, warm-up 5."""
MODELS = {"imagefolder": "resnet18"}
DEFAULT_MODEL = "cifar_resnet20"
KILLED = 128  # a shell reports a signal as this plus its number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast train`; those of the recipe are named after its attributes."""
    add_data(parser)
    add = parser.add_argument
    add_weights(parser, False, "start from these weights; a head of other classes is replaced")
    add("--pretrained", action="store_true",
        help="start from the published weights of --model (default: resnet18 for imagefolder): "
        "--weights DEFAULT")  # fmt: skip
    add("--out", type=output_folder, metavar="DIR",
        help="output folder (default: runs/DATA-MODEL)")  # fmt: skip
    add("--resume", nargs="?", const=True, default=False, metavar="FILE",
        help="continue from the last checkpoint in --out, or from FILE")  # fmt: skip
    add("--log-every", type=whole(0, MOST), metavar="N",
        help="print a line every N steps; 0 prints none (default: 0 on a terminal, else "
        f"{LOG_EVERY})")  # fmt: skip
    add_bad_images(parser)
    add_where(parser)
    recipe = parser.add_argument_group("recipe", RECIPE).add_argument
    count, real, switch = {"type": int}, {"type": float}, {"action": argparse.BooleanOptionalAction}
    magnitude = {"type": int, "nargs": "?", "const": RANDAUGMENT}
    for flag, options, metavar, what in (
        ("epochs", count, "N", "passes over the training images"),
        ("batch-size", count, "N", "images per optimizer step, over all processes"),
        ("optimizer", {"choices": OPTIMIZERS}, None, "adamw, lars and muon have an --lr of their "
         "own"),
        ("lr", real, "LR", "learning rate after the warm-up"),
        ("momentum", real, "M", "momentum of sgd, lars and muon"),
        ("nesterov", switch, None, "Nesterov momentum of sgd"),
        ("weight-decay", real, "W", "weight decay"),
        ("decay-norms", switch, None, "weight decay also for normalizations and biases"),
        ("schedule", {"choices": SCHEDULES}, None, "decay of the learning rate"),
        ("milestones", {"type": _numbers}, "SHARE,…", "of --schedule step: a factor of 0.1 after "
         "each of these shares of all epochs"),
        ("warmup", real, "EPOCHS", "epochs of linear warm-up; by default at most a fifth of "
         "--epochs"),
        ("label-smoothing", real, "SHARE", "share of the label spread over all classes"),
        ("ema", real, "DECAY", "test and save a moving average of the weights"),
        ("clip", real, "NORM", "clip the norm of the gradient to NORM"),
        ("accumulate", count, "N", "backward passes per optimizer step"),
        ("augment", {"choices": ("auto", *AUGMENTATIONS)}, None, "auto is the data set's own"),
        ("randaugment", magnitude, "0…30", "two random operations per image, of this magnitude; "
         f"without a number {RANDAUGMENT}"),
        ("random-erasing", real, "P", "probability that a rectangle of an image is erased"),
        ("mixup", real, "ALPHA", "mix pairs of images"),
        ("cutmix", real, "ALPHA", "paste rectangles of other images"),
        ("freeze", {"type": _words}, "NAME,…", "modules that are not trained, such as "
         "stem,layer1; their normalizations stay as they are"),
        ("precision", {"choices": list(PRECISIONS)}, None,
         "fp32, or autocast in bf16 or fp16 (fp16 with a gradient scaler)"),
        ("channels-last", switch, None, "memory format of model and images"),
        ("compile", switch, None, "run the model with torch.compile"),
        ("checkpointing", switch, None, "recompute residual blocks in the backward pass"),
        ("sync-bn", switch, None, "batch statistics over all processes"),
        ("deterministic", switch, None, "raise an error for nondeterministic operations"),
        ("seed", count, "N", "seed of weights, image order and augmentation"),
    ):  # fmt: skip
        named = {} if metavar is None else {"metavar": metavar}
        default = getattr(Recipe, flag.replace("-", "_"))
        text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = {"True": "yes", "False": "no", "None": "none", "": "none"}.get(text, text)
        recipe(f"--{flag}", default=None, help=f"{what} ({shown})".lstrip(), **options, **named)


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise argparse.ArgumentTypeError(f"expected names with commas, got {text!r}")
    return words


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, got {text!r}") from None


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options given; defaults are those of the data set, then those of `Recipe`."""
    asked = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    asked = {name: value for name, value in asked.items() if value is not None}
    return recipe_for(args.data, **asked)


def run(args: argparse.Namespace) -> int:
    """Train; returns 0, or 128 + the signal that stopped it."""
    recipe = recipe_of(args)
    check_where(args.impl, args.device, recipe.precision)
    if args.pretrained and args.weights is not None:
        raise ValueError("--pretrained: expected no --weights; they name other weights")
    if args.key is not None and args.weights is None:
        raise ValueError("--key: expected --weights too")
    data = load_data(args.data, args.path, size=args.size, on_bad_image=args.on_bad_image)
    torch.manual_seed(recipe.seed)
    model, spec, data, notes = _model(args, data)
    name = spec.name
    out = args.out or Path("runs", f"{args.data}-{name}")
    with processes(args.device) as device:
        if world().first:
            note_folder("train", data)
            note("train", *notes)
            _announce(data, name, model, recipe, args.impl, device)
        try:
            lines = _Lines(recipe.epochs, _log_every(args.log_every))
            history = fit(
                model, data, recipe, device=device, out=out, resume=args.resume, spec=spec,
                callbacks={"step": lines.step, "epoch": lines.epoch}, workers=args.workers,
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


def _resumed(args: argparse.Namespace, name: str) -> tuple[ModelSpec, Preprocessing] | None:
    """Model and preprocessing of the checkpoint that --resume continues from, if there is one."""
    if not args.resume:
        return None
    if args.resume is not True:
        path = Path(args.resume)
        content = checkpoint.read(path)
    else:
        out = args.out or Path("runs", f"{args.data}-{name}")
        found = checkpoint.read_last(out / "checkpoints")
        if found is None:
            return None
        path, content = found
    spec, _, preprocessing = checkpoint.about(path, content)
    if spec is None or preprocessing is None:
        return None
    if args.model not in (None, spec.name):
        raise ValueError(f"--model: {path} has {spec.name}, got {args.model}")
    return spec, preprocessing


def _model(
    args: argparse.Namespace, data: Any
) -> tuple[nn.Module, ModelSpec, Any, tuple[str, ...]]:
    """The model; how to create it again; `data` as it sees them; notes.

    The model is that of --weights, a new one, or the one of the run that is resumed: its weights
    come from the checkpoint, so those that it started from are not needed.
    """
    name = args.model or MODELS.get(args.data, DEFAULT_MODEL)
    before = _resumed(args, name)
    if before is not None:
        spec, preprocessing = before
        if args.data == "imagefolder" and args.size in (None, preprocessing.size):
            data = data.seen_by(preprocessing)
        return create_model(spec.name, impl=args.impl, **spec.options), spec, data, ()
    weights = DEFAULT if args.pretrained else args.weights
    if weights is not None:
        published = str(weights) in (DEFAULT, *TORCHVISION.get(name, ()))
        loaded = load_weights(
            weights, name if published else args.model, key=args.key, classes=data.classes,
            impl=args.impl,
        )  # fmt: skip
        if args.data == "imagefolder":
            data = data.seen_by(loaded.preprocessing.at(data.size))
        return loaded.model, loaded.spec, data, loaded.notes
    spec = ModelSpec(name, {"num_classes": data.num_classes, "in_channels": data.channels})
    return create_model(name, impl=args.impl, **spec.options), spec, data, ()


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


def _log_every(asked: int | None) -> int:
    """--log-every, or its default: a terminal has a progress bar."""
    if asked is not None:
        return asked
    return 0 if sys.stderr.isatty() else LOG_EVERY


class _Lines:
    """Prints a line every `every` steps, and one per epoch with the estimated time left."""

    def __init__(self, epochs: int, every: int) -> None:
        self.epochs, self.every = epochs, every
        self.start, self.images = time.perf_counter(), 0

    def step(self, event: Mapping[str, Any]) -> None:
        """After a step."""
        self.images += event["images"] * world().size
        if not self.every or event["step"] % self.every:
            return
        loss = event["loss"].item()  # waits for the device
        now = time.perf_counter()
        rate = self.images / max(now - self.start, 1e-9)
        print(
            f"epoch {event['epoch']}/{self.epochs}  step {event['step']}/{event['steps']}"
            f"  loss {loss:.4f}  lr {event['lr']:.4g}  {rate:.0f} images/s",
            flush=True,
        )
        self.start, self.images = now, 0

    def epoch(self, row: Mapping[str, Any]) -> None:
        """After the test of an epoch."""
        left = (self.epochs - row["epoch"]) * max(row["seconds"], 0)  # a clock may be set back
        print(
            f"epoch {row['epoch']:{len(str(self.epochs))}}/{self.epochs}"
            f"  train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}"
            f"  test loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2%}"
            f"  lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s"
            f"  {row['seconds']:.1f} s, {timedelta(seconds=round(left))} left",
            flush=True,
        )
        self.start, self.images = time.perf_counter(), 0


def _finish(history: History, out: Path, title: str) -> None:
    written = ["model.pt", "metrics.csv", "metrics.jsonl"]
    try:
        plot_curves(history, out / "curves.png", title)
        written.append("curves.png")
    except MissingPackage as error:
        print(f"no curves.png: {error}")
    last, best = history.epochs[-1], max(history.epochs, key=lambda row: row["test_accuracy"])
    kept = Path("checkpoints", f"best-{name_of(best['epoch'], 0)}")
    print(
        f"test accuracy {last['test_accuracy']:.2%}; best {best['test_accuracy']:.2%} in epoch "
        f"{best['epoch']}" + (f": {kept}" if (out / kept).exists() else "")
    )
    print(f"wrote to {printable(str(out))}: {', '.join(written)}")
