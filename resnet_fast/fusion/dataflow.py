"""The dataflow of a module's own forward: `torch.fx` traces it with the children as leaves.

Tracing computes nothing, ignores class names and does not change the module.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import itertools
import operator
import sys
import textwrap
import traceback
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from .arguments import Argument, Signature, is_default, names_of
from .sandbox import Change, Notes, functions_of, internal, sandbox


class Mismatch(Exception):
    """Why a module cannot run fused, or does not match a pattern."""


@dataclass(frozen=True)
class Forward:
    """The graphs of a module's own forward, and `notes`: what it read besides its inputs.

    signature: the arguments of the forward; None if it takes them as given. without_grad: the
    graphs for an input that needs no gradient, if they differ.
    """

    training: fx.Graph
    evaluation: fx.Graph
    notes: Notes
    signature: Signature | None = None
    without_grad: tuple[fx.Graph, fx.Graph] | None = None

    def __iter__(self) -> Iterator[fx.Graph]:
        return iter((self.training, self.evaluation))


class _Proxy(fx.Proxy):
    """Stands for a value while a forward is traced.

    To code outside PyTorch and resnet_fast, an input has the class Tensor, since fused calls take
    only tensors. The type of any other value is unknown, so reading it raises Mismatch.
    """

    _is_param = False

    @property
    def __class__(self):
        caller = sys._getframe(1)
        name = caller.f_globals.get("__name__", "")
        if internal(name) and caller.f_code.co_name != "is_tensor":
            return type(self)
        if self.node.op == "placeholder":
            return Tensor
        raise Mismatch("it depends on the type of a value")

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f"torch.Tensor has no attribute {name!r}")
        if name == "requires_grad" and self.node.op == "placeholder" and self.tracer.norm:
            return self.tracer.with_grad
        return super().__getattr__(name)

    def __iadd__(self, other):  # fx would record x += y as x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Treats every registered module as a leaf.

    names, signature: the traced arguments. norm: the module is a norm, so its buffers are values of
    the graph, which may count batches. with_grad: what an input of a norm says of its
    `requires_grad`.
    """

    def __init__(
        self, names: list[str], signature: Signature, norm: bool, with_grad: bool
    ) -> None:
        super().__init__()
        self.names, self.signature = names, signature
        self.norm, self.with_grad = norm, with_grad
        self.lists: list[tuple[list, list]] = []
        self.proxy_buffer_attributes = norm
        self.ambient = _ambient()
        self.proxies: list[weakref.ref[_Proxy]] = []
        self.attributes: dict[str, Any] = {}

    def proxy(self, node):
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        self.attributes = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def leaks(self) -> list[str]:
        """Where values of the forward are still referenced; they are removed from containers."""
        self.attributes.clear()
        if all(proxy() is None for proxy in self.proxies):
            return []
        gc.collect(1)  # a whole collection takes long beside large packages
        if any(proxy() is not None for proxy in self.proxies):
            gc.collect()
        held = [proxy() for proxy in self.proxies if proxy() is not None]
        if held and gc.get_freeze_count():
            gc.unfreeze()  # get_referrers does not look at frozen objects
        names: list[str] = []
        for proxy in held:
            for container in gc.get_referrers(proxy):
                if isinstance(container, dict):
                    for key in [key for key, value in container.items() if value is proxy]:
                        del container[key]
                        names.append(str(key))
                elif isinstance(container, list) and container is not held:
                    container[:] = [value for value in container if value is not proxy]
                    names.append("a list")
        return names or ["an object"] * bool(held)

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def create_arg(self, a):
        if type(a) is _Proxy:  # before anything reads its __class__
            return a.node
        if isinstance(a, Tensor) and not self._held(a):
            raise Mismatch("it uses a tensor that is not an input, parameter or buffer")
        if type(a) is OrderedDict:  # fx would make a dict of it
            made = self.create_proxy("call_function", OrderedDict, (list(a.items()),), {})
            return made.node
        own = isinstance(a, (list, dict, tuple)) and type(a) not in (list, dict, tuple, torch.Size)
        if own and not hasattr(a, "_fields") and not internal(type(a).__module__):
            raise Mismatch(f"it builds a {type(a).__name__}; use list, tuple, dict or NamedTuple")
        return super().create_arg(a)

    def _held(self, tensor: Tensor) -> bool:
        held = (*self.root.parameters(), *self.root.buffers())
        return any(tensor is one for one in held)

    def create_node(self, kind, target, *args, **kwargs):
        if _ambient() != self.ambient:
            raise Mismatch("it changes grad mode, autocast, saved-tensor hooks or function modes")
        return super().create_node(kind, target, *args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        if m not in self.submodule_paths:  # created in the forward: nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        given = [self.root, *map(self.argument, self.names, self.signature)]
        return root_fn, given

    def argument(self, name: str, argument: Argument) -> Any:
        """What stands for an argument while the forward is traced."""
        if argument.kind == "value":
            return argument.value
        if argument.kind in ("list", "tuple"):
            many = [
                self.create_proxy("placeholder", f"{name}_{i}", (), {})
                for i in range(argument.value)
            ]
            if argument.kind == "tuple":
                return tuple(many)
            self.lists.append((many, list(many)))
            return many
        return self.create_proxy("placeholder", name, (), {})

    def returned_lists(self, graph: fx.Graph) -> bool:
        """Whether the forward returns a list with the contents of one that it was given."""
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        several = any(argument.kind == "list" for argument in self.signature)
        same = isinstance(result, (list, tuple)) and all(value in inputs for value in result)
        return several and same and len(result) > 0

    def changed_lists(self) -> bool:
        """Whether the forward has changed a list that it was given; they are emptied."""
        changed = any(
            len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True))
            for now, before in self.lists
        )
        for now, before in self.lists:
            now.clear()
            before.clear()
        return changed


def _ambient() -> tuple[Any, ...]:
    """The state that context managers change and that decides how an op runs."""
    autocast = [torch.is_autocast_cache_enabled()]
    for device in ("cpu", "cuda"):
        autocast += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*grad, *autocast, hooks, torch._C._len_torch_function_stack())


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    """Autocast for every device, present or not."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


MODES = tuple(
    (training, training == same, context)
    for training in (True, False)
    for same, context in (
        (True, contextlib.nullcontext), (False, torch.no_grad), (True, torch.inference_mode),
        (False, _autocast),
    )
)  # fmt: skip
"""(mode of the module, mode of all modules below it, context) for every traced run."""


def trace(
    module: nn.Module, fake: FakeTensorMode, signature: Signature | None = None
) -> Forward:
    """The graphs of `module`'s own forward in training and in evaluation mode.

    It is called as `signature` says, or with one tensor for each argument without a default. The
    forward runs several times on a copy (`sandbox`), with and without gradients and autocast, and
    must make the same calls every time.

    Raises:
        Mismatch: the forward has no required argument (wrappers such as DistributedDataParallel),
            is replaced on the instance, cannot be traced, has side effects, or depends on more
            than its arguments, attributes and mode.
    """
    if isinstance(module, fx.GraphModule):
        return _of_graph(module)
    if "forward" in vars(module):
        raise Mismatch("its forward is replaced on the instance; override it in a class")
    try:
        names, signature = names_of(module, signature)
    except ValueError as reason:
        raise Mismatch(str(reason)) from None
    if _asks_for_types(module):
        raise Mismatch("its forward cannot run fused: it depends on the type of a value")
    if _asks_for_identity(module):
        raise Mismatch("its forward cannot run fused: it asks whether two values are one object")
    norm = {"running_mean", "running_var"} <= {*module._parameters, *module._buffers}
    graphs: dict[tuple[bool, bool], fx.Graph] = {}
    try:
        with sandbox(module, fake) as (copied, reads):
            for with_grad, (training, below, context) in itertools.product(
                (True, False)[: 1 + norm], MODES
            ):
                if not with_grad and context is not contextlib.nullcontext:
                    continue
                for one in copied.modules():
                    vars(one)["training"] = below
                vars(copied)["training"] = training
                with context():
                    tracer = _Tracer(names, signature, norm, with_grad)
                    graph = tracer.trace(copied)
                modes = [one.training for one in copied.modules()]
                if modes != [training] + [below] * (len(modes) - 1):
                    raise Mismatch("it switches modules between train and eval mode")
                changed, returned = tracer.changed_lists(), tracer.returned_lists(graph)
                if leaks := tracer.leaks():
                    raise Mismatch(f"it stores a value that it computes in {min(leaks)}")
                if changed or returned:
                    what = "changes" if changed else "returns"
                    raise Mismatch(f"it {what} a list that it is given")
                if str(graph) != str(graphs.setdefault((training, with_grad), graph)):
                    raise Mismatch(
                        "its calls differ between runs, or with grad mode, autocast or the modes "
                        "of its children"
                    )
    except DataDependentOutputException:
        raise Mismatch("its forward cannot run fused: it depends on a tensor's values") from None
    except (Change, Mismatch) as error:
        raise Mismatch(f"its forward cannot run fused: {error}") from None
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        if "roxy" in said or "symbolically traced" in said:  # torch.fx's word for a traced value
            said = "it uses the value or shape of a tensor in Python"
        raise Mismatch(f"its forward cannot be traced{_line(error)}: {said}") from None
    both, others = [[graphs.get((t, g)) for t in (True, False)] for g in (True, False)]
    differ = norm and list(map(str, both)) != list(map(str, others))
    notes = Notes.of(module, reads)
    return Forward(*both, notes, signature, tuple(others) if differ else None)


def _of_graph(module: fx.GraphModule) -> Forward:
    """The graph of a `GraphModule`, which is its forward."""
    nodes = module.graph.nodes
    if any(node.op == "placeholder" and str(node.target).startswith("*") for node in nodes):
        raise Mismatch("its forward takes any number of arguments")
    code = getattr(type(module).forward, "__code__", None)
    made = code is not None and code.co_filename.startswith("<eval_with_key>")
    if not made or "forward" in vars(module):
        raise Mismatch("its forward is not that of its graph")
    if module.graph.python_code("self").src != module.code:
        raise Mismatch("its graph has changed; call recompile()")
    graph = fx.Graph()  # of its own, as the module's may change
    graph.set_codegen(module.graph._codegen)
    graph.output(graph.graph_copy(module.graph, {}))
    return Forward(graph, graph, Notes())


def _line(error: Exception) -> str:
    """The place in the traced code at which `error` was raised, such as " at model.py:23"."""
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if not internal(frame.f_globals.get("__name__", "")):
            where = f" at {Path(frame.f_code.co_filename).name}:{line}"
    return where


def _asks_for_types(module: nn.Module) -> bool:
    """Whether the forward of `module` may call `type`, whose result tracing cannot replace."""
    code = (line for function in functions_of(module) for line in dis.get_instructions(function))
    return any("GLOBAL" in line.opname and line.argval == "type" for line in code)


def _asks_for_identity(module: nn.Module) -> bool:
    """Whether the forward of `module` may ask `a is b` of two values, not of one and a constant."""
    variables = ("LOAD_FAST", "LOAD_DEREF", "BINARY_SUBSCR", "BINARY_OP")
    for function in functions_of(module):
        lines = list(dis.get_instructions(function))
        for before, line in itertools.pairwise(lines):
            if line.opname == "IS_OP" and before.opname.startswith(variables):
                return True
    return False


def sequence(module: nn.Module) -> Forward | None:
    """The result of `trace` for a `Sequential` with PyTorch's forward; None for other modules."""
    cls = type(module)
    same = cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__
    if not same or "forward" in vars(module):
        return None
    graph = fx.Graph()
    x = graph.placeholder("input")
    for name in module._modules:
        x = graph.call_module(name, (x,))
    graph.output(x)
    return Forward(graph, graph, Notes(), (Argument("any"),))


def label(node: fx.Node) -> str:
    """The name of what `node` calls."""
    return node.target if isinstance(node.target, str) else node.target.__name__


class Forwards:
    """The forwards of modules, each traced once.

    Modules of one class share a forward if everything that it read is the same in both.
    """

    def __init__(self) -> None:
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Forward | Mismatch] = {}
        self._alike: dict[Any, list[Forward]] = defaultdict(list)

    def of(self, module: nn.Module, signature: Signature | None = None) -> Forward:
        """The forward of `module`, called as `signature`; Mismatch if it cannot be traced."""
        if signature is not None and is_default(module, signature):
            signature = None
        key = module, signature
        if key not in self._known:
            try:
                self._known[key] = sequence(module) or self._traced(module, signature)
            except Mismatch as reason:
                self._known[key] = reason
        found = self._known[key]
        if isinstance(found, Mismatch):
            raise found
        return found

    def _traced(self, module: nn.Module, signature: Signature | None) -> Forward:
        tree = tuple((path, type(one)) for path, one in module.named_modules())
        alike = self._alike[signature, tree]
        if "forward" not in vars(module):
            for forward in alike:
                if forward.notes.hold(module):
                    return forward
        alike.append(trace(module, self._fake, signature))
        return alike[-1]

    def inside(self, child: nn.Module) -> Forward | None:
        """The forward of a child if its calls may take the place of its call."""
        cls = type(child)
        own = "forward" in vars(child) or cls.__call__ is not nn.Module.__call__
        if own or hasattr(cls, "_plain_class"):
            return None
        if isinstance(child, (fx.GraphModule, torch.jit.ScriptModule)):
            return None
        if cls.forward is not nn.Sequential.forward and internal(cls.forward.__module__ or ""):
            return None
        try:
            return self.of(child)
        except Mismatch:
            return None
