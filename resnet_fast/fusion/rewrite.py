"""A graph as a Python function in which each region is one fused call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..dispatch.guard import hooked, plain_call
from ..modules import run_fused, run_gated
from ..spec.dtypes import DTYPES, autocast_dtype
from ..spec.layers import Parts
from ..spec.values import pair
from .layers import Borrowing, View, is_pool
from .match import Region
from .subgraph import Function, compiled, function_of


def rewritten(graph: fx.Graph, regions: Iterable[Region], impl: str) -> Function:
    """A function forward(self, *inputs) that runs `graph`, with one call for each of `regions`."""
    ends = {region.calls[-1]: region for region in regions}
    starts = {region.calls[0]: region for region in ends.values()}
    inner = {call for region in ends.values() for call in region.calls}
    given = {value for region in ends.values() for value in (region.x, region.residual)}
    unread = _unread(graph, inner) - given
    new, values = fx.Graph(), {}
    new.set_codegen(graph._codegen)
    versions: dict[Region, fx.Node] = {}
    for node in graph.nodes:
        if node in starts and _interrupted(graph, starts[node]):
            region = starts[node]
            versions[region] = new.call_function(_version, (values[region.x],))
        if node in ends:
            region = ends[node]
            call, names = _fused_call(region, impl)
            residual = None if region.residual is None else values[region.residual]
            held = [new.get_attr(name) for name in names]
            args = values[region.x], residual, versions.get(region), *held
            values[node] = new.call_function(call, args)
        elif node in inner or node in unread:
            continue
        elif node.op == "call_module" and any(isinstance(a, list) for a in node.args):
            args = fx.map_arg(node.args, values.__getitem__)
            values[node] = new.call_function(_with_lists, (new.get_attr(node.target), *args))
        else:
            values[node] = new.node_copy(node, values.__getitem__)
    return compiled(new)


def _with_lists(module: nn.Module, *args: Any) -> Any:
    """module(*args); an error if it changes a list, whose contents the caller takes for known."""
    before = [list(arg) for arg in args if isinstance(arg, list)]
    result = module(*args)
    after = [arg for arg in args if isinstance(arg, list)]
    if any(len(a) != len(b) or not all(map(is_, a, b)) for a, b in zip(before, after, strict=True)):
        raise RuntimeError(
            f"{type(module).__name__} changes a list that it is given, which a fused forward does "
            "not support; use resnet_fast.unfuse(model)"
        )
    return result


def _unread(graph: fx.Graph, replaced: set[fx.Node]) -> set[fx.Node]:
    """The constants that only `replaced` calls read."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and node.users and replaced.issuperset(node.users):
            found.add(node)
    return found


def _interrupted(graph: fx.Graph, region: Region) -> bool:
    """Whether other code runs between the calls of `region`, which could change its input."""
    nodes = list(graph.nodes)
    between = {*nodes[nodes.index(region.calls[0]) : nodes.index(region.calls[-1])]}
    return any(node.op not in ("get_attr", "placeholder") for node in between - {*region.calls})


def _version(x: Any) -> int | None:
    """The number of changes of x in place; None where PyTorch does not count them."""
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.is_inference():
        return None
    return x._version


def _fused_call(region: Region, impl: str) -> tuple[Function, list[str]]:
    """A function of x, residual, the version of x at the first call, and attributes of the module;
    the names of those attributes.

    If the fused ops do not support the call, or a layer has changed, the calls run one by one.
    """
    gate, parts = region.gate, region.parts
    more = (*region.results, *(gate.targets if gate else ()))
    plain, names = function_of(region.calls, (region.x, region.residual), more)
    views = list(dict.fromkeys([*_views(parts), *region.around]))
    at = [[names.index(name) if name else -1 for name in view.targets] for view in views]
    layers = parts.each(views.index)
    gate_at = [names.index(name) for name in gate.targets] if gate else []
    pools = [names.index(name) for name in gate.pools] if gate else []
    watched = [names.index(name) for name in region.results]
    same_dtype = any(isinstance(view, Borrowing) and view.same_dtype for view in views)

    def fused_call(x: Tensor, residual: Any, version: int | None, *held: Any) -> Tensor:
        if version is not None and x._version != version:
            raise RuntimeError(
                f"{region}: a tensor is changed in place after the first of these layers reads "
                "it, which fused calls do not support; use resnet_fast.unfuse(model)"
            )
        if _is_plain(x, residual) or any([hooked(held[i]) for i in watched]):
            return plain(x, residual, *held)
        given = *held, None
        pairs = zip(views, at, strict=True)
        found = [view(*[given[i] for i in places]) for view, places in pairs]
        if None in found or not all([is_pool(held[i]) for i in pools]):
            return plain(x, residual, *held)
        read = layers.each(found.__getitem__)
        if not _fits(read, x, residual) or (region.in_place and _promotes(read, x, residual)):
            return plain(x, residual, *held)
        if same_dtype and not _as_arithmetic(read, x):
            return plain(x, residual, *held)
        if gate is not None:
            factors = gate(*[held[i] for i in gate_at])
            return run_gated(read, factors, x, residual, impl=impl)
        return run_fused(read, x, residual, impl=impl)

    return fused_call, names


def _is_plain(x: Any, residual: Any) -> bool:
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype not in DTYPES or plain_call(x):
        return True
    if residual is None:
        return False
    if not isinstance(residual, Tensor) or residual.dtype.is_complex:
        return True
    return residual.dim() != 4 or plain_call(residual)


def _promotes(read: Parts, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the operands of the addition have different dtypes."""
    other = autocast_dtype(x) if read.projection is not None else x.dtype
    own = autocast_dtype(x) if read.convs else x.dtype
    return own != (other if residual is None else residual.dtype)


def _as_arithmetic(read: Parts, x: Tensor) -> bool:
    """Whether norms compute what arithmetic on their tensors does, dtypes and shapes included."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    channels = [x.shape[1], *(conv.out_channels for conv in read.convs)]
    norms = list(zip(read.norms, channels, strict=True))
    if read.projection is not None:
        norms.append((read.projection_norm, read.projection.out_channels))
    return all(
        t is None or (t.dtype == x.dtype and t.shape == (channels,))
        for norm, channels in norms
        if norm is not None
        for t in (*norm._parameters.values(), norm.running_mean, norm._buffers["running_var"])
    )


def _fits(read: Parts, x: Tensor, residual: Any) -> bool:
    """Whether the addition is of two tensors of one shape."""
    if residual is None and read.shortcut == "none":
        return True
    other = x.shape if residual is None else residual.shape
    if read.projection is not None:
        other = _shape((read.projection,), x.shape)
    return _shape(read.convs, x.shape) == tuple(other)


def _shape(convs: Iterable[Any], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the result of `convs` on a tensor of `shape`."""
    n, c, *sizes = shape
    for conv in convs:
        weight = conv.weight
        c = weight.shape[0]
        for i in (0, 1):
            reach = pair(conv.dilation, "dilation")[i] * (weight.shape[2 + i] - 1) + 1
            room = sizes[i] + 2 * pair(conv.padding, "padding")[i] - reach
            sizes[i] = room // pair(conv.stride, "stride")[i] + 1
    return (n, c, *sizes)


def _views(parts: Parts) -> list[View]:
    return [view for view in (*parts.convs, *parts.norms, *parts[4:7]) if view is not None]
