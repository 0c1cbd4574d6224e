"""Command-line options that experiments share."""

from __future__ import annotations

import argparse
from typing import Any

from ..runtime.options import output_folder, positive, seed, whole
from ..spec.chain import IMPLS

NOT_SETTINGS = {"command", "experiment", "out"}
MOST_DEPTH = 10_000


def add_common(parser: argparse.ArgumentParser) -> None:
    """--out, --impl, --device, --seed, --threads."""
    add = parser.add_argument
    add("--out", type=output_folder, metavar="DIR",
        help="output folder (default: build/experiments/NAME)")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto",
        help="what runs the blocks; reference is plain PyTorch (default: auto)")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="device to run on (default: cpu)")  # fmt: skip
    add("--threads", type=positive(int), metavar="N",
        help="CPU threads (default: PyTorch's)")  # fmt: skip
    add("--seed", type=seed, default=0, metavar="N",
        help="seed of parameters and batches (default: 0)")  # fmt: skip


def add_count(parser: argparse.ArgumentParser, flag: str, default: int, what: str) -> None:
    """An option that takes a positive integer."""
    parser.add_argument(
        flag, type=positive(int), default=default, metavar="N", help=f"{what} (default: {default})"
    )


def add_depth(parser: argparse.ArgumentParser, default: int) -> None:
    """--depth, of a net of `nets.net`."""
    parser.add_argument(
        "--depth", type=depth, default=default, metavar="N",
        help=f"layers of the nets, 6n + 2 (default: {default})",
    )  # fmt: skip


def depth(text: str) -> int:
    """A number of layers 6n + 2: an argparse `type=`."""
    from .nets import blocks_of

    try:
        blocks_of(whole(1, MOST_DEPTH)(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(text)


def depths(text: str) -> list[int]:
    """Such numbers from a comma-separated list, unique and ascending; an argparse `type=`."""
    return sorted({depth(word) for word in text.split(",")})


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the experiment in `args`."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
