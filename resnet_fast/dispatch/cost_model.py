"""A cost model fitted to a tuning table: the time of an implementation at a new shape.

The time of an op in microseconds is modelled as t = a + b·bytes + c·flop with a, b, c ≥ 0: fixed
cost of a launch, inverse memory rate and inverse arithmetic rate of this implementation on this
GPU. The fit is least squares over the measurements of one dtype. It uses relative errors,
(predicted − t) / t, so that short launches count as much as long ones. Bytes and flop are the
minimum for the op, with each tensor moved once (`work`); Williams, Waterman & Patterson 2009,
"Roofline", CACM 52(4).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAST_POINTS = 4  # minimum number of measurements per implementation for a fit


class Work(NamedTuple):
    """Bytes of an op's operands and results, each counted once, and floating-point operations."""

    bytes: int
    flop: int


def work(op: str, args: Sequence[Any]) -> Work:
    """The work of `dispatch.ops.<op>(*args)`; flop is 0 for memory-bound ops."""
    meta = [_on_meta(a) for a in args]
    found = getattr(torch.ops.resnet_fast, op)(*meta, "reference")
    results = found if isinstance(found, tuple | list) else (found,)
    several = [a if isinstance(a, list) else [a] for a in meta]
    tensors = [a for a in (*itertools.chain(*several), *results) if isinstance(a, Tensor)]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    if op == "conv_bprop":  # dy, w, x, …, need_dx, need_dw, wide_dw
        return Work(moved, 2 * meta[0].numel() * meta[1][0].numel() * (args[-3] + args[-2]))
    if op in ("conv_fprop", "conv_bn_act"):
        return Work(moved, 2 * results[0].numel() * meta[1][0].numel())
    if op == "conv_add_projection":  # x, w, scale, shift, source, source_w
        return Work(moved, 2 * results[0].numel() * (meta[1][0].numel() + meta[5][0].numel()))
    return Work(moved, 0)


def _on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [_on_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def fastest(
    section: Mapping[str, Mapping[str, Any]], dtype: str, wanted: Work, names: Sequence[str]
) -> str | None:
    """The one of `names` that the fit to a table's section predicts to be fastest at `wanted`.

    section: {key: {"us": {name: microseconds}, "bytes": …, "flop": …}}; each key begins with the
    dtype. None if one of `names` has fewer than LEAST_POINTS measurements in the section.
    """
    predicted = {}
    for name in names:
        points = [
            (entry["bytes"], entry["flop"], entry["us"][name])
            for key, entry in section.items()
            if key.startswith(f"{dtype}[")
            and entry.keys() >= {"us", "bytes", "flop"}
            and name in entry["us"]
        ]
        if len(points) < LEAST_POINTS:
            return None
        predicted[name] = float(np.dot(fit(points), (1.0, wanted.bytes, wanted.flop)))
    return min(predicted, key=predicted.__getitem__)


def fit(points: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """a, b, c ≥ 0 of t = a + b·bytes + c·flop for points (bytes, flop, t): the best least-squares
    solution over all choices of which unknowns are zero.
    """
    table = np.asarray(points, dtype=np.float64)
    time = table[:, 2]
    terms = np.stack([np.ones_like(time), table[:, 0], table[:, 1]], axis=1) / time[:, None]
    scale = np.abs(terms).max(axis=0)
    scale[scale == 0] = 1.0
    best, least = np.array([time.mean(), 0.0, 0.0]), np.inf
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(range(3), size) for size in (1, 2, 3)
    ):
        columns = list(chosen)
        solution = np.zeros(3)
        solved = np.linalg.lstsq(terms[:, columns] / scale[columns], np.ones_like(time), rcond=None)
        solution[columns] = solved[0] / scale[columns]
        error = float(((terms @ solution - 1.0) ** 2).sum())
        if (solution >= 0).all() and error < least - 1e-12:
            best, least = solution, error
    return best
