"""`resnet-fast COMMAND`: one module per command, imported only when the command is called.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit status. A new
command is one line in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .runtime import settings

COMMANDS = {
    "env": ("resnet_fast.commands.env", "versions, hardware and available implementations"),
    "verify": ("resnet_fast.commands.verify", "compare ops and models with PyTorch in fp64"),
    "tune": ("resnet_fast.commands.tune", "find the fastest GPU kernels of a model, store them"),
    "train": ("resnet_fast.commands.train", "train a model in one or several processes"),
    "eval": ("resnet_fast.commands.evaluate", "evaluate a trained model on a data set"),
    "predict": ("resnet_fast.commands.predict", "classify images"),
    "experiment": ("resnet_fast.commands.experiment", "experiments on residual learning"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an invalid option or environment variable."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="resnet-fast", description="Fused ResNets for PyTorch.")
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
    try:
        for setting in settings.ALL:
            setting.read()
    except settings.BadSetting as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    return run(args)


def _version() -> str:
    from . import __version__

    return __version__
