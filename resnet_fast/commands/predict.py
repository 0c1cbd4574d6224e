"""`resnet-fast predict IMAGE… --weights FILE`: the most probable classes of each image."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..training.evaluation import as_input, at_least_fp32, autocast
from ..training.preprocessing import read_image
from ..training.recipe import PRECISIONS
from ..training.weights import Loaded, load_weights, read_names
from .shared import add_where, check_where, model_name, refusing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast predict`."""
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    add("--weights", type=Path, required=True, metavar="FILE",
        help="file of resnet-fast train, or a state dict with torchvision's keys (preprocessing "
        "is then ImageNet's)")  # fmt: skip
    add("--model", type=model_name, metavar="NAME",
        help="model of the weights (default: as in FILE, or recognized by keys)")  # fmt: skip
    add("--classes", type=Path, metavar="FILE",
        help="text file of class names, one per line (default: those in the weights, else "
        "numbers)")  # fmt: skip
    add("--size", type=int, metavar="PX",
        help="input height and width in pixels (default: as trained; else 224)")  # fmt: skip
    add("--top", type=int, default=5, metavar="N", help="classes to print per image (default: 5)")
    add("--batch-size", type=int, default=32, metavar="N",
        help="images per forward pass (default: 32)")  # fmt: skip
    add("--precision", choices=list(PRECISIONS), default="fp32",
        help="fp32, or autocast in bf16 or fp16 (default: fp32)")  # fmt: skip
    add("--json", action="store_true", help="print a JSON array instead of a table")
    add_where(parser)


@refusing("predict")
def run(args: argparse.Namespace) -> int:
    """Predict and print; returns 0, or 2 for a wrong argument or file."""
    check_where(args.impl, args.device, args.precision)
    for name in ("top", "batch_size", "size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    loaded = load_weights(args.weights, args.model, impl=args.impl, device=args.device)
    names = loaded.classes if args.classes is None else read_names(args.classes)
    outputs = loaded.model.fc.out_features
    if names is not None and len(names) != outputs:
        raise ValueError(
            f"classes: {args.classes} has {len(names)} names; expected {outputs}, one per class of "
            f"{args.weights}"
        )
    found = list(predictions(args, loaded, names))
    print(json.dumps(found, indent=1) if args.json else text(found))
    return 0


@torch.inference_mode()
def predictions(
    args: argparse.Namespace, loaded: Loaded, names: Sequence[str] | None
) -> Iterator[dict[str, Any]]:
    """For every image its path and its `args.top` most probable classes (softmax)."""
    device, model = torch.device(args.device), loaded.model
    preprocessing = loaded.preprocessing
    if args.size is not None:
        preprocessing = preprocessing.at(args.size)
    for start in range(0, len(args.images), args.batch_size):
        paths = args.images[start : start + args.batch_size]
        x = torch.stack([read_image(path, preprocessing) for path in paths]).to(device)
        x = as_input(x, preprocessing, model)
        with autocast(device, args.precision):
            logits = model(x)
        shares = at_least_fp32(logits).softmax(1)
        for path, row in zip(paths, shares, strict=True):
            values, labels = row.topk(min(args.top, len(row)))
            top = [
                {"class": label, "name": str(label) if names is None else names[label],
                 "probability": value}
                for label, value in zip(labels.tolist(), values.tolist(), strict=True)
            ]  # fmt: skip
            yield {"image": str(path), "top": top}


def text(found: Sequence[dict[str, Any]]) -> str:
    """One paragraph per image."""
    parts = []
    for one in found:
        lines = [f"{row['probability']:9.2%}  {row['name']}" for row in one["top"]]
        parts.append("\n".join([one["image"], *lines]))
    return "\n\n".join(parts)
