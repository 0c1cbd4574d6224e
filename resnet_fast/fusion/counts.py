"""How many convolutions, norms, activations and additions the forwards of a model call.

Calls inside a gate (`gates`), on one value per channel, are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..spec.layers import Parts
from .gates import all_layers_of
from .layers import FUNCTIONS
from .match import is_addition

COUNTED = ("convolutions", "norms", "activations", "additions")
OF_LETTER = {"c": COUNTED[0], "n": COUNTED[1], "r": COUNTED[2]}
OF_FUNCTION = {"conv": COUNTED[0], "norm": COUNTED[1], "pool": ""}
OF_CLASS: dict[tuple[type[nn.Module], ...], str] = {
    (_ConvNd,): COUNTED[0],
    (_NormBase, nn.GroupNorm, nn.LayerNorm): COUNTED[1],
    (
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
        nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus,
    ): COUNTED[2],
}  # fmt: skip
ACTIVATIONS = (
    F.relu6, F.leaky_relu, F.prelu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish,
)  # fmt: skip


def kind_of(module: nn.Module) -> str:
    """What of `COUNTED` a call of `module` is, or ""."""
    return next((kind for classes, kind in OF_CLASS.items() if isinstance(module, classes)), "")


def counted(
    module: nn.Module, graph: fx.Graph, traced: Callable[[nn.Module], Any]
) -> dict[fx.Node, str]:
    """What of `COUNTED` each call in the graph of `module` is; others are left out.

    So are calls of children that are `traced`, whose own graphs are counted.
    """
    layers = all_layers_of(module, graph)
    inside = {part for layer in layers.values() for part in layer.covers}
    found = {}
    for node in graph.nodes:
        kind = ""
        if node in layers:
            kind = OF_LETTER.get(layers[node].letter, "")
        elif node.op == "call_module":
            called = module.get_submodule(str(node.target))
            kind = "" if traced(called) else kind_of(called)
        elif node.op == "call_function" and node.target in FUNCTIONS:
            kind = OF_FUNCTION[FUNCTIONS[node.target][0]]
        elif node.op == "call_function" and node.target in ACTIVATIONS:
            kind = COUNTED[2]
        elif is_addition(node) and not any(map(_is_size, node.all_input_nodes)):
            kind = COUNTED[3]
        if kind and node not in inside:
            found[node] = kind
    return found


def _is_size(value: fx.Node) -> bool:
    """Whether `value` is a size of a tensor, not a tensor."""
    if value.op == "call_function" and getattr(value.target, "__name__", "") == "getitem":
        value = value.all_input_nodes[0]
    name = getattr(value.target, "__name__", value.target)
    return name in ("size", "dim", "numel") or (name == "getattr" and value.args[1] != "T")


def counted_in(parts: Parts) -> Iterator[str]:
    """What of `COUNTED` a chain of resnet_fast's modules runs, one by one."""
    convs = len(parts.convs) + (parts.projection is not None)
    norms = [norm for norm in (*parts.norms, parts.projection_norm) if norm is not None]
    between = sum(norm is not None for norm in parts.norms[:-1])
    for kind, count in zip(
        COUNTED, (convs, len(norms), between + parts.relu, parts.shortcut != "none"), strict=True
    ):
        yield from [kind] * count
