"""A walk over a model: what `fuse` changes in it, and what `explain` reports about it.

The walk starts at the root. It looks for modules of resnet_fast, then blocks, then chains among the
calls of every other forward that can be traced (`match`).
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

NOT_CALLED = "only if it is called; no forward that can be traced calls it"
WRONG_ARGUMENTS = "it is called with arguments that a fused forward does not take"


class Row(NamedTuple):
    """One row of the report. `holder` runs `plan`; `why` says why there is none, or a condition."""

    path: str
    what: str
    why: str
    holder: nn.Module
    plan: Own | Block | None


@dataclass
class Survey:
    """`plans`: module and plan of everything fusible; `rows`: the report, in model order."""

    plans: list[tuple[nn.Module, Own | Plan]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def survey(model: nn.Module, impl: str = "auto") -> Survey:
    """Everything that can be fused in `model`; undo `fuse` before the call (`swap.restore`)."""
    walk = _Walk(model, impl)
    walk.visit(model)
    walk.find_rest()
    walk.find_uncalled(model)
    order = {path: i for i, path in enumerate(walk.paths.values())}
    walk.found.rows.sort(key=lambda row: order[row.path])
    return walk.found


class _Walk:
    """State of the walk.

    claimed: modules that have a row or a plan, or that an untraced forward may call. calls: the
    calls of each module in all traced forwards.
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
        """Add a module of resnet_fast whose forward runs `chains`."""
        what, why = f"resnet_fast {type(module).__name__}", ""
        for parts in chains:
            if parts is None:
                why = "its children have been replaced and no longer form a chain"
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
        """Add `module` as a block, or add the chains among its calls."""
        try:
            if isinstance(module, fx.GraphModule):
                raise Mismatch("it is a torch.fx.GraphModule; fuse the model before tracing it")
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
                self.add(module, type(module).__name__, f"not a residual block: {reason}")
            self.chains(module, forward)
        else:
            self.claimed.update(module.get_submodule(name) for name, *_ in block.absorbed)
            self.add(module, f"{type(module).__name__}: {block}", plan=block)
            self.found.plans.append((module, plan_block(module, forward, block)))
            if block.residual is not None:
                self.calls[module.get_submodule(block.residual)] = []

    def chains(self, module: nn.Module, forward: Forward) -> None:
        """Add the chains among the calls of `module`, and its other layers with a reason."""
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
        """Why the layer of `call` is not part of a chain."""
        why = refusal(module.get_submodule(call.target))
        if why is not None:
            return f"it {why}"
        users = list(call.users)
        if len(users) != 1:
            return f"its result is used {len(users)} times; only a result used once can be fused"
        if users[0].op != "call_module" or not is_layer(users[0]):
            return f"its result goes to {label(users[0])}, not to a layer that can be fused with it"
        reader = module.get_submodule(users[0].target)
        why = None if list(reader.children()) else refusal(reader)
        if why is not None:
            return f"its result goes to {self.paths[reader]}, which {why}"
        reads = f"its result goes to {self.paths[reader]} ({type(reader).__name__})"
        return f"{reads}; fusible are conv + BatchNorm2d and BatchNorm2d + ReLU"

    def find_rest(self) -> None:
        """Add convolutions that have no row yet."""
        said = {row.path for row in self.found.rows}
        for module, path in self.paths.items():
            if isinstance(module, _ConvNd) and module not in self.claimed and path not in said:
                self.add(module, type(module).__name__, "no forward that can be traced calls it")

    def find_uncalled(self, model: nn.Module) -> None:
        """Mark or drop modules that no traced forward calls, or calls with other arguments."""
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
                self.add(module, type(module).__name__, WRONG_ARGUMENTS)

    def drop(self, module: nn.Module, plan: Plan, rows: list[Row]) -> None:
        """Remove the plan and the rows of `module`."""
        self.found.plans.remove((module, plan))
        for row in rows:
            self.found.rows.remove(row)
