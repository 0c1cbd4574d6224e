"""What the commands share: where they run, and how they refuse what they were given."""

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
        help="default here: %(default)s")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto",
        help="what runs the fused blocks; reference is plain PyTorch (default: auto)")  # fmt: skip
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes that read images of a folder (default here: %(default)s)")  # fmt: skip


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA, PATH and --size."""
    from ..training.data import DATA

    add = parser.add_argument
    add("data", choices=DATA, metavar="DATA", help=f"one of {', '.join(DATA)}")
    add("path", nargs="?", metavar="PATH",
        help="cifar10: the python archive (.tar.gz) or its folder; imagefolder: a folder of one "
        "folder a class, perhaps under train and val")  # fmt: skip
    add("--size", type=int, metavar="PX",
        help="height and width of an input: digits 16, folders 224, others 32")  # fmt: skip


def model_name(text: str) -> str:
    """A name of `resnet_fast.list_models()`, as a type of argparse."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("name: ")) from None


def check_where(impl: str, device: str, precision: str) -> None:
    """ValueError, with the reason, where `impl` or `device` is not to be had here."""
    for why in missing([impl], [device], [precision]):
        raise ValueError(why)


def refusing(command: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator of a `run`: a wrong argument, file or package is a line on stderr and status 2."""

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
    """Reasons why what was asked for by name cannot run here: a device, or an implementation."""
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
