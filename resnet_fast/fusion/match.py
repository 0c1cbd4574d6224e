"""The patterns that can run fused, matched on the dataflow of a forward, not on class names.

    block  a whole forward that is one `spec.chain`, with or without a shortcut
    group  consecutive calls in any other forward that form a chain without a shortcut

A chain consists of conv (Conv2d), norm (BatchNorm2d or SyncBatchNorm) and relu (a ReLU module or
function). A MaxPool2d may end a chain without a shortcut. A forward that does not match raises
`Mismatch` with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from ..dispatch.guard import refusal
from ..spec.layers import NORMS, Parts
from .dataflow import ADD, ADD_IN_PLACE, Forward, Mismatch, is_call, is_layer, label

# Chains in letters: c conv, b conv with a bias (absorbed by the norm after it), n norm, r relu,
# m max-pool.
UNITS = "((nr)?(c|b(?=n)))*"
ALONE = re.compile(f"{UNITS}(n(rm?)?)?")
BESIDE_A_SHORTCUT = re.compile(f"{UNITS}n?")
WORDS = {"c": "conv", "b": "conv+bias", "n": "norm", "r": "relu", "m": "pool", "-": "other"}


@dataclass(frozen=True)
class Block:
    """A chain by name; names are dotted paths from the module that holds the layers.

    parts: the chain, each layer by its name. residual: the child that is called on x and added.
    absorbed: every module that a fused call replaces, with its class and number of children.
    """

    parts: Parts
    residual: str | None = None
    absorbed: tuple[tuple[str, type[nn.Module], int], ...] = ()

    def __str__(self) -> str:
        parts, words = self.parts, []
        for norm, conv in zip(parts.norms, (*parts.convs, None), strict=True):
            words += [norm and "norm", norm and conv and "relu", conv and "conv"]
        shortcut = {
            "none": self.residual and f"+ {self.residual}(x)",
            "identity": "+ x",
            "projection": "+ conv norm(x)" if parts.projection_norm else "+ conv(x)",
        }
        words += [shortcut[parts.shortcut], parts.relu and "relu", parts.pool and "pool"]
        return " ".join(filter(None, words))


@dataclass(frozen=True)
class Group:
    """Consecutive calls in a graph that form a chain; `block` names the modules that they call."""

    calls: tuple[fx.Node, ...]
    block: Block


def letter(module: nn.Module) -> str:
    """The letter of a fusible layer, "-" for any other module."""
    if refusal(module) is not None:
        return "-"
    if isinstance(module, nn.Conv2d):
        return "c" if module.bias is None else "b"
    kinds = {NORMS: "n", nn.ReLU: "r", nn.MaxPool2d: "m"}
    return next((kinds[kind] for kind in kinds if isinstance(module, kind)), "-")


def layers(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """(letter, name) of each layer that `module` runs; Mismatch if one cannot be fused."""
    why = refusal(module)
    if why is not None:
        raise Mismatch(f"{name} {why}")
    if isinstance(module, nn.Sequential):
        for child_name, child in module._modules.items():
            yield from layers(f"{name}.{child_name}", child)
    elif not isinstance(module, nn.Identity):
        yield letter(module), name


def words(letters: str) -> str:
    """The layers of `letters` in words."""
    return " ".join(WORDS[one] for one in letters)


def chain(letters: str, names: Iterable[str], shortcut: str = "none", **projection: str) -> Parts:
    """The chain of `letters`, with the `names` of its layers, beside `shortcut`."""
    convs, norms, pool = [], [None], None
    for one, name in zip(letters, names, strict=True):
        if one == "n":
            norms[-1] = name
        elif one in "cb":
            convs.append(name)
            norms.append(None)
        elif one == "m":
            pool = name
    layers = tuple(convs), tuple(norms)
    return Parts(*layers, ends_in_relu(letters), shortcut, pool=pool, **projection)


def ends_in_relu(letters: str) -> bool:
    """Whether the chain ends in a ReLU, or in a ReLU and a pool."""
    return letters.removesuffix("m").endswith("r")


def absorbed(
    module: nn.Module, names: Iterable[str]
) -> tuple[tuple[str, type[nn.Module], int], ...]:
    """Name, class and number of children of each child in `names` and of every module below."""
    return tuple(
        (path, type(m), len(m._modules))
        for name in dict.fromkeys(names)
        for path, m in module.get_submodule(name).named_modules(prefix=name)
    )


def match_groups(module: nn.Module, graph: fx.Graph) -> list[Group]:
    """The longest chains among consecutive calls in `graph`."""
    groups, path = [], []
    for node in [*graph.nodes, None]:
        follows = path and node is not None and is_layer(node) and node.args[0] is path[-1]
        if not (follows and len(path[-1].users) == 1):
            groups += _groups(module, path)
            path = []
        if node is not None and is_layer(node):
            path.append(node)
    return groups


def _groups(module: nn.Module, path: list[fx.Node]) -> Iterator[Group]:
    """The chains in `path`, where each call is the only reader of the one before it."""
    calls = [call for call in path if not _is_identity(module, call)]
    letters = "".join(_letter(module, call) for call in calls)
    at = 0
    while at < len(letters):
        found = ALONE.match(letters, at).group()
        if len(found) >= 2 and "n" in found:
            first, last = calls[at], calls[at + len(found) - 1]
            group = path[path.index(first) : path.index(last) + 1]
            names = [call.target if call.op == "call_module" else "" for call in group]
            own = [name for name, call in zip(names, group, strict=True) if call in calls]
            gone = absorbed(module, filter(None, names))
            yield Group(tuple(group), Block(chain(found, own), absorbed=gone))
        at += max(len(found), 1)


def _letter(module: nn.Module, call: fx.Node) -> str:
    return "r" if call.op != "call_module" else letter(module.get_submodule(call.target))


def _is_identity(module: nn.Module, call: fx.Node) -> bool:
    if call.op != "call_module":
        return False
    called = module.get_submodule(call.target)
    return isinstance(called, nn.Identity) and refusal(called) is None


class _Path:
    """The layers, in letters and by name, from the value `base` to the value `end`.

    base: one of `stops`, or a value that is not the result of a layer. seen: for each value on the
    path, the number of layers before it. problem: why a layer cannot be fused, or "".
    """

    def __init__(self, module: nn.Module, end: fx.Node, stops: Collection[fx.Node] = ()) -> None:
        calls, self.base = [], end
        while self.base not in stops and is_layer(self.base):
            calls.insert(0, self.base)
            self.base = self.base.args[0]
        self.letters, self.problem, self.seen = "", "", {self.base: 0}
        self.names: list[str] = []
        for call in calls:
            try:
                found = [("r", "")]
                if call.op == "call_module":
                    found = list(layers(call.target, module.get_submodule(call.target)))
            except Mismatch as reason:
                self.problem = str(reason)
                break
            self.letters += "".join(one for one, _ in found)
            self.names += [name for _, name in found]
            self.seen[call] = len(self.letters)

    def expect(self, pattern: re.Pattern[str], what: str) -> None:
        """Mismatch unless the layers match `pattern`; `what` names the path in the message."""
        if self.problem or not pattern.fullmatch(self.letters):
            found = words(self.letters) or "empty"
            raise Mismatch(self.problem or f"{what} is {found}, which has no fused form")


def match_block(module: nn.Module, forward: Forward) -> Block:
    """The chain that `forward` of `module` computes; Mismatch if it is not exactly one chain."""
    training, evaluation = (_match_graph(module, graph) for graph in forward)
    if training != evaluation:
        raise Mismatch("its forward differs between training and evaluation mode")
    return training


def _match_graph(module: nn.Module, graph: fx.Graph) -> Block:
    """Match y = main(x) or y = relu(main(x) + shortcut(x)) from y backwards; no other calls."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
        raise Mismatch("its forward does not take one tensor and return one tensor")
    x, end = inputs[0], _Path(module, output.args[0])
    if end.base is x:
        end.expect(ALONE, "it")
        block, known = Block(chain(end.letters, end.names)), end.seen
    else:
        block, known = _match_sum(module, end.base, x)
        end.expect(re.compile("r?"), "what follows its addition")
        block = replace(block, parts=block.parts._replace(relu=ends_in_relu(end.letters)))
        known = {**known, **end.seen}
    for node in graph.nodes:
        if node not in known and node is not output:
            raise Mismatch(f"its forward also runs {label(node)}")
    if not any(block.parts.norms) or (end.base is x and len(end.letters) < 2):
        raise Mismatch("it has no BatchNorm2d with another layer to fuse")
    called = [node.target for node in known if node.op == "call_module"]
    called = [name for name in called if name != block.residual]
    return replace(block, absorbed=absorbed(module, called))


def _match_sum(module: nn.Module, join: fx.Node, x: fx.Node) -> tuple[Block, dict[fx.Node, int]]:
    """Match main(x) + shortcut(x), in either order; the block, and the nodes that it covers."""
    sides = join.all_input_nodes
    if not is_call(join, ADD) or len(sides) != 2 or len(join.args) != 2 or join.kwargs:
        raise Mismatch(f"its result comes from {label(join)}, not from a plain sum of two values")
    sides = sorted(sides, key=lambda side: -len(_Path(module, side).letters))
    reasons = []
    for main, shortcut in (sides, sides[::-1]):
        try:
            path = _Path(module, main)
            if path.base is not x:
                start = f"its main path starts at {label(path.base)}, not at its input"
                raise Mismatch(path.problem or start)
            path.expect(BESIDE_A_SHORTCUT, "its main path")
            block, nodes = _match_shortcut(module, path, shortcut)
            in_place = is_call(join, ADD_IN_PLACE) and join.args[0] is shortcut
            if in_place and block.parts.projection is None:
                raise Mismatch("it adds in place to its input; write a + b")
        except Mismatch as reason:
            reasons.append(reason)
        else:
            return block, {**path.seen, **nodes}
    raise reasons[0]


def _match_shortcut(
    module: nn.Module, main: _Path, end: fx.Node
) -> tuple[Block, dict[fx.Node, int]]:
    """The block of `main` and the shortcut that ends in `end`, and the shortcut's nodes."""
    letters, names = main.letters, main.names
    path = _Path(module, end, stops=main.seen)
    begins = None if path.problem else main.seen.get(path.base)
    convs = [m for m in map(module.get_submodule, names) if isinstance(m, nn.Conv2d)]
    if path.letters == "" and begins == 0 and letters:
        if convs and convs[0].in_channels != convs[-1].out_channels:
            sizes = f"{convs[0].in_channels} input to {convs[-1].out_channels} output channels"
            raise Mismatch(f"its addition broadcasts {sizes}")
        return Block(chain(letters, names, "identity")), path.seen
    inside = 2 if letters.startswith("nr") else 0  # a projection reads φ[0](x)
    kinds = ("c", "cn", "bn") if letters.endswith("n") else ("c",)
    if path.letters in kinds and begins == inside and convs:
        fields = dict(zip(("projection", "projection_norm"), path.names, strict=False))
        return Block(chain(letters, names, "projection", **fields)), path.seen
    if is_layer(end) and end.op == "call_module" and end.args[0] is main.base:
        first = module.get_submodule(end.target)
        while isinstance(first, nn.Sequential) and len(first):
            first = first[0]
        if getattr(first, "inplace", False):
            raise Mismatch(f"{end.target} changes its input in place; set inplace=False")
        return Block(chain(letters, names), end.target), {end: 0}
    found = words(path.letters) or label(path.base)
    raise Mismatch(path.problem or f"its shortcut is {found}, which has no fused form")
