"""Benchmarks of resnet_fast: `python -m bench COMMAND`, one module per command, imported on use.

A command's module has `add_arguments(parser)` and `run(args) -> int`, the exit status. Add a new
command to COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "models": ("bench.models", "measure throughput and peak memory of whole models"),
    "kernels": ("bench.kernels", "compile every Triton kernel without a GPU: registers, spills"),
    "compile": ("bench.compile", "compile the kernels of a model's steps into Triton's cache"),
    "estimate": ("bench.estimate", "estimate the time of every launch of a step without a GPU"),
    "cuda": ("bench.cuda", "compile every CUDA kernel without a GPU: registers, spills"),
    "cutlass": ("bench.cutlass", "estimate the native Hopper convolutions beside Triton's"),
    "ceilings": ("bench.ceilings", "measure the machine's limits: a copy and a matmul"),
    "layers": ("bench.layers", "time every convolution of a model, fused and in PyTorch"),
    "passes": ("bench.passes", "time every memory-bound op relative to a copy"),
    "roofline": ("bench.roofline", "minimum time of every launch of a model, and measured times"),
    "host": ("bench.host", "measure host time and number of launches of a call on a GPU"),
    "coverage": ("bench.coverage", "count the layers of other packages' models that run fused"),
    "decoding": ("bench.decoding", "measure reading and augmenting JPEGs, alone and in training"),
    "gpu": ("bench.gpu", "check and measure a GPU in stages within a time budget"),
    "table": ("bench.table", "make the tables of README and docs, and plots, from the rows"),
    "demo": ("bench.demo", "verify, train a small model and write a report in a few minutes"),
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
