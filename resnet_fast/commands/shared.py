"""Options and error handling that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..dispatch import backends, ops
from ..models.registry import check_name
from ..runtime.options import whole
from ..spec.chain import IMPLS
from ..spec.dtypes import BY_NAME
from ..spec.values import printable
from ..training.imagefolder import ON_BAD_IMAGE
from ..training.preprocessing import MOST_SIZE

MOST_WORKERS = 1024


def add_where(parser: argparse.ArgumentParser) -> None:
    """--device, --impl and --workers."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default on this machine: %(default)s")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto",
        help="what runs the fused blocks; reference is plain PyTorch (default: auto)")  # fmt: skip
    add("--workers", type=whole(0, MOST_WORKERS), default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that read image files (default on this machine: %(default)s)")  # fmt: skip


def add_weights(parser: argparse.ArgumentParser, required: bool, what: str) -> None:
    """--weights, --key and --model."""
    add = parser.add_argument
    add("--weights", type=Path, required=required, metavar="FILE",
        help=f"{what}; or published weights, which are downloaded once: IMAGENET1K_V1, "
        "IMAGENET1K_V2, DEFAULT (the newest of these) or timm/NAME, such as "
        "timm/resnet50.a1_in1k")  # fmt: skip
    add("--key", metavar="KEY",
        help="which weights, if FILE has several: names with dots, such as "
        "state_dict.module")  # fmt: skip
    add("--model", type=model_name, metavar="NAME",
        help="model of the weights (default: as in FILE, or recognized by keys and "
        "shapes; resnet50 for IMAGENET1K_V1, IMAGENET1K_V2 and DEFAULT)")  # fmt: skip


def add_bad_images(parser: argparse.ArgumentParser) -> None:
    """--on-bad-image."""
    parser.add_argument("--on-bad-image", choices=ON_BAD_IMAGE, default="error",
        help="for an image file that cannot be read: stop with an error, or skip it and count "
        "(default: error)")  # fmt: skip


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA, PATH and --size."""
    from ..training.data import DATA

    add = parser.add_argument
    add("data", choices=DATA, metavar="DATA", help=f"data set: one of {', '.join(DATA)}")
    add("path", nargs="?", metavar="PATH",
        help="cifar10: the official python archive (.tar.gz) or its extracted folder; "
        "imagefolder: a folder with one folder per class, or with such folders under train "
        "and val")  # fmt: skip
    add("--size", type=whole(8, MOST_SIZE), metavar="PX",
        help="input height and width in pixels (default: 16 for digits, 224 for imagefolder, "
        "32 for others; in eval, as trained)")  # fmt: skip


def model_name(text: str) -> str:
    """A name of `resnet_fast.list_models()`: an argparse `type=`."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("name: ")) from None


def check_where(impl: str, device: str, precision: str) -> None:
    """Raise ValueError, with the reason, if `impl` or `device` cannot be used on this machine."""
    for why in missing([impl], [device], [precision]):
        raise ValueError(why)


def note(command: str, *lines: str) -> None:
    """Print lines on stderr, so that stdout has only results."""
    for line in lines:
        print(f"resnet-fast {command}: {printable(line)}", file=sys.stderr)


def note_folder(command: str, data: Any) -> None:
    """Print which files of a folder of images are not used, if there are any."""
    skipped = getattr(data, "skipped", None)
    if skipped:
        note(command, f"skipped in the folder ({skipped})")


def note_unreadable(command: str, unreadable: Mapping[str, str]) -> None:
    """Print how many images could not be read, and why the first could not."""
    if unreadable:
        first = next(iter(unreadable.values()))
        note(command, f"skipped images that cannot be read: {len(unreadable)}; the first: {first}")


def missing(impls: Sequence[str], devices: Sequence[str], dtypes: Sequence[str]) -> Iterator[str]:
    """Reasons why a requested device or implementation cannot run on this machine."""
    if "cuda" in devices and not torch.cuda.is_available():
        yield "--device cuda: torch.cuda.is_available() is False here"
        return
    for impl in impls:
        for device in devices:
            for dtype in dtypes:
                if impl == "auto":
                    continue
                for op in ops.NAMES:
                    why = backends.refusal(impl, op, device, BY_NAME[dtype])
                    if why is not None and not backends.lacks(impl, op, device):
                        yield f"--impl {impl} cannot run {op} in {dtype} on {device}: {why}"
                        break
