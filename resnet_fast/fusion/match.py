"""The regions of a graph that can run fused, matched on its dataflow, not on class names.

A region is one `spec.chain`: layers each of which alone reads the result of the one before, then
perhaps an addition and a ReLU, or a max-pool. Beside the layers runs a shortcut: the value that
they begin with, a convolution with or without norm of it, or any other value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx, nn

from ..spec.layers import NORMS, Parts
from .dataflow import label
from .gates import all_layers_of
from .layers import (
    ADD,
    ADD_IN_PLACE,
    DROPOUTS,
    FUNCTIONS,
    MULTIPLY,
    PARAMETERS,
    Gate,
    Named,
    attribute,
    checks_of,
    is_call,
    is_unary,
)  # fmt: skip
from .sandbox import internal

# Chains in letters: c conv, n norm, r relu, m max-pool, g product with a gate.
CONVS = "(nr)?c(nrc)*"
ALONE = re.compile(f"{CONVS}(r|n(rm?)?)?|nrm?")
BESIDE_A_SHORTCUT = re.compile(f"({CONVS})?ng|({CONVS})?n?")
CONVOLUTIONS = [function for function, (kind, _) in FUNCTIONS.items() if kind == "conv"]
AS_FAST = "for which PyTorch is as fast"
NO_GAIN = f"it has no norm, and channels that are no multiples of 32, {AS_FAST}"
FRESH = (*MULTIPLY, torch.cat, *(f for f in ADD if f not in ADD_IN_PLACE))
"""Functions whose result is a tensor of its own."""


class Refused(Exception):
    """Why calls that form a chain cannot run fused."""


class _Side(NamedTuple):
    """One side of an addition: its layers, and what is added to their result.

    skipped: identities that lead to `other`. beside_x: the shortcut begins where the layers do.
    """

    calls: list[fx.Node]
    other: fx.Node
    skipped: Sequence[fx.Node] = ()
    projection: Sequence[fx.Node] = ()
    beside_x: bool = False


@dataclass(frozen=True)
class Region:
    """Calls of a graph that one fused call replaces; `calls` ends in the one that gives its result.

    parts: the chain, each layer as a `layers.View`. x: the value that it begins with. residual: the
    value that it adds, unless that is x or a projection. beside: what gives the residual. around:
    its ReLUs and identities that are modules. gate: what multiplies the result of the layers.
    in_place: it adds in place, so that the result has the dtype of one operand. results: modules to
    whose result it adds in place. place: the module of its first layer.
    """

    calls: tuple[fx.Node, ...] = field(compare=False)
    parts: Parts
    x: fx.Node = field(compare=False)
    residual: fx.Node | None = field(default=None, compare=False)
    beside: str = ""
    around: tuple[Named, ...] = ()
    gate: Gate | None = None
    in_place: bool = False
    results: tuple[str, ...] = ()
    place: str = ""

    def __str__(self) -> str:
        parts, words = self.parts, []
        for norm, conv in zip(parts.norms, (*parts.convs, None), strict=True):
            words += [norm and "norm", norm and conv and "relu", conv and "conv"]
        shortcut = {
            "none": self.residual is not None and f"+ {self.beside}",
            "identity": "+ x",
            "projection": "+ conv norm(x)" if parts.projection_norm else "+ conv(x)",
        }
        ends = parts.relu and "relu", parts.pool and "pool"
        words += [self.gate and "gate", shortcut[parts.shortcut], *ends]
        if not any(words[:-4]):
            return "add relu"
        return " ".join(filter(None, words))

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that it replaces, by name."""
        return tuple(n.target for n in self.calls if n.op == "call_module")


def regions_of(module: nn.Module, graph: fx.Graph) -> tuple[list[Region], dict[fx.Node, str]]:
    """The regions of `graph`, in its order, and why additions of two values, and convolutions that
    functions compute, are in none.
    """
    flow = _Flow(module, graph)
    regions: list[Region] = []
    reasons: dict[fx.Node, str] = {}
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if not is_addition(node) or node in flow.layers or node in flow.inside:
            continue
        found = flow.join(node, taken)
        if isinstance(found, str):
            reasons[node] = found
            continue
        regions.append(found)
        taken.update(found.calls)
    for path in flow.paths(taken):
        regions += flow.groups(path)
    taken.update(call for region in regions for call in region.calls)
    for node in graph.nodes:
        if is_call(node, CONVOLUTIONS) and node not in taken and node not in flow.inside:
            computed = "its filters are computed, or another argument cannot be fused"
            reasons[node] = NO_GAIN if node in flow.layers else computed
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(regions, key=lambda region: order[region.calls[-1]]), reasons


def is_addition(node: fx.Node) -> bool:
    """Whether `node` adds two values."""
    return is_call(node, ADD) and len(node.all_input_nodes) == 2


class _Flow:
    """The layers of a graph and who reads their results."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.layers = all_layers_of(module, graph)
        self.checks = checks_of(graph)
        self.inside = {part: node for node, one in self.layers.items() for part in one.covers}

    def kind(self, value: fx.Node) -> str:
        """The letter of `value`; "" if it is not the result of a layer."""
        return self.layers[value].letter if value in self.layers else ""

    def readers(self, value: fx.Node) -> set[fx.Node]:
        """The calls that read `value`, apart from checks of its dimensions."""
        return {self.inside.get(user, user) for user in value.users if user not in self.checks}

    def reader(self, value: fx.Node) -> fx.Node | None:
        """The only call that reads `value`, apart from checks of its dimensions."""
        readers = self.readers(value)
        return readers.pop() if len(readers) == 1 else None

    def chain_to(self, end: fx.Node, taken: set[fx.Node]) -> list[fx.Node]:
        """The layers that lead to `end`, each the only reader of the one before."""
        calls: list[fx.Node] = []
        while end in self.layers and end not in taken:
            if calls and self.reader(end) is not calls[0]:
                break
            calls.insert(0, end)
            end = self.layers[end].source
        return calls

    def letters(self, calls: list[fx.Node]) -> str:
        """The letters of `calls`, without identities."""
        return "".join(map(self.kind, calls)).replace("i", "")

    def paths(self, taken: set[fx.Node]) -> Iterator[list[fx.Node]]:
        """The longest runs of layers outside `taken`, each the only reader of the one before."""
        path: dict[fx.Node, list[fx.Node]] = {}
        for node, layer in self.layers.items():
            if node in taken:
                continue
            before = path.get(layer.source)
            if before is not None and self.reader(layer.source) is node:
                before.append(node)
                path[node] = before
            else:
                path[node] = [node]
        yield from {id(one): one for one in path.values()}.values()

    def region(self, calls: list[fx.Node], more: list[fx.Node], **fields) -> Region:
        """The region of the layers `calls`, and of `more` calls, the last of them its end.

        Refused if a call among them changes their input in place.
        """
        nodes, end = {*calls, *more}, (more or calls)[-1]
        for node in (*calls, *more):
            nodes.update(self.layers[node].covers if node in self.layers else ())
        inner = nodes - {end}
        nodes.update(check for check, value in self.checks.items() if value in inner)
        in_order = [node for node in self.graph.nodes if node in nodes]
        given = {fields["x"], fields.get("residual")}
        for node in in_order:
            for value in node.all_input_nodes:
                if value not in nodes and value not in given and value.op != "get_attr":
                    raise Refused(f"{label(node)} reads another value too")
        self.check_between(nodes, fields["x"])
        found = [self.layers[node] for node in in_order if self.kind(node) in ("r", "i")]
        around = [layer.view for layer in found if layer.view is not None]
        place = ""
        for call in calls[:1]:
            view = self.layers[call].view
            name = str(view.targets[0]) if view and view.targets and view.targets[0] else ""
            place = name if isinstance(view, Named) else name.rpartition(".")[0]
        kept = tuple(dict.fromkeys(around))
        return Region(tuple(in_order), around=kept, place=place, **fields)

    def check_gate(self, calls: list[fx.Node]) -> None:
        """Refused if the gate at the end of `calls` reads or calls the norm before it."""
        norm, gate = [self.layers[call] for call in calls if self.kind(call) in ("n", "g")][-2:]
        view = norm.view
        assert view is not None
        names = {*view.targets, *(f"{view.targets[0]}.{name}" for name in PARAMETERS)}
        called = {node.target for node in gate.covers if node.op == "call_module"}
        inside = [m for name in called for m in self.module.get_submodule(name).modules()]
        own = [self.module.get_submodule(view.targets[0])] if isinstance(view, Named) else []
        read = {n.target for c in gate.covers for n in c.all_input_nodes if n.op == "get_attr"}
        if any(module in own for module in inside) or names & read:
            raise Refused("the gate reads the norm before it")

    def check_between(self, nodes: set[fx.Node], x: fx.Node) -> None:
        """Refused if calls among `nodes`, which run at the last of them, change what these read."""
        order = list(self.graph.nodes)
        places = [i for i, node in enumerate(order) if node in nodes]
        between = [node for node in order[places[0] : places[-1]] if node not in nodes]
        if not between:
            return
        targets = {n.target for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
        modules = {self.module.get_submodule(n.target) for n in nodes if n.op == "call_module"}
        norms = {module for module in modules if isinstance(module, NORMS)}
        gated = [part for n in nodes if self.kind(n) == "g" for part in self.layers[n].covers]
        if any(map(self.may_draw, gated)) and any(map(self.may_draw, between)):
            raise Refused("its gate and the shortcut may draw random numbers")
        for node in between:
            for value in node.all_input_nodes:
                if value.op == "get_attr":
                    if value.target in targets:
                        raise Refused(f"{value.target} is used in between")
                elif self.in_place(node) and (value is x or not self.is_fresh(value)):
                    raise Refused(f"{label(node)} changes a value in place; set inplace=False")
            if node.op == "call_module" and norms:
                if not norms.isdisjoint(self.module.get_submodule(str(node.target)).modules()):
                    raise Refused(f"{node.target} is called in between")

    def may_draw(self, node: fx.Node) -> bool:
        """Whether `node` may draw random numbers, or change a state of its own."""
        if node.op == "call_module":
            modules = list(self.module.get_submodule(str(node.target)).modules())
            own = [type(m) in DROPOUTS or not internal(type(m).__module__) for m in modules]
            return any(own)
        name = label(node)
        return any(word in name for word in ("drop", "rand", "bernoulli", "normal_", "uniform_"))

    def is_fresh(self, value: fx.Node) -> bool:
        """Whether `value` is a new tensor, which shares memory with no other value."""
        return self.kind(value) in ("c", "n", "m") or is_call(value, FRESH)

    def in_place(self, node: fx.Node) -> bool:
        """Whether `node` is known to change the value that it reads."""
        if node.op != "call_module":
            name = label(node).removesuffix(".default").removesuffix(".Tensor")
            if True in (node.kwargs.get("inplace"), *node.args[1:2]):  # F.relu(x, True)
                return True
            return name in ("iadd", "imul", "setitem") or (name[-1:] == "_" and name[-2:] != "__")
        first = self.module.get_submodule(str(node.target))
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        return getattr(first, "inplace", False) is True

    def groups(self, path: list[fx.Node]) -> Iterator[Region]:
        """The chains without a shortcut in `path`."""
        calls = [call for call in path if self.kind(call) != "i"]
        letters, at = self.letters(calls), 0
        while at < len(letters):
            found = ALONE.match(letters, at)
            size = len(found.group()) if found else 0
            while size > 0 and self.gains(calls[at : at + size]):
                inner = path[path.index(calls[at]) : path.index(calls[at + size - 1]) + 1]
                parts, x = self.parts(inner, "none"), self.layers[inner[0]].source
                try:
                    yield self.region(inner, [], parts=parts, x=x)
                    break
                except Refused:  # perhaps because of what runs before its last call
                    shorter = ALONE.match(letters[: at + size - 1], at)
                    size = len(shorter.group()) if shorter else 0
            at += max(size, 1)

    def gains(self, calls: list[fx.Node]) -> bool:
        """Whether to run the layers `calls` in one call: if a norm or a tiled convolution is among
        them.

        Not tiled are numbers of channels that are no multiples of 32 (a network's first convolution
        has fewer), depthwise convolutions, and those in a gate, on one pixel for each channel.
        """
        kinds = [self.kind(call) for call in calls]
        if "n" in kinds or "c" not in kinds:
            return "n" in kinds
        call = calls[kinds.index("c")]
        view = self.layers[call].view
        assert view is not None and view.targets[0] is not None
        if isinstance(view, Named):
            conv = self.module.get_submodule(view.targets[0])
            weight, groups = conv.weight, conv.groups
        else:
            weight = attribute(self.module, view.targets[0])
            groups = dict(getattr(view, "options", ())).get("groups", 1)
        filters, channels = weight.shape[:2]
        few = groups == 1 and channels < 8
        whole = channels % 8 == 0 and channels * groups % 32 == 0
        return call not in self.inside and filters % 32 == 0 and (few or whole)

    def parts(self, calls: list[fx.Node], shortcut: str, relu: bool = False, **more) -> Parts:
        """The chain of `calls`, each layer as a view, with a ReLU at its end if it has one.

        A gate is no part of it.
        """
        convs, norms, pool = [], [None], None
        for layer in map(self.layers.__getitem__, calls):
            if layer.letter == "n":
                norms[-1] = layer.view
            elif layer.letter == "c":
                convs.append(layer.view)
                norms.append(None)
            elif layer.letter == "m":
                pool = layer.view
        ends = self.letters(calls).removesuffix("m").endswith("r")
        return Parts(tuple(convs), tuple(norms), ends or relu, shortcut, pool=pool, **more)

    def join(self, add: fx.Node, taken: set[fx.Node]) -> Region | str:
        """The region that ends in the addition `add`, or in the ReLU after it; or why there is
        none.
        """
        if len(add.args) != 2 or add.kwargs:
            return f"{label(add)} has more arguments than two values"
        ends = [add]
        while (after := self.reader(ends[-1])) is not None and self.kind(after) == "i":
            ends.append(after)
        relu = after is not None and self.kind(after) == "r"
        ends = [*ends, after] if relu else [add]
        sides = [self.beside(*pair, taken) for pair in (add.args, add.args[::-1])]
        sides.sort(key=lambda side: (not side.beside_x, -len(side.calls)))
        sides = [side for side in sides if self.gains(side.calls)]
        if relu:
            sides.append(_Side([], add.args[1]))
        try:
            nothing = "no fused norm or convolution is before it, and no ReLU after it"
            return self.sum(add, sides[0], ends, relu) if sides else nothing
        except Refused as why:
            return str(why)

    def sum(self, add: fx.Node, side: _Side, ends: list[fx.Node], relu: bool) -> Region:
        """The region of `side` and the calls `ends`; Refused if it would not do the same."""
        order = list(self.graph.nodes)
        for node in order[order.index(add) : order.index(ends[-1])]:
            if node.op.startswith("call") and node not in ends and node not in self.checks:
                raise Refused(f"{label(node)} runs between the addition and its ReLU")
        calls, projection = side.calls, side.projection
        results: tuple[str, ...] = ()
        target = add.args[0]
        if is_call(add, ADD_IN_PLACE) and not projection and target not in calls[-1:]:
            results = self.results(target)
        x = self.layers[calls[0]].source if calls else target
        names = ("projection", "projection_norm")
        views = [self.layers[call].view for call in projection if self.kind(call) != "i"]
        fields = dict(zip(names, views, strict=False))
        shortcut = "projection" if projection else "identity" if side.beside_x else "none"
        if shortcut == "identity":
            self.check_channels(calls)
        residual = side.other if shortcut == "none" else None
        named = residual is not None and residual.op == "call_module"
        beside = f"{residual.target}(x)" if named else "residual"
        gates = [self.layers[call].view for call in calls if self.kind(call) == "g"]
        if gates:
            self.check_gate(calls)
        return self.region(
            calls, [*projection, *side.skipped, *ends], x=x, residual=residual,
            parts=self.parts(calls, shortcut, relu, **fields),
            beside=beside if residual is not None else "", results=results,
            gate=gates[0] if gates else None, in_place=is_call(add, ADD_IN_PLACE),
        )  # fmt: skip

    def beside(self, main: fx.Node, other: fx.Node, taken: set[fx.Node]) -> _Side:
        """The layers that lead to `main`, and the shortcut `other`."""
        path = self.chain_to(main, taken) if self.reader(main) is not None else []
        while path and not BESIDE_A_SHORTCUT.fullmatch(self.letters(path)):
            path = path[1:]
        while path and self.kind(path[0]) == "i":
            path = path[1:]
        if not path:
            return _Side([], other)
        base = self.layers[path[0]].source
        skipped = self.identities(other, taken)
        start = self.layers[skipped[0]].source if skipped else other
        if start is base:
            return _Side(path, base, skipped, beside_x=True)
        letters = self.letters(path)
        if letters.endswith("g") or "c" not in letters:
            return _Side(path, other)
        kinds = ("c", "cn") if letters.endswith("n") else ("c",)
        projection = self.chain_to(other, taken) if self.reader(other) is not None else []
        if self.letters(projection) not in kinds or self.layers[projection[0]].source is not base:
            return _Side(path, other)
        if letters.startswith("nr"):
            return _Side(path, other)  # a projection reads φ(x) then
        if self.kind(base) == "r" and self.readers(base) == {path[0], projection[0]}:
            first = self.chain_to(base, taken)
            while len(self.letters(first)) > 2:
                first = first[1:]
            if self.letters(first) == "nr":
                return _Side([*first, *path], other, projection=projection, beside_x=True)
        return _Side(path, other, projection=projection, beside_x=True)

    def identities(self, value: fx.Node, taken: set[fx.Node]) -> list[fx.Node]:
        """The identities that lead to `value`, if nothing else reads them."""
        calls = self.chain_to(value, taken) if self.reader(value) is not None else []
        while calls and not all(self.kind(call) == "i" for call in calls):
            calls = calls[1:]
        return calls

    def check_channels(self, calls: list[fx.Node]) -> None:
        """Refused if the convolutions of `calls` do not keep the number of channels."""
        views = [self.layers[call].view for call in calls if self.kind(call) == "c"]
        if views and all(isinstance(view, Named) for view in views):
            convs = [self.module.get_submodule(view.targets[0]) for view in views]
            if convs[0].in_channels != convs[-1].out_channels:
                raise Refused(
                    f"it broadcasts {convs[0].in_channels} input to {convs[-1].out_channels} "
                    "output channels"
                )

    def results(self, value: fx.Node) -> tuple[str, ...]:
        """Modules that return `value`; Refused if it may be in use elsewhere.

        An addition in place changes it, but the fused call does not.
        """
        names: list[str] = []
        while self.reader(value) is not None:
            if value.op == "call_module":
                names.append(str(value.target))
            if self.is_fresh(value):
                return tuple(names)
            if value in self.layers:
                value = self.layers[value].source
            elif value.op == "call_module" and is_unary(value):
                value = value.all_input_nodes[0]
            else:
                break
        raise Refused("it adds in place to a value that may be in use elsewhere; write a + b")
