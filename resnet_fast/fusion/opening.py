"""A forward together with the forwards of children that are opened in it.

A chain may begin in one module and end in another: a unit of convolution, norm and ReLU that a
block calls, or a norm with a forward of its own. Such a child is opened: its calls take the place
of its call. Only children whose result comes from their input by one call after another can be
opened, and only those are that a chain enters or leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from torch import fx, nn

from ..dispatch.guard import hooked
from .dataflow import Forward
from .gates import all_layers_of
from .layers import DROPOUTS, is_unary, layers_of
from .sandbox import Notes, below

Path = tuple[str, ...]
"""The children that hold a call, from the outermost, by their paths below the root."""


@dataclass(frozen=True)
class Traced:
    """A module at `path` below the root: its graphs by mode, and what they depend on.

    A graph is None where the child cannot be opened. forward: that of its class.
    """

    path: str
    graphs: dict[bool, fx.Graph | None] = field(compare=False)
    cls: type[nn.Module]
    forward: Callable
    children: Path
    notes: Notes

    @classmethod
    def of(cls, path: str, module: nn.Module, graphs, notes: Notes) -> Traced:
        kind = type(module)
        return cls(path, graphs, kind, kind.forward, tuple(module._modules), notes)

    def without(self, named: Collection[str]) -> Traced:
        """This without notes of the children `named` from the root, which are layers of regions."""
        prefix = f"{self.path}." if self.path else ""
        mine = {name.removeprefix(prefix) for name in named if name.startswith(prefix)}
        return replace(self, notes=self.notes.without(mine))

    @property
    def is_identity(self) -> bool:
        """Whether the module returns its input in some mode."""
        graphs = [graph for graph in self.graphs.values() if graph is not None]
        return any(all(n.op in ("placeholder", "output") for n in g.nodes) for g in graphs)

    def holds(self, root: nn.Module) -> bool:
        """Whether the forward of the module, and what it reads, is unchanged since tracing."""
        module = below(root, self.path)
        if self.path and (type(module) is not self.cls or hooked(module)):
            return False
        cls = getattr(type(module), "_plain_class", type(module))
        same = cls.forward is self.forward and "forward" not in vars(module)
        return same and tuple(module._modules) == self.children and self.notes.hold(module)


class Opening:
    """The forward of `root`, and of all children below it that can be opened, by path."""

    def __init__(
        self, root: nn.Module, forward: Forward, find: Callable[[nn.Module], Forward | None]
    ) -> None:
        """find: the forward of a child that may be opened, or None."""
        self.root, self.find = root, find
        graphs = {True: forward.training, False: forward.evaluation}
        self.traced = {"": Traced.of("", root, graphs, forward.notes)}
        self._add("", forward)

    def _add(self, prefix: str, forward: Iterable[fx.Graph]) -> None:
        for graph in forward:
            for node in graph.nodes:
                if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                    path = prefix + node.target
                    if path not in self.traced and isinstance(node.args[0], fx.Node):
                        self._try(path, self.root.get_submodule(path))

    def _try(self, path: str, child: nn.Module) -> None:
        graphs: dict[bool, fx.Graph | None]
        if hooked(child) or "forward" in vars(child):
            return
        if type(child) in DROPOUTS:
            graphs, forward = {True: None, False: _identity()}, None
        elif (forward := self.find(child)) is None:
            return
        else:
            pair = zip((True, False), forward, strict=True)
            graphs = {mode: graph if _is_path(child, graph) else None for mode, graph in pair}
        whole = all(graphs.values()) or (any(graphs.values()) and not [*child.parameters()])
        if not whole or (forward and not _same_norm(child, forward)):
            return
        notes = forward.notes if forward else Notes()
        self.traced[path] = Traced.of(path, child, graphs, notes)
        self._add(f"{path}.", [graph for graph in graphs.values() if graph is not None])


def _identity() -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.placeholder("input"))
    return graph


def _is_path(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether the result of `graph` comes from its only input by calls on one value each."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    at = next(node for node in graph.nodes if node.op == "output").args[0]
    layers = all_layers_of(module, graph)
    while isinstance(at, fx.Node) and (at in layers or is_unary(at)):
        at = layers[at].source if at in layers else at.all_input_nodes[0]
    return [at] == inputs


def _same_norm(module: nn.Module, forward: Forward) -> bool:
    """Whether both forms of a norm, for inputs with and without gradient, are the same layers."""
    if forward.without_grad is None:
        return True
    pairs = zip(forward, forward.without_grad, strict=True)
    return all(_norms(module, one) == _norms(module, other) for one, other in pairs)


def _norms(module: nn.Module, graph: fx.Graph) -> list:
    """The layers of `graph` in order, as far as they decide what it computes."""
    found = []
    for layer in layers_of(module, graph).values():
        options = {"eps": 1e-5, "training": False} | dict(getattr(layer.view, "options", ()))
        if not options["training"]:
            options.pop("momentum", None)
        found.append((layer.letter, layer.view and layer.view.targets, options))
    return found


@dataclass
class Opened:
    """A graph of the root in which children are open, and where its calls come from.

    within: the open children that hold a call. origins: the path of the module that makes it, and
    the call in that module's graph.
    """

    graph: fx.Graph
    within: dict[fx.Node, Path]
    origins: dict[fx.Node, tuple[str, fx.Node]]

    @classmethod
    def of(cls, traced: dict[str, Traced], modes: dict[str, bool]) -> Opened:
        """The root's graph with the children of `traced` open, each as its mode says."""
        whole = cls(fx.Graph(), {}, {})
        graph = traced[""].graphs[modes[""]]
        assert graph is not None
        whole.graph.set_codegen(graph._codegen)
        result = whole._copy(traced, modes, graph, (), None)
        whole.graph.output(result)
        return whole

    def _copy(self, traced, modes, graph: fx.Graph, path: Path, x: fx.Node | None):
        """Append the calls of `graph`; its result. x: the argument, None for the root."""
        values: dict[fx.Node, fx.Node] = {}
        prefix = f"{path[-1]}." if path else ""
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            if node.op == "placeholder" and x is not None:
                values[node] = x
                continue
            where = prefix + str(node.target)
            if node.op == "call_module" and where in traced:
                child = traced[where].graphs[modes[where]]
                if child is not None and len(node.args) == 1 and not node.kwargs:
                    given = values[node.args[0]]
                    values[node] = self._copy(traced, modes, child, (*path, where), given)
                    continue
            copied = values[node] = self.graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copied.target = where
            self.within[copied] = path
            self.origins[copied] = path[-1] if path else "", node
        raise AssertionError("a graph ends in its output")


def crossed(opened: Opened, parts: Iterable[Collection[fx.Node]]) -> set[str]:
    """The open children that some of `parts`, sets of calls, enter or leave."""
    found: set[str] = set()
    for nodes in parts:
        paths = [set(opened.within[node]) for node in nodes]
        found |= set.union(*paths) - set.intersection(*paths)
    return found
