"""The 1000 classes of ImageNet (ILSVRC 2012): a WordNet ID and a name each, by label.

Names are torchvision's; IDs are the names of ImageNet's folders, whose order is that of the labels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def _columns() -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    ids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return ids, names


def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ID of every label, such as "n01440764"."""
    return _columns()[0]


def imagenet_names() -> tuple[str, ...]:
    """The name of every label, such as "tench"."""
    return _columns()[1]


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of classes are equal, or both are ImageNet's: by name and by WordNet ID."""
    both = {tuple(one), tuple(other)}
    return len(both) == 1 or both == set(_columns())
