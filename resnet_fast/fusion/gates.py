"""Gates among the calls of a graph: factors of the channels of a value, from its means.

y = v · g(mean of v over H and W), as squeeze-and-excitation computes it (Hu et al. 2018,
arXiv:1709.01507): whatever g is, as long as it reads nothing of v but the means and N and C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from .layers import MULTIPLY, Gate, Layer, is_call, is_pool, layers_of
from .subgraph import function_of

MEAN = ("mean", torch.mean, torch.ops.aten.mean.dim)
POOL = (F.adaptive_avg_pool2d, torch.ops.aten.adaptive_avg_pool2d.default)
AXES = ((2, 3), (-2, -1), (-1, -2), (3, 2))


def all_layers_of(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Layer]:
    """The layers and the products with a gate in `graph`, by call."""
    return layers_of(module, graph) | gates_of(module, graph)


def gates_of(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Layer]:
    """The products with a gate in `graph`, by the call of the product."""
    found = {}
    for node in graph.nodes:
        if is_call(node, MULTIPLY) and len(node.args) == 2 and not node.kwargs:
            for value, factors in (node.args, node.args[::-1]):
                if isinstance(value, fx.Node) and isinstance(factors, fx.Node):
                    layer = _gate(module, node, value, factors)
                    if layer is not None:
                        found[node] = layer
    return found


def _gate(module: nn.Module, product: fx.Node, value: fx.Node, factors: fx.Node) -> Layer | None:
    """The layer of `product` = value · factors, if the factors are a gate of the value."""
    expanded = is_call(factors, ("expand_as",)) and factors.args[1:] == (value,)
    end = factors.args[0] if expanded else factors
    inside = _between(value, end, {product, *([factors] if expanded else [])})
    if inside is None or end is value:
        return None
    means = {
        node: flat
        for node in inside
        if node.all_input_nodes == [value] and (flat := _flat_means(module, node)) is not None
    }
    readers = [node for node in inside if value in node.all_input_nodes]
    if not means or any(n not in means and not _is_size(n) for n in readers):
        return None
    calls = [node for node in product.graph.nodes if node in inside and node.op != "get_attr"]
    calls.sort(key=lambda node: node is end)
    function, names = function_of(calls, [value], means=means)
    covers = (*calls, factors) if expanded else tuple(calls)
    pools = tuple(str(node.target) for node in means if node.op == "call_module")
    return Layer("g", value, Gate(tuple(names), pools, function), covers)


def _between(value: fx.Node, end: fx.Node, readers: set[fx.Node]) -> set[fx.Node] | None:
    """The calls from `value` to `end`, and attributes, whose results only these and `readers` read.

    None if there are other inputs or readers.
    """
    found: set[fx.Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node is value or node in found:
            continue
        if node.op in ("placeholder", "output"):
            return None
        found.add(node)
        todo += node.all_input_nodes
    for node in reversed(value.graph.nodes):  # sizes that nothing reads
        if not node.users and node.all_input_nodes and _is_size(node):
            if node.all_input_nodes[0] in {value, *found}:
                found.add(node)
    inner = [node for node in found if node.op != "get_attr"]
    return found if all(found | readers >= node.users.keys() for node in inner) else None


def _flat_means(module: nn.Module, node: fx.Node) -> bool | None:
    """Whether `node` drops the dimensions of its means over H and W; None for any other call."""
    if is_call(node, MEAN):
        given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
        dims = given.get("dim")
        axes = tuple(dims) if isinstance(dims, (list, tuple)) else None
        known = axes in AXES and set(given) <= {"input", "dim", "keepdim"}
        return not given.get("keepdim", False) if known else None
    size = None
    if is_call(node, POOL) and len(node.args) == 2:
        size = node.args[1]
    elif node.op == "call_module":
        size = 1 if is_pool(module.get_submodule(str(node.target))) else None
    return False if size in (1, (1, 1), [1, 1]) else None


def _is_size(node: fx.Node) -> bool:
    """Whether `node` reads N or C of a value, or sizes of which only those are read."""
    name = getattr(node.target, "__name__", node.target)
    if name == "getitem":
        return _is_size(node.args[0]) and (node.args[1] in (0, 1) or not node.users)
    shape = name == "getattr" and node.args[1] == "shape"
    if shape or (name == "size" and len(node.args) == 1):
        readers = [user for user in node.users if user.users]
        return all(
            getattr(user.target, "__name__", "") == "getitem" and user.args[1] in (0, 1)
            for user in readers
        )
    return name == "size" and node.args[1:] in ((0,), (1,))
