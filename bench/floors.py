"""Steps: launches with their floor, the least time they can take, and the list of all launches.

The floor of a launch is the larger of two times: its bytes (each tensor once) over the bandwidth of
a copy, and its operations over the rate of a large matmul. Source: Williams, Waterman & Patterson
2009, "Roofline", CACM 52(4). The Triton launchers list the launches on meta tensors
(`bench.launches`), so this is the floor of what runs. Compared with the ideal schedule of
`bench.roofline`, the kernels also move:

    dz, φ(x)   gradients and activations that passes write for convolutions
    passes     the statistics of what cuDNN's forward convolutions compute
    vectors    partial sums, channel vectors, parameters, the classifier and the loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench.ceilings import Ceilings
from bench.estimate import flops, moved
from bench.launches import Launch, launches_of
from bench.layers import layers_of
from bench.step import Case

KINDS = ("1x1", "3x3", "other filters", "passes")
MADE = {"bn_act_bwd_apply_kernel": "dz", "bn_act_fwd_kernel": "φ(x)"}
PARTS = (*KINDS, *MADE.values(), "vectors")
MODES = {
    "conv_dgrad_kernel": "dgrad", "cudnn dgrad": "dgrad", "cudnn strided dgrad": "dgrad",
    "conv_wgrad_kernel": "wgrad", "cudnn wgrad": "wgrad",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A launch that one pass over the model makes `count` times; bytes and flops are per launch.

    part: "dz", "φ(x)" or "vectors" for a pass that the ideal schedule does not have. ms, provider:
    measured time and implementation, if rows give them.
    """

    mode: str
    name: str
    kind: str
    count: int
    bytes: int
    flops: int
    ms: float | None = None
    provider: str = ""
    part: str = ""

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def floor_ms(self, limits: Ceilings) -> float:
        """Minimum time of one launch."""
        return limits.floor_ms(self.bytes, self.flops)

    def bound(self, limits: Ceilings) -> str:
        """The limit that sets the floor: "memory" or "compute"."""
        memory = self.bytes / limits.bytes_per_s >= self.flops / limits.flops_per_s
        return "memory" if memory else "compute"


class Schedules(NamedTuple):
    """The launches that run (None if they cannot be listed), and those of the ideal schedule."""

    runs: Sequence[Step] | None
    ideal: Sequence[Step]


class Total(NamedTuple):
    """Launches, their bytes, and the sum of their floors."""

    launches: int
    bytes: int
    ms: float


def total(steps: Sequence[Step], limits: Ceilings, part: str | None = None) -> Total:
    """Totals of all `steps`, or of one part of `PARTS`."""
    own = [step for step in steps if part in (None, step.part or step.kind)]
    return Total(
        sum(step.count for step in own),
        sum(step.count * step.bytes for step in own),
        sum(step.count * step.floor_ms(limits) for step in own),
    )


def kind_of(filters: tuple[int, ...]) -> str:
    """The kind of a convolution with filters R × S."""
    name = f"{filters[0]}x{filters[1]}"
    return name if name in KINDS else "other filters"


def launched(case: Case, target: Any) -> list[Step]:
    """The launches of one step of `case`, each as a step. Raises as `launches_of`."""
    weights = {layer.weight_shape for layer in layers_of(case.model, case.image_size)}
    return [_step(one, case, weights) for one in launches_of(case, target)]


def _step(one: Launch, case: Case, weights: set[tuple[int, ...]]) -> Step:
    shapes = [tuple(t.shape) for t in one.tensors]
    images = [s for s in shapes if len(s) == 4 and s[0] == case.batch and s not in weights]
    size = one.count, moved(one), flops(one)
    forward = "infer" if case.mode == "infer" else "fprop"
    name, a = one.name.removesuffix("_kernel"), one.arguments
    if one.name.startswith("conv"):
        x = a["dx"] if a["x"] is None else a["x"]
        _, channels, height, _ = getattr(x, "base", x).shape
        stride = a["STRIDE"] if "STRIDE" in a else a["STRIDE_H"]
        said = f"{a['R']}x{a['S']}/{stride} {channels}>{a['filters']} @{height}"
        said += "+res" if a.get("residual") is not None else ""
        said += "+projection" if a.get("source") is not None else ""
        return Step(MODES.get(one.name, forward), said, kind_of((a["R"], a["S"])), *size)
    if one.name.startswith("cudnn "):
        k, c, *filters = next(s for s in shapes if s in weights)
        said = f"{filters[0]}x{filters[1]} {c}>{k} @{max(s[2] for s in images)} library"
        return Step(MODES.get(one.name, forward), said, kind_of(filters), *size)
    if not images:
        return Step(case.mode, name, "passes", *size, part="vectors")
    large = max(images, key=lambda s: s[1] * s[2] * s[3])
    part = MADE.get(one.name, "") if case.mode == "train" and a.get("residual") is None else ""
    if part == "φ(x)" and a["mask"] is not None:
        part = ""  # the end of a block without a shortcut
    said = f"{part or name} {large[1]}@{large[2]}"
    return Step(case.mode, said, "passes", *size, part=part)
