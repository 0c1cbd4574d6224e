"""A walk over a model: what `fuse` is to change, and what `explain` says of everything in it.

From the root down: our own modules; then blocks and `Sequential`s (`match`); then, in
every other forward, runs of conv → norm [→ relu [→ pool]] or norm → relu [→ pool], judged over all
calls in all traced forwards at once, so that a module which is also called elsewhere is seen to be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..blocks import NORMS
from ..models import ResNet
from ..modules import PLAIN, Fused, hooked
from .dataflow import ADD, Mismatch, is_call, is_layer, label, trace
from .match import Block, Steps, letter, match_block, match_steps, refusal


class Run(NamedTuple):
    """Modules that a forward calls in this order, each alone in reading the one before."""

    conv: nn.Module | None
    norm: nn.Module
    relu: nn.Module | None
    pool: nn.Module | None

    def __str__(self) -> str:
        kinds = ("conv", "norm", "relu", "pool")
        return " ".join(kind for kind, m in zip(kinds, self, strict=True) if m is not None)


class Own:
    """The pattern of a module of this package, which has a switch of its own."""


class Row(NamedTuple):
    """What is at `path`, and why it is left alone; where it can be fused, `holder` runs `plan`."""

    path: str
    what: str
    why: str
    holder: nn.Module
    plan: Own | Block | Run | None


@dataclass
class Survey:
    """`plans`: all that can be fused, module and pattern; `rows`: that and what cannot, by path."""

    plans: list[tuple[nn.Module, Own | Block | Steps | Run]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def survey(model: nn.Module) -> Survey:
    """All that can be fused in `model`, whose modules must be unfused but for our own."""
    walk = _Walk(model)
    walk.visit(model)
    walk.find_runs()
    walk.find_rest()
    order = {path: i for i, path in enumerate(walk.paths.values())}
    walk.found.rows.sort(key=lambda row: order[row.path])
    return walk.found


class _Walk:
    """claimed: modules that are taken, or that an untraced forward may call in ways unknown.

    calls: the calls of each module in all traced forwards; callee: the module of each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.found = Survey()
        self.visited: set[nn.Module] = set()
        self.claimed: set[nn.Module] = set()
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self.callee: dict[fx.Node, nn.Module] = {}

    def add(self, module: nn.Module, what: str, why: str = "", holder=None, plan=None) -> None:
        self.found.rows.append(Row(self.paths[module], what, why, holder or module, plan))

    def visit(self, module: nn.Module) -> None:
        if module in self.visited or isinstance(module, torch.jit.ScriptModule):
            return
        self.visited.add(module)
        if isinstance(module, Fused) or type(module) in PLAIN.values():
            self.own(module, list(module.modules())[1:])
        elif isinstance(module, ResNet):
            stem = ("conv1", "bn1", "relu", "bn_last")
            self.own(module, [m for name, m in module.named_children() if name in stem])
        elif getattr(module.forward, "__func__", None) is nn.Sequential.forward:
            self.sequential(module)
        elif list(module.children()) and type(module).forward is not nn.Module.forward:
            self.forward(module)
        for child in module.children():
            if child not in self.claimed:
                self.visit(child)

    def own(self, module: nn.Module, inner: list[nn.Module]) -> None:
        """A module of this package; `inner` are those that its fused forward does not call."""
        self.claimed.update(inner)
        names = [self.paths[m] for m in inner if hooked(m)]
        why = f"{names[0]} has hooks, which would not run" if names else ""
        self.add(module, f"resnet_fast {type(module).__name__}", why)
        if not why:
            self.found.plans.append((module, Own()))

    def sequential(self, module: nn.Sequential) -> None:
        steps = match_steps(module)
        for names, block in steps.groups:
            members = [module._modules[name] for name in names]
            self.claimed.update(m for m in members if block or letter(m) != "-")
            if block:
                self.add(members[0], str(block), holder=module, plan=block)
            elif isinstance(members[0], _ConvNd):
                why = refusal(members[0])
                why = f"it {why}" if why else "no BatchNorm2d that can be fused follows it"
                self.add(members[0], type(members[0]).__name__, why)
        if any(block for _, block in steps.groups):
            self.found.plans.append((module, steps))

    def forward(self, module: nn.Module) -> None:
        """A block, or else calls for `find_runs`."""
        try:
            graphs = trace(module)
        except Mismatch as reason:
            layers = [m for m in module.children() if isinstance(m, (_ConvNd, _BatchNorm))]
            self.claimed.update(layers)
            if layers:
                self.add(module, type(module).__name__, str(reason))
            return
        try:
            if isinstance(module, fx.GraphModule):
                raise Mismatch("it is a GraphModule")
            block = match_block(module, graphs)
        except Mismatch as reason:
            adds = any(is_call(node, ADD) for graph in graphs for node in graph.nodes)
            if adds and any(isinstance(m, _ConvNd) for m in module.children()):
                self.add(module, type(module).__name__, f"not one block: {reason}")
            for graph in graphs:
                for node in graph.nodes:
                    if node.op == "call_module":
                        self.callee[node] = module.get_submodule(node.target)
                        self.calls[self.callee[node]].append(node)
        else:
            self.claimed.update(module.get_submodule(name) for name, _ in block.absorbed)
            self.add(module, f"{type(module).__name__}: {block}", plan=block)
            self.found.plans.append((module, block))

    def find_runs(self) -> None:
        norm_of, relu_of, pool_of, reasons = {}, {}, {}, {}
        for module in self.calls:
            try:
                if module in self.claimed:
                    continue
                if isinstance(module, _ConvNd):
                    norm_of[module] = self.reader(module, NORMS)
                elif isinstance(module, NORMS):
                    relu_of[module] = self.reader(module, nn.ReLU)
                elif isinstance(module, nn.ReLU):
                    pool_of[module] = self.reader(module, nn.MaxPool2d)
            except Mismatch as reason:
                reasons[module] = str(reason)
        read = Counter()
        for norm, relu in relu_of.items():
            read[relu] += len(self.calls[norm])
        for norm, relu in list(relu_of.items()):
            if read[relu] != len(self.calls[relu]):
                reasons[norm] = f"{self.paths[relu]} is also called elsewhere"
                del relu_of[norm]
        for conv, norm in list(norm_of.items()):
            if len(self.calls[conv]) != len(self.calls[norm]):
                reasons[conv] = f"{self.paths[norm]} is also called elsewhere"
                del norm_of[conv]
        conv_of = {norm: conv for conv, norm in norm_of.items()}
        for norm in {**conv_of, **relu_of}:
            relu = relu_of.get(norm)
            run = Run(conv_of.get(norm), norm, relu, pool_of.get(relu))
            self.add(run.conv or norm, str(run), holder=norm, plan=run)
            self.found.plans.append((norm, run))
        for module, reason in reasons.items():
            if module not in conv_of and not isinstance(module, nn.ReLU):
                self.add(module, type(module).__name__, reason)

    def find_rest(self) -> None:
        """Convolutions that nothing has been said of."""
        said = {row.path for row in self.found.rows}
        for module, path in self.paths.items():
            if isinstance(module, _ConvNd) and module not in self.claimed and path not in said:
                self.add(module, type(module).__name__, "no forward that can be traced calls it")

    def reader(self, module: nn.Module, kind: type | tuple[type, ...]) -> nn.Module:
        """The one module of `kind` that reads, alone, whatever `module` returns; else Mismatch."""
        why = refusal(module)
        if why is not None:
            raise Mismatch(f"it {why}")
        readers = {self.next(call) for call in self.calls[module]}
        if len(readers) != 1:
            raise Mismatch("its results go to different modules")
        reader = readers.pop()
        why = (
            refusal(reader) if isinstance(reader, kind) else f"is of class {type(reader).__name__}"
        )
        if why is None and reader in self.claimed:
            why = "belongs to another group"
        if why is not None:
            raise Mismatch(f"its result goes to {self.paths[reader]}, which {why}")
        return reader

    def next(self, call: fx.Node) -> nn.Module:
        """The module whose call alone reads the result of `call`, past any Identity."""
        users, reader = list(call.users), None
        if is_layer(call) and len(users) == 1 and is_layer(users[0]):
            reader = self.callee.get(users[0])
        if reader is None:
            where = label(users[0]) if len(users) == 1 else f"{len(users)} places"
            raise Mismatch(f"its result goes to {where}")
        transparent = isinstance(reader, nn.Identity) and refusal(reader) is None
        return self.next(users[0]) if transparent else reader
