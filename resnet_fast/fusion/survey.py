"""A walk over a model: what `fuse` changes in it, and what `explain` reports about it.

The walk starts at the root. It looks for modules of resnet_fast, then for regions in every other
forward that can be traced (`match`). It counts the convolutions, norms, activations and additions
that the forwards call, and those in regions.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..dispatch.guard import obstacle, refusal
from ..models import ResNet
from ..modules import PLAIN, Fused
from ..spec.layers import Parts
from .arguments import TENSOR, Argument, Signature, fits, passed
from .counts import counted, counted_in, kind_of
from .dataflow import Forward, Forwards, Mismatch, label, sequence
from .gates import gates_of
from .match import AS_FAST, NO_GAIN, Region, is_addition
from .opening import Opened
from .sandbox import internal
from .swap import Matched, Own, Plan, match

NOT_CALLED = "only if it is called; no forward that can be traced calls it"
SOME_CALLS = "in some of its calls; others pass other arguments"
IN_A_GATE = f"it works on the means of an image, on one pixel for each channel, {AS_FAST}"
WRONG_ARGUMENTS = "it is called with arguments that a fused forward does not take"


class Row(NamedTuple):
    """One row of the report. `holder` runs `plan`; `why` says why there is none, or a condition."""

    path: str
    what: str
    why: str
    holder: nn.Module
    plan: Own | Region | None


class Count(NamedTuple):
    """One call that counts (`counts.COUNTED`), in training or evaluation mode of its module.

    holder: the module whose forward runs it; plan: as part of what, or None.
    """

    training: bool
    kind: str
    holder: nn.Module
    plan: Own | Region | None


@dataclass
class Survey:
    """`plans`: module and plan of everything fusible; `rows`: the report, in model order; `counts`:
    the calls that count, in each mode.
    """

    plans: list[tuple[nn.Module, Own | Plan]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


def survey(model: nn.Module, impl: str = "auto") -> Survey:
    """Everything that can be fused in `model`; undo `fuse` before the call (`swap.restore`)."""
    walk = _Walk(model, impl)
    walk.visit(model)
    walk.find_rest()
    walk.find_uncalled(model)
    walk.count_rest(model)
    order = {path: i for i, path in enumerate(walk.paths.values())}
    walk.found.rows.sort(key=lambda row: order[row.path])
    return walk.found


class _Walk:
    """State of the walk.

    claimed: modules that have a row or a plan, or that an untraced forward may call. tallied:
    modules that are counted. calls: the calls of each module in all traced forwards, with the
    module that makes them.
    """

    def __init__(self, model: nn.Module, impl: str) -> None:
        self.impl = impl
        self.paths = {module: path for path, module in model.named_modules()}
        self.found = Survey()
        self.forwards = Forwards()
        self.visited: set[nn.Module] = set()
        self.claimed: set[nn.Module] = set()
        self.tallied: set[nn.Module] = set()
        self.calls: dict[nn.Module, list[tuple[nn.Module, Signature | None]]]
        self.calls = defaultdict(list)

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
        elif module not in self.claimed and _has_forward(module):
            self.forward(module)
        for child in module.children():
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
        plan = None if why else Own()
        if plan is not None:
            self.found.plans.append((module, plan))
        for parts in filter(None, chains):
            layers = (*parts.convs, *parts.norms, *parts[4:7], *parts.around)
            self.claimed.update(filter(None, layers))
            self.tallied.update(filter(None, layers))
            for training in (True, False):
                for kind in counted_in(parts):
                    self.found.counts.append(Count(training, kind, module, plan))

    def net(self, module: ResNet) -> None:
        self.own(module, list(module.chains()))
        for child in module.children():
            self.calls[child] = []

    def called(self, module: nn.Module) -> Forward:
        """The forward of `module`, as the first call that can be traced; else Mismatch."""
        signatures = [one for _, one in self.calls.get(module, ()) if one is not None]
        reasons = []
        for signature in [*dict.fromkeys(signatures)] or [None]:
            try:
                return self.forwards.of(module, signature)
            except Mismatch as reason:
                reasons.append(reason)
        raise reasons[0]

    def forward(self, module: nn.Module) -> None:
        """Add the regions of the forward of `module`, and its other layers with a reason."""
        try:
            forward = self.called(module)
        except Mismatch as reason:
            layers = [m for m in module.children() if isinstance(m, (_ConvNd, _NormBase))]
            self.claimed.update(layers)
            if layers:
                self.add(module, type(module).__name__, str(reason))
            return
        matched = plan, graphs = match(module, forward, self.impl, self.forwards.inside)
        calls = self.calls.get(module)
        if calls and not any(fits(call, forward.signature) for _, call in calls):
            self.misfit(module, forward, matched)
            return
        self.count(module, matched)
        if plan.regions:
            self.found.plans.append((module, plan))
        self.claimed.update(module.get_submodule(path) for path in plan.traced if path)
        taken: set[nn.Module] = set()
        found = {mode: {(r.place, str(r)): r for r in graphs[mode][1]} for mode in (True, False)}
        for mode, regions in found.items():
            for key, region in regions.items():
                taken.update(map(module.get_submodule, region.layers))
                if mode or key not in found[True]:
                    alone = key not in found[not mode]
                    only = f"in {'training' if mode else 'evaluation'} mode" if alone else ""
                    self.region(module, graphs[mode][0], region, only)
        self.claimed.update(m for one in taken for m in one.modules())
        refused: dict[tuple[str, str], None] = {}
        for opened, _, reasons in graphs.values():
            for node, said in reasons.items():
                refused["addition" if is_addition(node) else label(node), said] = None
            gates = gates_of(module, opened.graph).values()
            gated = {node for gate in gates for node in gate.covers}
            for node in opened.graph.nodes:
                if node.op == "call_module":
                    self.call(module, node, node in gated)
        for what, said in refused:
            self.add(module, f"{type(module).__name__}: {what}", said)
        why = refusal(module) if isinstance(module, (_ConvNd, _NormBase)) else None
        if why is not None and not plan.regions and not refused:
            self.add(module, type(module).__name__, f"it {why}")

    def misfit(self, module: nn.Module, forward: Forward, matched: Matched) -> None:
        """Note the calls of `module`, which runs plain because of how it is called."""
        if matched.plan.regions:
            self.add(module, type(module).__name__, WRONG_ARGUMENTS)
        for training, graph in zip((True, False), forward, strict=True):
            for kind in counted(module, graph, self.forwards.inside).values():
                self.found.counts.append(Count(training, kind, module, None))
            for node in graph.nodes:
                if node.op == "call_module":
                    called = module.get_submodule(str(node.target))
                    kinds = functools.partial(self.kind, module)
                    self.calls[called].append((module, passed(node, kinds)))
        self.tallied.add(module)

    def call(self, module: nn.Module, node: fx.Node, gated: bool) -> None:
        """Note a call in the forward of `module`; add the layer that it calls, if left alone.

        gated: the call is part of a gate. Convolutions without a norm are left alone there.
        """
        called = module.get_submodule(str(node.target))
        kinds = functools.partial(self.kind, module)
        self.calls[called].append((module, passed(node, kinds)))
        if called in self.claimed:
            return
        inside = list(called.modules())
        if gated and not any(isinstance(one, _NormBase) for one in inside):
            self.claimed.update(inside)
            if any(map(kind_of, inside)):
                self.add(called, type(called).__name__, IN_A_GATE)
        elif kind_of(called) and self.forwards.inside(called) is None:
            self.claimed.add(called)
            self.add(called, type(called).__name__, self.reason(module, node))

    def count(self, module: nn.Module, matched: Matched) -> None:
        """Count the calls of `module`, and of the children that are open in it."""
        at: dict[tuple[bool, nn.Module, fx.Node], int] = {}
        for path, traced in matched.plan.traced.items():
            called = module.get_submodule(path)
            for training, graph in traced.graphs.items():
                if graph is None or called in self.tallied:
                    continue
                for node, kind in counted(called, graph, self.forwards.inside).items():
                    at[training, called, node] = len(self.found.counts)
                    self.found.counts.append(Count(training, kind, module, None))
        for training, (opened, regions, _) in matched.graphs.items():
            for region in regions:
                for node in region.calls:
                    path, origin = opened.origins[node]
                    place = at.get((training, module.get_submodule(path), origin))
                    if place is not None:
                        count = self.found.counts[place]
                        self.found.counts[place] = count._replace(plan=region)
        self.tallied.update(module.get_submodule(path) for path in matched.plan.traced)

    def count_rest(self, model: nn.Module) -> None:
        """Count layers that no traced forward calls, as not fused."""
        for module in model.modules():
            kind = kind_of(module)
            if kind and module not in self.calls and module not in self.tallied:
                for training in (True, False):
                    self.found.counts.append(Count(training, kind, module, None))

    def kind(self, module: nn.Module, value: fx.Node) -> Argument:
        """What `value` is, in a graph of `module` or of a child that is open in it."""
        if value.op == "placeholder" and sequence(module) is not None:
            calls = [one for _, one in self.calls.get(module, ()) if one and len(one) == 1]
            return calls[0][0] if calls else TENSOR
        if value.op != "call_module":
            return TENSOR
        child = module.get_submodule(str(value.target))
        kinds = functools.partial(self.kind, module)
        try:
            found = self.forwards.of(child, passed(value, kinds))
        except Mismatch:
            return TENSOR
        result = next(node for node in found.training.nodes if node.op == "output").args[0]
        if isinstance(result, (list, tuple)):
            return Argument("list" if isinstance(result, list) else "tuple", len(result))
        return TENSOR

    def region(self, module: nn.Module, opened: Opened, region: Region, why: str) -> None:
        """Add the row of `region`: of the module if it is all that its forward does."""
        rest = [n for n in opened.graph.nodes if n.op[:4] == "call" and n not in region.calls]
        beside = [region.residual] if region.beside.endswith("(x)") else []
        if rest == beside:
            self.add(module, f"{type(module).__name__}: {region}", why, plan=region)
            return
        first = module.get_submodule(region.place)
        self.add(first, str(region), why, holder=module, plan=region)

    def reason(self, module: nn.Module, call: fx.Node) -> str:
        """Why the layer of `call` is not part of a region."""
        why = refusal(module.get_submodule(call.target))
        if why is not None:
            return f"it {why}"
        if kind_of(module.get_submodule(call.target)) == "activations":
            return f"it follows {label(call.args[0])}, not a fused convolution, norm or addition"
        users = list(call.users)
        if isinstance(module.get_submodule(call.target), nn.Conv2d):
            return NO_GAIN
        if len(users) != 1:
            return f"its result is used {len(users)} times; only a result used once can be fused"
        if users[0].op != "call_module":
            return f"its result goes to {label(users[0])}, not to a layer that can be fused with it"
        reader = module.get_submodule(users[0].target)
        why = None if list(reader.children()) else refusal(reader)
        if why is not None:
            return f"its result goes to {self.paths[reader]}, which {why}"
        reads = f"its result goes to {self.paths[reader]} ({type(reader).__name__})"
        return f"{reads}; a norm is fused with a convolution before it or a ReLU after it"

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
            calls = self.calls.get(module)
            if calls is None:
                others = [by for child in module.children() for by, _ in self.calls.get(child, ())]
                if any(by is not module for by in others):
                    self.drop(module, plan, mine)
                    continue
                for row in mine:
                    at = self.found.rows.index(row)
                    self.found.rows[at] = row._replace(why=row.why or NOT_CALLED)
            elif calls and not any(fits(call, plan.signature) for _, call in calls):
                self.drop(module, plan, mine)
                self.add(module, type(module).__name__, WRONG_ARGUMENTS)
            elif calls and not all(fits(call, plan.signature) for _, call in calls):
                for row in mine:
                    at = self.found.rows.index(row)
                    self.found.rows[at] = row._replace(why=row.why or SOME_CALLS)

    def drop(self, module: nn.Module, plan: Plan, rows: list[Row]) -> None:
        """Remove the plan and the rows of `module`."""
        self.found.plans.remove((module, plan))
        self.found.counts = [
            count._replace(plan=None) if count.holder is module else count
            for count in self.found.counts
        ]
        for row in rows:
            self.found.rows.remove(row)


def _has_forward(module: nn.Module) -> bool:
    """Whether the forward of `module` calls other modules or is not PyTorch's."""
    cls = type(module)
    own = not internal(cls.forward.__module__ or "")
    return cls.forward is not nn.Module.forward and (own or len(list(module.children())) > 0)
