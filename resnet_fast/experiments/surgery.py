"""Delete or exchange blocks of a net within a `with` statement.

Only blocks whose output has the shape of their input: the identity, or another such block of the
stage, can replace them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from ..models import ResNet


class Place(NamedTuple):
    """The place of a block: number `index` of `stage`."""

    stage: nn.Sequential
    index: int

    @property
    def block(self) -> nn.Module:
        return self.stage[self.index]

    def put(self, block: nn.Module) -> None:
        """Put `block` here."""
        self.stage[self.index] = block


def places(model: ResNet) -> list[Place]:
    """Places of the blocks whose output has the shape of their input, first to last."""
    stages = (getattr(model, f"layer{i + 1}") for i in range(model.stages))
    return [
        Place(stage, index)
        for stage in stages
        for index, block in enumerate(stage)
        if block.stride == 1 and block.conv1.in_channels == block.out_channels
    ]


@contextmanager
def deleted(chosen: Sequence[Place]) -> Iterator[None]:
    """Within it, the identity replaces the `chosen` blocks: x for relu(F(x) + x) or relu(F(x))."""
    blocks = [place.block for place in chosen]
    for place in chosen:
        place.put(nn.Identity())
    try:
        yield
    finally:
        for place, block in zip(chosen, blocks, strict=True):
            place.put(block)


@contextmanager
def exchanged(chosen: Sequence[tuple[Place, Place]]) -> Iterator[None]:
    """Within it, the blocks of every pair are swapped, one pair after the other."""

    def swap(first: Place, second: Place) -> None:
        one, other = first.block, second.block
        first.put(other)
        second.put(one)

    for pair in chosen:
        swap(*pair)
    try:
        yield
    finally:
        for pair in reversed(chosen):
            swap(*pair)


def pairs(model: ResNet) -> list[tuple[Place, Place]]:
    """All pairs of places in the same stage, whose blocks can be exchanged."""
    stages: dict[int, list[Place]] = {}
    for place in places(model):
        stages.setdefault(id(place.stage), []).append(place)
    return [pair for stage in stages.values() for pair in itertools.combinations(stage, 2)]
