"""Options and error handling that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps

import torch

from ..dispatch import backends, ops
from ..models.registry import check_name
from ..runtime.optional import MissingPackage
from ..spec.chain import IMPLS
from ..spec.dtypes import BY_NAME

REFUSED = 2  # the exit status of argparse


def add_where(parser: argparse.ArgumentParser) -> None:
    """--device, --impl and --workers."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default on this machine: %(default)s")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto",
        help="what runs the fused blocks; reference is plain PyTorch (default: auto)")  # fmt: skip
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that read the images of imagefolder (default on this machine: "
        "%(default)s)")  # fmt: skip


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA, PATH and --size."""
    from ..training.data import DATA

    add = parser.add_argument
    add("data", choices=DATA, metavar="DATA", help=f"data set: one of {', '.join(DATA)}")
    add("path", nargs="?", metavar="PATH",
        help="cifar10: the official python archive (.tar.gz) or its extracted folder; "
        "imagefolder: a folder with one folder per class, or with such folders under train "
        "and val")  # fmt: skip
    add("--size", type=int, metavar="PX",
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


def refusing(command: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a `run`: a wrong argument or file or a missing package gives one line on stderr
    and exit status 2.
    """

    def decorate(run: Callable[..., int]) -> Callable[..., int]:
        @wraps(run)
        def refuse(args: argparse.Namespace) -> int:
            try:
                return run(args)
            except (ValueError, OSError, MissingPackage) as error:
                print(f"resnet-fast {command}: error: {error}", file=sys.stderr)
                return REFUSED

        return refuse

    return decorate


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
                    if why is not None:
                        yield f"--impl {impl} cannot run {op} in {dtype} on {device}: {why}"
                        break
