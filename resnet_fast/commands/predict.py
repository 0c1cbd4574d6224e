"""`resnet-fast predict IMAGE… [--weights FILE]`: the most probable classes of each image."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.pretrained import DEFAULT
from ..runtime.options import whole
from ..spec.values import printable
from ..training.checks import MOST
from ..training.evaluation import as_input, at_least_fp32, autocast
from ..training.images import Skipped, images_in
from ..training.loader import How, Loader
from ..training.preprocessing import MOST_SIZE
from ..training.recipe import PRECISIONS
from ..training.weights import Loaded, load_weights, read_names
from .shared import add_weights, add_where, check_where, note

FAILED = 1
COLUMNS = ("image", "rank", "class", "name", "probability")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast predict`."""
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE",
        help="image file, or folder of images and folders")  # fmt: skip
    add_weights(parser, False, "file of resnet-fast train, or of torch.save or safetensors with a "
        "ResNet's weights (preprocessing is then ImageNet's; default: DEFAULT)")  # fmt: skip
    parser.set_defaults(weights=Path(DEFAULT))
    add("--classes", type=Path, metavar="FILE",
        help="text file of class names, one per line (default: those in the weights, else "
        "numbers)")  # fmt: skip
    add("--size", type=whole(1, MOST_SIZE), metavar="PX",
        help="input height and width in pixels (default: as trained; else 224)")  # fmt: skip
    add("--topk", "--top", dest="top", type=whole(1, MOST), default=5, metavar="N",
        help="classes to print per image (default: 5)")  # fmt: skip
    add("--batch-size", type=whole(1, MOST), default=32, metavar="N",
        help="images per forward pass (default: 32)")  # fmt: skip
    add("--precision", choices=list(PRECISIONS), default="fp32",
        help="fp32, or autocast in bf16 or fp16 (default: fp32)")  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON array instead of a table")
    form.add_argument("--csv", action="store_true",
        help=f"print lines of {', '.join(COLUMNS)}")  # fmt: skip
    add_where(parser)


def run(args: argparse.Namespace) -> int:
    """Predict and print; returns 0, or 1 if an image cannot be read."""
    check_where(args.impl, args.device, args.precision)
    files, skipped = _files(args.images)
    loaded = load_weights(
        args.weights, args.model, key=args.key, impl=args.impl, device=args.device
    )
    names = loaded.classes if args.classes is None else read_names(args.classes)
    outputs = loaded.model.fc.out_features
    if names is not None and len(names) != outputs:
        raise ValueError(
            f"classes: {args.classes} has {len(names)} names; expected {outputs}, one per class of "
            f"{args.weights}"
        )
    note("predict", *loaded.notes)
    if skipped:
        note("predict", f"skipped in folders ({skipped})")
    unreadable: dict[str, str] = {}
    show = _json if args.json else _csv if args.csv else _text
    show(predictions(args, files, loaded, names, unreadable))
    note("predict", *(f"error: {why}" for why in unreadable.values()))
    return FAILED if unreadable else 0


def _files(paths: Sequence[Path]) -> tuple[list[Path], Skipped]:
    """The images that `paths` name: files as they are, and all images in folders."""
    files, skipped = [], Skipped()
    for path in paths:
        if path.is_dir():
            found = images_in(path, skipped)
            if not found:
                raise ValueError(f"{path}: no images in this folder")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return files, skipped


@torch.inference_mode()
def predictions(
    args: argparse.Namespace, files: Sequence[Path], loaded: Loaded, names: Sequence[str] | None,
    unreadable: dict[str, str],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """For every image its path and its `args.top` most probable classes (softmax).

    Images that cannot be read are added to `unreadable`.
    """
    device, model = torch.device(args.device), loaded.model
    preprocessing = loaded.preprocessing
    if args.size is not None:
        preprocessing = preprocessing.at(args.size)
    images = list(enumerate(files))
    batches = (
        images[i : i + args.batch_size] for i in range(0, len(images), args.batch_size)
    )
    workers = args.workers if len(files) > args.batch_size else 0  # they take longer to start
    for batch in Loader().read(batches, How(preprocessing), workers=workers):
        unreadable.update(batch.unreadable)
        if not len(batch.x):
            continue
        x = as_input(batch.x.to(device), preprocessing, model)
        with autocast(device, args.precision):
            logits = model(x)
        shares = at_least_fp32(logits).softmax(1)
        for place, row in zip(batch.places.tolist(), shares, strict=True):
            values, labels = row.topk(min(args.top, len(row)))
            top = [
                {"class": label, "name": str(label) if names is None else names[label],
                 "probability": value}
                for label, value in zip(labels.tolist(), values.tolist(), strict=True)
            ]  # fmt: skip
            yield {"image": str(files[place]), "top": top}


def _text(found: Iterable[dict[str, Any]]) -> None:
    """One paragraph per image."""
    for number, one in enumerate(found):
        lines = [f"{row['probability']:9.2%}  {printable(row['name'])}" for row in one["top"]]
        print(*([""] if number else []), printable(one["image"]), *lines, sep="\n", flush=True)


def _json(found: Iterable[dict[str, Any]]) -> None:
    print(json.dumps(list(found), indent=1))


def _csv(found: Iterable[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for one, (rank, row) in itertools.chain.from_iterable(
        zip(itertools.repeat(one), enumerate(one["top"], 1)) for one in found
    ):
        text = printable(one["image"]), rank, row["class"], printable(row["name"])
        writer.writerow([*text, row["probability"]])
