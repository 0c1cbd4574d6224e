"""Types of command-line options that several commands share.

Each is a `type=` for argparse: it parses a word or raises `argparse.ArgumentTypeError`, which
argparse reports with the name of the option.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
MOST = 2**31 - 1
MOST_SEED = 2**63


def examples(*lines: str) -> dict[str, Any]:
    """Arguments of a parser whose help ends with these command lines."""
    epilog = "\n".join(["examples:", *(f"  {line}" for line in lines)])
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def names(choices: Iterable[str] | Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list of `choices` (or of choices()), without duplicates."""

    def parse(text: str) -> list[str]:
        known = list(choices() if callable(choices) else choices)
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f"expected a comma-separated list of {', '.join(known)}; got {word!r}"
                )
        return list(dict.fromkeys(text.split(",")))

    return parse


def positive(kind: type) -> Callable[[str], Any]:
    """Parser of a finite number above zero, an int (at most MOST) or a float."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(
                f"expected a positive {kind.__name__}, got {_short(text)}"
            )
        if kind is int and value > MOST:
            raise argparse.ArgumentTypeError(f"expected at most {MOST}, got {_short(text)}")
        return value

    return parse


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Parser of an integer from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {least} to {most}, got {_short(text)}"
            )
        return value

    return parse


def seed(text: str) -> int:
    """Parse a seed of PyTorch's generators: a signed 64-bit integer."""
    return whole(-MOST_SEED, MOST_SEED - 1)(text)


def output_file(text: str) -> Path:
    """Parse the path of a file that can be written; its folders may be missing."""
    _check_writable(Path(text).parent)
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text!r}")
    return Path(text)


def output_folder(text: str) -> Path:
    """Parse the path of a folder that can be written; it may be missing."""
    _check_writable(Path(text))
    return Path(text)


def _check_writable(folder: Path) -> None:
    try:
        found = next(path for path in (folder, *folder.parents, Path()) if path.exists())
        fault = "is not a folder" if not found.is_dir() else "cannot be written"
        if found.is_dir() and os.access(found, os.W_OK | os.X_OK):
            return
    except OSError as error:  # such as a name that is too long
        found, fault = folder, f"cannot be used: {error.strerror}"
    raise argparse.ArgumentTypeError(f"{str(found)!r} {fault}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def integers(text: str) -> list[int]:
    """Parse a comma-separated list of positive integers, without duplicates."""
    return list(dict.fromkeys(positive(int)(word) for word in text.split(",")))


def device(text: str) -> torch.device:
    """Parse cpu, or cuda if it is available."""
    if text not in DEVICES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(DEVICES)}; got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("expected cpu: torch.cuda.is_available() is False here")
    return torch.device(text)
