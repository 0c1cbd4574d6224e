"""Types of command-line options that several commands share.

Each is a `type=` for argparse: it parses a word or raises `argparse.ArgumentTypeError`, which
argparse reports with the name of the option.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

DEVICES = ("cpu", "cuda")


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
    """Parser of a finite number above zero, an int or a float."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a positive {kind.__name__}, got {text!r}")
        return value

    return parse


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
