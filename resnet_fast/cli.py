"""`resnet-fast COMMAND`: one module per command, imported only when the command is called.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit status. A new
command is one line in COMMANDS.
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
from .spec.values import printable

REFUSED = 2  # exit status for a wrong argument or file, as argparse
FAILED = 1
KILLED = 128  # a shell reports a signal as this plus its number

COMMANDS = {
    "env": ("resnet_fast.commands.env", "versions, hardware and available implementations"),
    "verify": ("resnet_fast.commands.verify", "compare ops and models with PyTorch in fp64"),
    "tune": ("resnet_fast.commands.tune", "find the fastest GPU kernels of a model, store them"),
    "train": ("resnet_fast.commands.train", "train a model in one or several processes"),
    "eval": ("resnet_fast.commands.evaluate", "evaluate a trained model on a data set"),
    "predict": ("resnet_fast.commands.predict", "classify images"),
    "experiment": ("resnet_fast.commands.experiment", "experiments on residual learning"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(REFUSED, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    A wrong option, environment variable or file, or a missing package, gives one line on stderr and
    status 2; a full disk or too little memory gives status 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="resnet-fast", description="Fused ResNets for PyTorch.")
    parser.add_argument("--version", action="version", version=f"resnet_fast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    run = None
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
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
    except BrokenPipeError:  # such as `| head`; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return KILLED + 13
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
