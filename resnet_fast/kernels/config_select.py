"""Tile configuration of a kernel launch: from a tuning table, else from the kernel's rule.

Every kernel has a few configurations. For a kernel, a GPU and a key (shape and dtype) the choice
comes from

1. the tables of kind "tiles" (`runtime.tuning_tables`), the user's, then the shipped one:
   {kernel: {key: {"config": [...], "us": microseconds}}};
2. the kernel's rule, which uses the shape and the number of multiprocessors and measures nothing.

`RESNET_FAST_AUTOTUNE=1` autotunes a key that is in no table, outside CUDA graph capture: it times
every configuration and writes the fastest to the user's table. Table entries with a configuration
that no longer exists are ignored. Plans of a convolution (`conv_plan`) are chosen the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from ..runtime import trace, tuning_tables
from . import launch
from .sizes import cdiv, next_power_of_2

Config = tuple[int, ...]
Configs = tuple[Config, ...]
_chosen: dict[tuple[Any, ...], tuple[Config, str]] = {}


def choose(
    kernel: str,
    key: Sequence[Any],
    configs: Configs,
    rule: int,
    x: Tensor,
    start: Callable[[Config], Any],
    why: str = "",
) -> Config:
    """The configuration out of `configs` for `kernel` at `key` on x's GPU.

    configs[rule] is the rule's choice, and `why` its reason. start(config) launches the kernel. It
    must give the same results when called repeatedly: autotuning times it, and within
    `launch.compile_for` this function calls it with every configuration that it does not return.
    """
    if launch.compiling() == "every":
        for config in configs[:-1]:
            start(config)
        return configs[-1]
    gpu = launch.target(x).name
    if launch.compiling():
        return _measured(kernel, gpu, _name(key), configs) or configs[rule]
    place = (kernel, gpu, configs, *key)
    chosen = _chosen.get(place)
    if chosen is None:
        if _searches(x) and tuning_tables.capturing():
            return configs[rule]  # not cached: it can be measured after the capture
        chosen = _choose(kernel, gpu, _name(key), configs, rule, x, start, why)
        _chosen[place] = chosen
    trace.note(f"{kernel} {chosen[0]}", chosen[1])
    return chosen[0]


def forget() -> None:
    """Drop the cached choices, because the tables have changed."""
    _chosen.clear()


def _name(key: Sequence[Any]) -> str:
    """The key as a table stores it."""
    return " ".join(str(part).removeprefix("torch.") for part in key)


def _measured(kernel, gpu, name, configs) -> Config | None:
    """The configuration that a table has for this key, if it is still one of `configs`."""
    for section in tuning_tables.sections("tiles", gpu, kernel):
        entry = section.get(name)
        if entry is not None and tuple(entry["config"]) in configs:
            return tuple(entry["config"])
    return None


def _choose(kernel, gpu, name, configs, rule, x, start, why) -> tuple[Config, str]:
    """The configuration, and the reason for it."""
    measured = _measured(kernel, gpu, name, configs)
    if measured is not None:
        return measured, "tuning table"
    if len(configs) > 1:
        tuning_tables.missed("tiles", gpu, kernel, name)
    if not _searches(x):
        return configs[rule], why or "rule"
    times = {config: _microseconds(start, config) for config in configs}
    best = min(times, key=times.__getitem__)
    if times[best] < float("inf"):
        entry = {"config": list(best), "us": round(times[best], 3)}
        tuning_tables.write(tuning_tables.user_table("tiles", gpu), kernel, name, entry)
    return best, "measured"


def _searches(x: Tensor) -> bool:
    return tuning_tables.searching() and x.device.type == "cuda"


def _microseconds(start, config) -> float:
    """Median time of one launch; infinite if the GPU has too little shared memory for it, or if
    cuDNN refuses it.
    """
    try:
        return tuning_tables.microseconds(lambda: start(config))
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    except RuntimeError as error:
        if not re.search("cudnn|unable to find an engine", str(error), re.IGNORECASE):
            raise
        return float("inf")


class Blocks(NamedTuple):
    """A tile: BLOCK_R rows of BLOCK_I elements."""

    r: int
    i: int

    def grid(self, rows: int, inner: int) -> tuple[int, int]:
        """Grid over a tensor of `rows` × `inner`."""
        return cdiv(rows, self.r), cdiv(inner, self.i)


def pointwise(elements: int, inner: int, x: Tensor) -> Blocks:
    """Tiles of about `elements`: whole rows of `inner`, or parts of 512 of longer rows.

    `elements` counts 2-byte elements. A tile of a wider dtype has fewer, to use as many registers.
    """
    elements = 2 * elements // x.element_size()
    i = min(max(8, next_power_of_2(inner)), 512)
    return Blocks(max(1, elements // i), i)


def pixels(elements: int, channels: int, channels_last: bool, x: Tensor) -> Blocks:
    """Tiles of `elements` 2-byte elements as pixels × channels, with at least 8 pixels.

    A tile is up to 64 channels wide in NHWC and 8 planes in NCHW, to keep neighbours together.
    """
    c = min(max(8, next_power_of_2(channels)), 64 if channels_last else 8)
    return Blocks(max(8, 2 * elements // x.element_size() // c), c)


class Split(NamedTuple):
    """A reduction over pixels: `splits` programs of `tiles` tiles, each m pixels × c channels."""

    splits: int
    tiles: int
    m: int
    c: int

    def grid(self, channels: int) -> tuple[int, int]:
        """Grid over `channels`."""
        return self.splits, cdiv(channels, self.c)


def reduction(
    elements: int, per_processor: int, count: int, channels: int, channels_last: bool, x: Tensor
) -> Split:
    """Tiles of `pixels`, and up to `per_processor` programs per multiprocessor of x's GPU."""
    m, c = pixels(elements, channels, channels_last, x)
    wanted = per_processor * launch.target(x).multiprocessors // cdiv(channels, c)
    all_tiles = cdiv(count, m)
    tiles = cdiv(all_tiles, max(1, wanted))
    return Split(cdiv(all_tiles, tiles), tiles, m, c)
