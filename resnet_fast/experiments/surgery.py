"""Blocks taken out of a net, or exchanged, for the time of a `with`.

Only blocks that keep shapes: the identity in their place, or one another, fits everything around.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from ..models import ResNet


class Place(NamedTuple):
    """Where a block stands: number `index` of `stage`."""

    stage: nn.Sequential
    index: int

    @property
    def block(self) -> nn.Module:
        return self.stage[self.index]

    def put(self, block: nn.Module) -> None:
        """Let `block` stand here."""
        self.stage[self.index] = block


def places(model: ResNet) -> list[Place]:
    """Where `model` has blocks whose result has the shape of their input, first to last."""
    stages = (getattr(model, f"layer{i + 1}") for i in range(model.stages))
    return [
        Place(stage, index)
        for stage in stages
        for index, block in enumerate(stage)
        if block.stride == 1 and block.conv1.in_channels == block.out_channels
    ]


@contextmanager
def deleted(chosen: Sequence[Place]) -> Iterator[None]:
    """The identity in place of the `chosen` blocks: x for relu(F(x) + x), and for relu(F(x))."""
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
    """The blocks of every pair in each other's place, one pair after the other."""

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
    """All pairs of places in one stage, where blocks fit each other's place."""
    stages: dict[int, list[Place]] = {}
    for place in places(model):
        stages.setdefault(id(place.stage), []).append(place)
    return [pair for stage in stages.values() for pair in itertools.combinations(stage, 2)]
