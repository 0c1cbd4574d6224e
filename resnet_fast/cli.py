"""`resnet-fast COMMAND`: one module per command, imported only when the command is called.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit status. A new
command is one entry of COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .runtime import settings
from .runtime.files import NotWritten, reason
from .runtime.optional import MissingPackage
from .runtime.options import examples
from .spec.values import printable

REFUSED = 2  # exit status for a wrong argument or file, as argparse
FAILED = 1
KILLED = 128  # a shell reports a signal as this plus its number

COMMANDS = {
    "env": (
        "resnet_fast.commands.env", "versions, hardware and available implementations",
        "env", "env --json",
    ),
    "verify": (
        "resnet_fast.commands.verify", "compare ops and models with PyTorch in fp64",
        "verify --quick", "verify --model resnet50 --dtype fp32 --json verify.json",
    ),
    "tune": (
        "resnet_fast.commands.tune", "find the fastest GPU kernels of a model, store them",
        "tune --model resnet50 --batch 256",
        "tune --model resnet50,resnet101 --batch 1,64 --dtype bf16 --mode infer",
    ),
    "train": (
        "resnet_fast.commands.train", "train a model in one or several processes",
        "train digits",
        "train imagefolder photos --model resnet50 --pretrained --epochs 5 --lr 0.01",
    ),
    "eval": (
        "resnet_fast.commands.evaluate", "evaluate a trained model on a data set",
        "eval imagefolder photos --weights runs/photos/model.pt",
        "eval imagefolder imagenet --weights IMAGENET1K_V2 --model resnet50 --precision bf16",
    ),
    "predict": (
        "resnet_fast.commands.predict", "classify images",
        "predict cat.jpg", "predict photos --weights runs/photos/model.pt --topk 3 --csv",
    ),
    "experiment": (
        "resnet_fast.commands.experiment", "experiments on residual learning",
        "experiment gradient-flow", "experiment degradation --depths 20,56 --epochs 5",
    ),
}  # fmt: skip
"""Command → its module, its summary and two examples."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(REFUSED, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    A wrong option, environment variable or file, or a missing package, gives one line on stderr and
    status 2; a full disk or too little memory gives status 1.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # such as `| head`; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return KILLED + 13


def _main(argv: list[str]) -> int:
    parser = _Parser(prog="resnet-fast", description="Fused ResNets for PyTorch.")
    parser.add_argument("--version", action="version", version=f"resnet_fast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    run = None
    for name, (path, summary, *lines) in COMMANDS.items():
        shown = examples(*(f"resnet-fast {line}" for line in lines))
        command = commands.add_parser(name, help=summary, description=summary, **shown)
        if name == asked:
            module = importlib.import_module(path)
            module.add_arguments(command)
            run = module.run
    args = parser.parse_args(argv)
    assert run is not None  # parse_args demands a command, and takes none but these
    from .dispatch import backends

    status, why = REFUSED, ""
    try:
        for setting in settings.ALL:
            setting.read()
        backends.native_module()  # reads the rest of them
        return run(args)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return KILLED + 2
    except NotWritten as error:
        status, why = FAILED, str(error)
    except (ValueError, OSError, MissingPackage) as error:
        why = str(error)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        status, why = FAILED, f"not enough memory for this size or batch: {reason(error)}"
    print(f"{parser.prog} {args.command}: error: {printable(why)}", file=sys.stderr)
    return status


def _out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own only for a GPU's memory."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "can't allocate memory" in str(error)


def _version() -> str:
    from . import __version__

    return __version__
