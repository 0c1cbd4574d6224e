"""FLOPs of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

Convolutions count as PyTorch counts the same convolutions. Everything else counts 0, as a batch
normalization does in PyTorch. So a fused model has the same FLOPs as the plain one.

PyTorch's counter imports Triton, which takes longer than importing resnet_fast. So the formulas are
registered only when the counter is imported.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from .ops import NAMES

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def register(counter: ModuleType) -> None:
    """Register a formula for every op with `counter`, the module `torch.utils.flop_counter`."""

    def forward(x: Shape, w: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
        y = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]
        return counter.conv_flop_count(x, w, y)

    def backward(dy: Shape, w: Shape, x: Shape, *rest: Any, out_shape: Any) -> int:
        *geometry, groups, need_dx, need_dw, _, _ = rest[-8:]
        return counter.conv_backward_flop(
            dy, x, w, None, *geometry, False, [0, 0], groups, [need_dx, need_dw, False],
            out_val=tuple(out_shape),
        )  # fmt: skip

    def projected(
        x: Shape, w: Shape, scale: Any, shift: Any, source: Shape, source_w: Shape, *_: Any,
        out_shape: Any, **__: Any,
    ) -> int:  # fmt: skip
        return sum(counter.conv_flop_count(*of, out_shape) for of in ((x, w), (source, source_w)))

    def nothing(*_: Any, **__: Any) -> int:
        return 0

    formulas = {
        "conv_fprop": forward, "conv_bn_act": forward, "conv_bprop": backward,
        "conv_add_projection": projected,
    }  # fmt: skip
    for name in NAMES:
        op = getattr(torch.ops.resnet_fast, name)
        if op not in counter.flop_registry:
            counter.register_flop_formula(op)(formulas.get(name, nothing))


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds COUNTER by the other finders, and registers the formulas after its import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def register_once_imported() -> None:
    """`register` with PyTorch's counter, now or as soon as it is imported."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
