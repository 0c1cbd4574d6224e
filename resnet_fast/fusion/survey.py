"""A walk over a model: what `fuse` is to change, and what `explain` says of everything in it.

From the root down: modules of this package; blocks; then, in every other forward that can be
traced, chains among its calls (`match`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..dispatch.guard import obstacle, refusal
from ..models import ResNet
from ..modules import PLAIN, Fused
from ..spec.layers import NORMS, Parts
from .dataflow import ADD, Forward, Mismatch, is_call, is_layer, label, sequence, trace
from .match import Block, match_block
from .swap import Own, Plan, plan_block, plan_forward

NOT_CALLED = "only where it is called: no forward that can be traced calls it"


class Row(NamedTuple):
    """What is at `path`. `holder` runs `plan`, or it is left alone: `why` says why, or when."""

    path: str
    what: str
    why: str
    holder: nn.Module
    plan: Own | Block | None


@dataclass
class Survey:
    """`plans`: all that can be fused, module and plan; `rows`: that and what cannot, by path."""

    plans: list[tuple[nn.Module, Own | Plan]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def survey(model: nn.Module, impl: str = "auto") -> Survey:
    """All that can be fused in `model`, whose modules must be unfused but for our own."""
    walk = _Walk(model, impl)
    walk.visit(model)
    walk.find_rest()
    walk.find_uncalled(model)
    order = {path: i for i, path in enumerate(walk.paths.values())}
    walk.found.rows.sort(key=lambda row: order[row.path])
    return walk.found


class _Walk:
    """claimed: modules that are taken, or that an untraced forward may call in ways unknown.

    calls: the calls of each module in all traced forwards.
    """

    def __init__(self, model: nn.Module, impl: str) -> None:
        self.impl = impl
        self.paths = {module: path for path, module in model.named_modules()}
        self.found = Survey()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.visited: set[nn.Module] = set()
        self.claimed: set[nn.Module] = set()
        self.calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)

    def add(self, module: nn.Module, what: str, why: str = "", holder=None, plan=None) -> None:
        self.found.rows.append(Row(self.paths[module], what, why, holder or module, plan))

    def visit(self, module: nn.Module) -> None:
        if module in self.visited or isinstance(module, torch.jit.ScriptModule):
            return
        self.visited.add(module)
        if isinstance(module, Fused) or type(module) in PLAIN.values():
            self.claimed.update(list(module.modules())[1:])
            self.own(module, [module.parts()])
        elif isinstance(module, ResNet):
            self.net(module)
        elif list(module.children()) and type(module).forward is not nn.Module.forward:
            self.forward(module)
        for child in module.children():
            if child not in self.claimed:
                self.visit(child)

    def own(self, module: nn.Module, chains: list[Parts | None]) -> None:
        """A module of this package, whose forward is `chains` and what it calls."""
        what, why = f"resnet_fast {type(module).__name__}", ""
        for parts in chains:
            if parts is None:
                why = "its children are no longer a chain"
            elif (found := obstacle(parts)) is not None:
                why = f"{self.paths[found[0]]} {found[1]}"
        self.add(module, what, why, plan=None if why else Own())
        if not why:
            self.found.plans.append((module, Own()))

    def net(self, module: ResNet) -> None:
        chains = module.chains()
        for parts in chains:
            self.claimed.update(m for m in (*parts.convs, *parts.norms, *parts.around) if m)
        self.own(module, chains)
        for child in module.children():
            self.calls[child] = []

    def forward(self, module: nn.Module) -> None:
        """A block, or else chains among its calls."""
        try:
            if isinstance(module, fx.GraphModule):
                raise Mismatch("it is a GraphModule")
            forward = sequence(module)
            if forward is not None:
                self.chains(module, forward)
                return
            forward = trace(module, self.fake)
        except Mismatch as reason:
            layers = [m for m in module.children() if isinstance(m, (_ConvNd, _BatchNorm))]
            self.claimed.update(layers)
            if layers:
                self.add(module, type(module).__name__, str(reason))
            return
        try:
            block = match_block(module, forward)
        except Mismatch as reason:
            adds = any(is_call(node, ADD) for graph in forward for node in graph.nodes)
            if adds and any(isinstance(m, _ConvNd) for m in module.children()):
                self.add(module, type(module).__name__, f"not one block: {reason}")
            self.chains(module, forward)
        else:
            self.claimed.update(module.get_submodule(name) for name, *_ in block.absorbed)
            self.add(module, f"{type(module).__name__}: {block}", plan=block)
            self.found.plans.append((module, plan_block(module, forward, block)))
            if block.residual is not None:
                self.calls[module.get_submodule(block.residual)] = []

    def chains(self, module: nn.Module, forward: Forward) -> None:
        """Chains among the calls of `module`, and why its other convolutions are in none."""
        plan = plan_forward(module, forward, self.impl)
        taken = set()
        for block in plan.blocks if plan else ():
            names = [name for name, *_ in block.absorbed]
            taken.update(module.get_submodule(name) for name in names)
            first = module.get_submodule(names[0])
            self.add(first, str(block), holder=module, plan=block)
        if plan:
            self.found.plans.append((module, plan))
        for graph in forward:
            for node in graph.nodes:
                if node.op == "call_module":
                    called = module.get_submodule(node.target)
                    self.calls[called].append(node)
                    if isinstance(called, (_ConvNd, *NORMS)) and called not in taken:
                        taken.add(called)
                        self.add(called, type(called).__name__, self.reason(module, node))
        self.claimed.update(taken)

    def reason(self, module: nn.Module, call: fx.Node) -> str:
        """Why the layer of `call` is in no chain."""
        why = refusal(module.get_submodule(call.target))
        if why is not None:
            return f"it {why}"
        users = list(call.users)
        if len(users) != 1:
            return f"its result goes to {len(users)} places"
        if users[0].op != "call_module" or not is_layer(users[0]):
            return f"its result goes to {label(users[0])}"
        reader = module.get_submodule(users[0].target)
        why = refusal(reader)
        if why is not None:
            return f"its result goes to {self.paths[reader]}, which {why}"
        return "no BatchNorm2d that can be fused follows it"

    def find_rest(self) -> None:
        """Convolutions that nothing has been said of."""
        said = {row.path for row in self.found.rows}
        for module, path in self.paths.items():
            if isinstance(module, _ConvNd) and module not in self.claimed and path not in said:
                self.add(module, type(module).__name__, "no forward that can be traced calls it")

    def find_uncalled(self, model: nn.Module) -> None:
        """Modules that no traced forward calls, or none in the way that runs fused."""
        for module, plan in self.found.plans.copy():
            if isinstance(plan, Own) or module is model:
                continue
            mine = [row for row in self.found.rows if row.plan is not None and row.holder is module]
            if module not in self.calls:
                if any(child in self.calls for child in module.children()):
                    self.drop(module, plan, mine)
                    continue
                for row in mine:
                    at = self.found.rows.index(row)
                    self.found.rows[at] = row._replace(why=NOT_CALLED)
            elif self.calls[module] and not any(map(plan.fits, self.calls[module])):
                self.drop(module, plan, mine)
                self.add(module, type(module).__name__, "it is called with other arguments")

    def drop(self, module: nn.Module, plan: Plan, rows: list[Row]) -> None:
        """Leave `module` alone after all."""
        self.found.plans.remove((module, plan))
        for row in rows:
            self.found.rows.remove(row)
