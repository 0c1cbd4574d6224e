"""`resnet-fast experiment NAME`: run one of `resnet_fast.experiments`, print and write it."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from types import ModuleType

import torch

from ..experiments import EXPERIMENTS
from ..runtime.options import examples
from ..spec.values import printable
from .shared import check_where

DEFAULT_OUT = Path("build/experiments")


def load(name: str) -> ModuleType:
    """The module of the experiment `name`."""
    return importlib.import_module(f"resnet_fast.experiments.{name.replace('-', '_')}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand per experiment, with its options."""
    from ..experiments.options import add_common

    names = parser.add_subparsers(dest="experiment", required=True, metavar="NAME")
    for name, summary in EXPERIMENTS.items():
        shown = examples(
            f"resnet-fast experiment {name}",
            f"resnet-fast experiment {name} --seed 1 --impl reference --out build/{name}",
        )
        one = names.add_parser(name, help=summary, description=summary, **shown)
        add_common(one)
        load(name).add_arguments(one)


def run(args: argparse.Namespace) -> int:
    """Run the experiment; returns 0, also if a claim fails."""
    from ..experiments import findings
    from ..experiments.options import settings

    name, start = args.experiment, time.perf_counter()
    out = args.out or DEFAULT_OUT / name
    check_where(args.impl, args.device, "fp32")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)  # before the work
    found = load(name).run(args)
    print(findings.text(found))
    path = findings.write(found, name, settings(args), out)
    print(f"\nwrote {printable(str(path))} after {time.perf_counter() - start:.0f} s")
    return 0
