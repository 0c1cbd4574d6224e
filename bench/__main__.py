"""`python -m bench COMMAND`: one module a command, imported only when its command is asked for.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit status. A new
command is one more line in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "models": ("bench.models", "throughput and peak memory of whole models"),
    "kernels": ("bench.kernels", "compile every Triton kernel without a GPU: registers, spills"),
    "compile": ("bench.compile", "compile the kernels of a model's steps into Triton's cache"),
    "estimate": ("bench.estimate", "what every launch of a step takes, estimated without a GPU"),
    "cuda": ("bench.cuda", "compile every CUDA kernel without a GPU: registers, spills"),
    "ceilings": ("bench.ceilings", "the machine's limits: a copy and a matmul, measured"),
    "layers": ("bench.layers", "every convolution of a model, fused beside the library's"),
    "passes": ("bench.passes", "every memory-bound op, beside a copy"),
    "roofline": ("bench.roofline", "the least time of every launch of a model, and what it took"),
    "host": ("bench.host", "what a call costs the host on a GPU, and how much it launches"),
    "gpu": ("bench.gpu", "what a GPU checks and measures, in stages and within a time budget"),
    "table": ("bench.table", "README's table and plots from the rows under bench/results"),
    "demo": ("bench.demo", "verification, a short training and a report in a few minutes"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for a bad command line (argparse)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    module: ModuleType | None = None
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            module = importlib.import_module(path)
            module.add_arguments(command)
    args = parser.parse_args(argv)
    assert module is not None  # a command was required, and parse_args knows only COMMANDS
    return module.run(args)


if __name__ == "__main__":
    sys.exit(main())
