"""Which calls of a graph are layers of a chain, and how a fused call reads each of them.

A convolution, norm, ReLU or max-pool is a call of a PyTorch module, of a function, or of an op of
an exported program. A norm may also be written as arithmetic, x · scale + shift, as frozen norms
are. `Layer.view` says where the layer's tensors and options are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..dispatch.guard import TENSORS, hooked, refusal
from ..spec.layers import NORMS, BorrowedConv, BorrowedNorm, BorrowedPool, windows_of
from ..spec.values import is_number

aten = torch.ops.aten
RELU = (
    F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_", aten.relu.default,
    aten.relu_.default,
)  # fmt: skip
ADD = (
    operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__", aten.add.Tensor,
    aten.add_.Tensor,
)  # fmt: skip
ADD_IN_PLACE = (operator.iadd, "add_", "__iadd__", aten.add_.Tensor)
MULTIPLY = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
F_NORM = ("input", "running_mean", "running_var", "weight", "bias", *NORM[5:])
FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {  # function → layer, names of arguments
    F.conv2d: ("conv", CONV),
    aten.conv2d.default: ("conv", CONV),
    F.batch_norm: ("norm", F_NORM),
    torch.batch_norm: ("norm", NORM),
    aten.batch_norm.default: ("norm", NORM),
    F.max_pool2d: ("pool", POOL),
    torch.max_pool2d: ("pool", POOL),
    aten.max_pool2d.default: ("pool", POOL),
}
KINDS = {nn.Conv2d: "c", NORMS: "n", nn.ReLU: "r", nn.MaxPool2d: "m", nn.Identity: "i"}
CONSTANT = (  # what arithmetic norms apply to their parameters, besides ADD and MULTIPLY
    "reshape", "view", "unsqueeze", "rsqrt", "sqrt", "pow", "to", "type", "reciprocal", "neg",
    operator.sub, operator.truediv, operator.pow, operator.neg, operator.getitem,
    torch.rsqrt, torch.sqrt, torch.sub, torch.div, torch.reshape, torch.neg,
    aten.view.default, aten.reshape.default, aten.rsqrt.default, aten.sqrt.default,
    aten.sub.Tensor, aten.div.Tensor, aten.reciprocal.default, aten.unsqueeze.default,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
PARAMETERS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Named:
    """A layer that is the module `targets[0]`, of class `cls` with `children` children."""

    targets: tuple[str]
    cls: type[nn.Module]
    children: int

    def __call__(self, module: nn.Module) -> nn.Module | None:
        """The module; None if it can no longer be fused."""
        same = type(module) is self.cls and len(module._modules) == self.children
        return module if same and refusal(module) is None else None


@dataclass(frozen=True)
class Borrowing:
    """A layer that a function computes from tensors of the module, named by `targets`.

    make: the class of `spec.layers` that holds tensors and `options`. same_dtype: the call is as
    PyTorch's only if x has the dtype of the tensors, and autocast is off.
    """

    targets: tuple[str | None, ...]
    make: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]
    same_dtype: bool = False

    def __call__(self, *tensors: Any) -> Any:
        """The layer; None if a tensor is of another class, or a statistic needs a gradient."""
        for t, name in zip(tensors, self.targets, strict=True):
            if name is not None and type(t) not in TENSORS:
                return None
        if any(t is not None and t.requires_grad for t in tensors[2:]):
            return None
        return self.make(*tensors, **dict(self.options))


@dataclass(frozen=True)
class Gate:
    """Factors of channels that `function` computes from their means over H and W.

    targets: the attributes of the module that `function` takes, after the means [N,C,1,1]. pools:
    those of them that are modules which compute the means (`is_pool`).
    """

    targets: tuple[str, ...]
    pools: tuple[str, ...]
    function: Callable[..., Tensor] = field(compare=False)

    def __call__(self, *given: Any) -> Callable[[Tensor], Tensor]:
        """The factors [N,C,1,1] as a function of the means."""

        def gate(means: Tensor) -> Tensor:
            factors = self.function(means.clone(), *given)  # it may change them in place
            try:
                return factors if factors.shape == means.shape else factors.expand_as(means)
            except RuntimeError:
                raise RuntimeError(
                    f"a gate gives factors {tuple(factors.shape)}, expected {tuple(means.shape)}; "
                    "use resnet_fast.unfuse(model)"
                ) from None

        return gate


View = Named | Borrowing | Gate


def is_pool(module: nn.Module) -> bool:
    """Whether `module` computes the mean over H and W, and nothing else."""
    plain = type(module) is nn.AdaptiveAvgPool2d and "forward" not in vars(module)
    return plain and module.output_size in (1, (1, 1), [1, 1]) and not hooked(module)


class Layer(NamedTuple):
    """A layer of a chain that a call in a graph computes from the value `source`.

    letter: c conv, n norm, r ReLU, m max-pool, i identity, g product with a gate. covers: other
    calls that are part of it, whose results nothing else reads.
    """

    letter: str
    source: fx.Node
    view: View | None = None
    covers: tuple[fx.Node, ...] = ()


def is_call(node: fx.Node, functions: Collection[Any]) -> bool:
    """Whether `node` calls one of `functions`, which are functions or names of methods."""
    return node.op in ("call_function", "call_method") and node.target in functions


def is_unary(node: fx.Node) -> bool:
    """Whether `node` calls something on one value."""
    calls = node.op in ("call_module", "call_function", "call_method")
    return calls and len(node.all_input_nodes) == 1 and len(node.args) > 0


def layers_of(module: nn.Module, graph: fx.Graph) -> dict[fx.Node, Layer]:
    """The layers among the calls of `graph`, whose attributes are those of `module`."""
    constants = _constants(graph)
    found = {}
    for node in graph.nodes:
        layer = None
        if node.op == "call_module":
            layer = _of_module(module, node)
        elif is_call(node, RELU) and node.args and isinstance(node.args[0], fx.Node):
            layer = Layer("r", node.args[0])
        elif is_call(node, tuple(FUNCTIONS)):
            layer = _of_function(node)
        elif is_call(node, ADD) and len(node.args) == 2 and not node.kwargs:
            layer = _of_arithmetic(module, node, constants)
        if layer is not None:
            found[node] = layer
    return found


def _of_module(module: nn.Module, node: fx.Node) -> Layer | None:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    called = module.get_submodule(node.target)
    one = letter(called)
    if one == "-":
        return None
    return Layer(one, node.args[0], Named((node.target,), type(called), len(called._modules)))


def letter(module: nn.Module) -> str:
    """The letter of a module that is a layer, "-" for any other module."""
    if refusal(module) is not None:
        return "-"
    return next((KINDS[kind] for kind in KINDS if isinstance(module, kind)), "-")


def _of_function(node: fx.Node) -> Layer | None:
    """The layer of a call of one of `FUNCTIONS`; None if an argument cannot be fused."""
    kind, names = FUNCTIONS[node.target]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    source = given.get("input")
    tensors = [given.get(name) for name in PARAMETERS]
    if not isinstance(source, fx.Node) or any(
        t is not None and not (isinstance(t, fx.Node) and t.op == "get_attr") for t in tensors
    ):
        return None
    targets = tuple(None if t is None else str(t.target) for t in tensors)
    options = {n: given[n] for n in names if n in given and n not in ("input", *PARAMETERS)}
    if any(isinstance(value, fx.Node) for value in options.values()):
        return None
    if kind == "conv":
        if isinstance(options.get("padding"), str) or targets[0] is None:
            return None
        return Layer("c", source, Borrowing(targets[:2], BorrowedConv, _fixed(options)))
    if kind == "pool":
        if set(options) - {"kernel_size", "stride", "padding"}:
            return None
        pool = Borrowing((), BorrowedPool, _fixed(options))
        try:
            windows_of(pool())
        except ValueError:
            return None
        return Layer("m", source, pool)
    if not (is_number(options.get("momentum", 0.1)) and is_number(options.get("eps", 1e-5))):
        return None
    if not options.get("training", False) and None in targets[2:]:
        return None
    return Layer("n", source, Borrowing(targets, BorrowedNorm, _fixed(options)))


def _fixed(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options in a form with a hash."""
    fixed = {n: tuple(v) if isinstance(v, (list, tuple)) else v for n, v in options.items()}
    return tuple(sorted(fixed.items()))


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The values that depend on attributes, and on dtypes, only."""
    found: set[fx.Node] = set()
    pure = {*CONSTANT, *ADD, *MULTIPLY} - {*ADD_IN_PLACE}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or _is_dtype(node):
            found.add(node)
        elif inputs and found.issuperset(inputs) and is_call(node, pure):
            found.add(node)
    return found


def _is_dtype(node: fx.Node) -> bool:
    return is_call(node, (getattr,)) and node.args[1:] == ("dtype",)


def _of_arithmetic(module: nn.Module, node: fx.Node, constants: set[fx.Node]) -> Layer | None:
    """The norm x · scale + shift of `node`, if scale and shift are those of running statistics."""
    for product, shift in (node.args, node.args[::-1]):
        if not (isinstance(product, fx.Node) and is_call(product, MULTIPLY) and shift in constants):
            continue
        if len(product.users) != 1 or len(product.args) != 2 or product.kwargs:
            continue
        for x, scale in (product.args, product.args[::-1]):
            if isinstance(x, fx.Node) and x not in constants and scale in constants:
                return _frozen(module, node, product, x, (scale, shift), constants)
    return None


def _frozen(module, node, product, x, ends, constants) -> Layer | None:
    """The layer of x · scale + shift, `ends`: compared with a norm's at random parameters."""
    above = _above(ends, constants)
    inside = [n for n in node.graph.nodes if n in above]
    names = {n.target.rpartition(".")[2]: n.target for n in inside if n.op == "get_attr"}
    if set(names) != set(PARAMETERS):
        return None
    held = [attribute(module, names[name]) for name in PARAMETERS]
    if not all(isinstance(t, Tensor) and t.dim() == 1 for t in held):
        return None
    numbers = {a for n in inside for a in (*n.args, *n.kwargs.values()) if is_number(a)}
    for eps in (*sorted(float(one) for one in numbers if one > 0), 0.0):
        probes = ((1, 1.0), (-1, 1.0), (1, 1e-9), (1, -1.0))
        if all(_is_norm(inside, ends, names, held, eps, *probe) for probe in probes):
            targets = tuple(names[name] for name in PARAMETERS)
            view = Borrowing(targets, BorrowedNorm, (("eps", eps),), same_dtype=True)
            return Layer("n", x, view, (product, *(n for n in inside if n.op != "get_attr")))
    return None


def _is_norm(inside, ends, names, held, eps: float, sign: int, variance: float) -> bool:
    """Whether `ends` are a norm's at random parameters of one sign, with variances of `variance`
    to twice that.
    """
    generator = torch.Generator().manual_seed(0)
    weight, bias, mean, var = (
        (torch.rand(t.shape, dtype=torch.float64, generator=generator) + 1) * sign for t in held
    )
    var = var.abs() * variance
    values = dict(zip((names[name] for name in PARAMETERS), (weight, bias, mean, var), strict=True))
    try:
        scale, shift = _evaluate(inside, ends, values)
    except Exception:  # arithmetic on other dtypes, devices or shapes
        return False
    expected = (weight / (var + eps).sqrt()).view(1, -1, 1, 1)
    offset = bias.view(1, -1, 1, 1) - mean.view(1, -1, 1, 1) * expected
    return _equal(scale, expected) and _equal(shift, offset)


def _above(ends: Collection[fx.Node], constants: set[fx.Node]) -> set[fx.Node]:
    """`ends` and the constants that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node in constants and node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _evaluate(nodes, ends, values) -> list[Tensor]:
    """The values of `ends`, with `values` for attributes and fp64 for every dtype."""
    known: dict[fx.Node, Any] = {}
    for node in nodes:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.get)
        if node.op == "get_attr":
            known[node] = values[node.target]
        elif _is_dtype(node):
            known[node] = torch.float64
        elif node.op == "call_method":
            known[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            known[node] = node.target(*args, **kwargs)
    return [known[end] for end in ends]


def _equal(actual: Any, expected: Tensor) -> bool:
    same = isinstance(actual, Tensor) and actual.shape == expected.shape
    return same and torch.allclose(actual.double(), expected, rtol=1e-9, atol=0, equal_nan=True)


def attribute(module: nn.Module, path: str) -> Any:
    """The tensor `path` below `module`, or None."""
    holder, _, name = path.rpartition(".")
    return getattr(module.get_submodule(holder), name, None)


def checks_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Calls that only assert that a value has four dimensions, by call: the value."""
    found = {n: n.args[0] for n in graph.nodes if _is_dimensions(n) and not n.users}
    for node in graph.nodes:
        if not is_call(node, (torch._assert,)) or not isinstance([*node.args, 0][0], fx.Node):
            continue
        compare, rest = node.args[0], [n for n in node.all_input_nodes if n is not node.args[0]]
        if not is_call(compare, (operator.eq,)) or compare.args[1:] != (4,) or rest:
            continue
        count = compare.args[0]
        if _is_dimensions(count) and len(compare.users) == 1:
            found |= {node: count.args[0], compare: count.args[0]}
            if all(user in found for user in count.users):
                found[count] = count.args[0]
    return found


def _is_dimensions(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.all_input_nodes:
        return False
    return is_call(node, ("dim",)) or (is_call(node, (getattr,)) and node.args[1:] == ("ndim",))
