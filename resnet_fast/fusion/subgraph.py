"""Graphs, and some of their calls, as Python functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

Function = Callable[..., Any]


def compiled(graph: fx.Graph) -> Function:
    """forward(self, *inputs) of `graph`."""
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"]


def function_of(
    calls: Sequence[fx.Node],
    inputs: Sequence[fx.Node | None],
    more: Iterable[str] = (),
    means: dict[fx.Node, bool] | None = None,
) -> tuple[Function, list[str]]:
    """A function of the values `inputs`, then of attributes of the module, that runs `calls` and
    returns the result of the last; the names of those attributes, which include `more`.

    means: calls whose result is the first input, flattened to [N,C] where True.
    """
    new, values, held = fx.Graph(), {}, {}
    for i, value in enumerate(inputs):
        given = new.placeholder(f"input_{i}")
        if value is not None:
            values[value] = given
    graph = calls[-1].graph
    attributes = [n for n in graph.nodes if n.op == "get_attr" and n.users.keys() & {*calls}]
    modules = [n.target for n in calls if n.op == "call_module"]
    for name in dict.fromkeys([*(n.target for n in attributes), *modules, *more]):
        held[name] = new.placeholder(f"held_{len(held)}")
    values |= {node: held[node.target] for node in attributes}
    for node in calls:
        args = fx.map_arg(node.args, lambda n: values.get(n, n))
        if means and node in means:
            first = next(iter(new.nodes))
            values[node] = new.call_method("flatten", (first, 1)) if means[node] else first
        elif node.op == "call_module":
            values[node] = new.call_function(_call, (held[node.target], *args))
        else:
            values[node] = new.node_copy(node, values.__getitem__)
    new.output(values[calls[-1]])
    return functools.partial(compiled(new), None), list(held)


def _call(module: nn.Module, *args: Any) -> Tensor:
    return module(*args)
