"""`resnet-fast eval DATA [PATH] --weights FILE`: top-1, top-5, per-class figures, confusion."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from typing import Any

from ..models.imagenet_classes import same_classes
from ..runtime.options import whole
from ..spec.values import printable
from ..training import Evaluation, evaluate, load_data
from ..training.checks import MOST, SPLITS
from ..training.recipe import PRECISIONS
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

MATRIX_UP_TO = 20  # a matrix with more columns does not fit a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast eval`."""
    add_data(parser)
    add = parser.add_argument
    add_weights(parser, True, "file of resnet-fast train, or of torch.save or safetensors with a "
        "ResNet's weights")  # fmt: skip
    add("--split", choices=SPLITS,
        help="images to evaluate (default: test, or all of a folder without val)")  # fmt: skip
    add("--batch-size", type=whole(1, MOST), default=256, metavar="N",
        help="images per forward pass (default: 256)")  # fmt: skip
    add_bad_images(parser)
    add("--precision", choices=list(PRECISIONS), default="fp32",
        help="fp32, or autocast in bf16 or fp16 (default: fp32)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add_where(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; returns 0."""
    check_where(args.impl, args.device, args.precision)
    loaded = load_weights(
        args.weights, args.model, key=args.key, impl=args.impl, device=args.device
    )
    note("eval", *loaded.notes)
    data = load_data(
        args.data, args.path, size=args.size, preprocessing=loaded.preprocessing,
        on_bad_image=args.on_bad_image,
    )  # fmt: skip
    note_folder("eval", data)
    split = args.split or "test"
    if args.split is None and getattr(data, "held_out", False):
        split = "all"
        note("eval", f"{args.path} has no test folder: all its images are evaluated; --split test "
             "takes those that training holds out")  # fmt: skip
    if loaded.classes is not None and not same_classes(loaded.classes, data.classes):
        pairs = itertools.zip_longest(loaded.classes, data.classes)
        there, here = next(pair for pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"weights: the classes of {args.weights} are not those of {args.data}: first {there!r} "
            f"instead of {here!r}"
        )
    outputs = loaded.model.fc.out_features
    if outputs != data.num_classes:
        raise ValueError(
            f"weights: {args.weights} has {outputs} classes, {args.data} has {data.num_classes}"
        )
    found = evaluate(
        loaded.model, data, device=args.device, batch_size=args.batch_size,
        precision=args.precision, split=split, workers=args.workers,
    )  # fmt: skip
    note_unreadable("eval", getattr(data, "unreadable", {}))
    print(json.dumps(document(found, data.classes)) if args.json else text(found, data.classes))
    return 0


def document(found: Evaluation, classes: tuple[str, ...]) -> dict[str, Any]:
    """All figures as plain values; null if a class has no image or was never predicted."""
    counts = found.confusion.sum(1).tolist()
    rows = zip(classes, counts, found.recall(), found.precision(), strict=True)
    return {
        "images": sum(counts),
        "loss": found.loss,
        "top1": found.accuracy,
        "top5": found.top5,
        "classes": [
            {"name": name, "images": n, "recall": _known(recall), "precision": _known(precision)}
            for name, n, recall, precision in rows
        ],
        "confusion": found.confusion.tolist(),
    }


def text(found: Evaluation, classes: tuple[str, ...]) -> str:
    """Totals, per-class figures and the confusion matrix or, for many classes, its worst cells."""
    figures, classes = document(found, classes), tuple(map(printable, classes))
    width = max(len("class"), *map(len, classes))
    lines = [
        f"top-1 {found.accuracy:.2%}  top-5 {found.top5:.2%}  loss {found.loss:.4f}"
        f"  ({figures['images']} images)",
        "",
        f"{'class':{width}}  images   recall  precision",
    ]
    for name, row in zip(classes, figures["classes"], strict=True):
        recall, precision = (
            "-" if row[key] is None else f"{row[key]:.2%}" for key in ("recall", "precision")
        )
        lines.append(f"{name:{width}}  {row['images']:6}  {recall:>7}  {precision:>9}")
    lines.append("")
    return "\n".join(lines + (_matrix if len(classes) <= MATRIX_UP_TO else _worst)(found, classes))


def _matrix(found: Evaluation, classes: tuple[str, ...]) -> list[str]:
    cells = found.confusion.tolist()
    width = max(len(str(len(classes) - 1)), *(len(str(n)) for row in cells for n in row)) + 1
    labels = [str(i) if name == str(i) else f"{i} {name}" for i, name in enumerate(classes)]
    names = max(map(len, labels))
    head = "".join(f"{i:{width}}" for i in range(len(classes)))
    lines = ["confusion matrix: rows are classes, columns are predictions", f"{'':{names}}{head}"]
    for label, row in zip(labels, cells, strict=True):
        lines.append(f"{label:{names}}" + "".join(f"{n:{width}}" for n in row))
    return lines


def _worst(found: Evaluation, classes: tuple[str, ...], shown: int = 20) -> list[str]:
    wrong = found.confusion.clone().fill_diagonal_(0).flatten()
    counts, cells = wrong.topk(min(shown, len(wrong)))
    lines = ["most frequent errors: images, class, prediction"]
    for count, cell in zip(counts.tolist(), cells.tolist(), strict=True):
        if count:
            label, prediction = divmod(cell, len(classes))
            lines.append(f"{count:6}  {classes[label]} as {classes[prediction]}")
    return lines


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
