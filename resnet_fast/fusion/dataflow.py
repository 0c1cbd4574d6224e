"""The dataflow of a module's own forward: `torch.fx` traces it with the children as leaves.

Nothing is computed, no class name matters, and nothing of the module changes.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import inspect
import operator
import sys
import textwrap
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from .sandbox import Change, Notes, functions_of, internal, sandbox

RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
ADD_IN_PLACE = (operator.iadd, "add_")


class Mismatch(Exception):
    """Why something is not the pattern."""


@dataclass(frozen=True)
class Forward:
    """The graphs of a module's own forward, and what it read beside its inputs."""

    training: fx.Graph
    evaluation: fx.Graph
    notes: Notes

    def __iter__(self) -> Iterator[fx.Graph]:
        return iter((self.training, self.evaluation))


class _Proxy(fx.Proxy):
    """What stands for a value while a forward runs.

    An input is a tensor to those who ask (`fused` calls have no other); what the type of any other
    value is cannot be known.
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
        raise Mismatch("it decides by the type of a value")

    def __getattr__(self, name):
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no {name!r}")
        return super().__getattr__(name)

    def __iadd__(self, other):  # fx would take x += y for x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Every registered module is a leaf; `inputs` are the arguments that are traced."""

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.ambient = _ambient()
        self.proxies: list[weakref.ref[_Proxy]] = []

    def proxy(self, node):
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def leaks(self) -> bool:
        """Whether a value of the forward was still held somewhere; containers lose it."""
        if all(proxy() is None for proxy in self.proxies):
            return False
        gc.collect()
        held = [proxy() for proxy in self.proxies if proxy() is not None]
        for proxy in held:
            for container in gc.get_referrers(proxy):
                if isinstance(container, dict):
                    for key in [key for key, value in container.items() if value is proxy]:
                        del container[key]
                elif isinstance(container, list) and container is not held:
                    container[:] = [value for value in container if value is not proxy]
        return bool(held)

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def create_arg(self, a):
        if type(a) is _Proxy:  # before any question for its type
            return a.node
        if isinstance(a, Tensor) and not self._held(a):
            raise Mismatch("it makes a tensor of its own")
        own = isinstance(a, (list, dict, tuple)) and type(a) not in (list, dict, tuple, torch.Size)
        if own and not hasattr(a, "_fields") and not internal(type(a).__module__):
            raise Mismatch(f"it makes a {type(a).__name__}, which a graph does not keep")
        return super().create_arg(a)

    def _held(self, tensor: Tensor) -> bool:
        held = (*self.root.parameters(), *self.root.buffers())
        return any(tensor is one for one in held)

    def create_node(self, kind, target, *args, **kwargs):
        if _ambient() != self.ambient:
            raise Mismatch("it switches gradients, autocast or hooks on saved tensors")
        return super().create_node(kind, target, *args, **kwargs)

    def call_module(self, m, forward, args, kwargs):
        if m not in self.submodule_paths:  # made by the forward itself: nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        proxies = (self.create_proxy("placeholder", name, (), {}) for name in self.inputs)
        return root_fn, [self.root, *proxies]


def _ambient() -> tuple[Any, ...]:
    """What a context manager may have changed that decides how an op runs."""
    autocast = [torch.is_autocast_cache_enabled()]
    for device in ("cpu", "cuda"):
        autocast += torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*grad, *autocast, hooks, torch._C._len_torch_function_stack())


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    """Autocast on every device, whether it is there or not."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def _modes() -> Iterator[tuple[bool, bool, contextlib.AbstractContextManager]]:
    """(training, the same of all below, context): each is varied beside the others."""
    for training in (True, False):
        yield training, training, contextlib.nullcontext()
        yield training, not training, torch.no_grad()
        yield training, training, torch.inference_mode()
        yield training, not training, _autocast()


def trace(module: nn.Module, fake: FakeTensorMode) -> Forward:
    """The graphs of `module`'s own forward in training and in evaluation mode.

    Arguments with a default take it. The forward runs on a copy (`sandbox`), several times, with
    and without gradients and autocast, and must do the same every time.

    Raises:
        Mismatch: a forward without a named input (wrappers such as DistributedDataParallel), one
            replaced on the instance, one that the tracer cannot follow, one that does more than
            compute its result, or one that decides by anything but arguments, attributes and mode.
    """
    inputs = _required(module)
    if _asks_for_types(module):
        raise Mismatch("its forward cannot run fused: it decides by the type of a value")
    graphs: dict[bool, fx.Graph] = {}
    try:
        with sandbox(module, fake) as (copied, reads):
            for training, below, context in _modes():
                for one in copied.modules():
                    vars(one)["training"] = below
                vars(copied)["training"] = training
                with context:
                    tracer = _Tracer(inputs)
                    graph = tracer.trace(copied)
                modes = [one.training for one in copied.modules()]
                if modes != [training] + [below] * (len(modes) - 1):
                    raise Mismatch("it changes modes")
                if tracer.leaks():
                    raise Mismatch("it keeps what it computes")
                if str(graph) != str(graphs.setdefault(training, graph)):
                    raise Mismatch("it decides by more than its arguments and attributes")
    except DataDependentOutputException:
        raise Mismatch("its forward cannot run fused: it decides by values of a tensor") from None
    except (Change, Mismatch) as error:
        raise Mismatch(f"its forward cannot run fused: {error}") from None
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        raise Mismatch(f"its forward cannot be traced: {said}") from None
    return Forward(graphs[True], graphs[False], Notes.of(module, reads))


def _asks_for_types(module: nn.Module) -> bool:
    """Whether the forward of `module` may call `type`.

    What that gives for a value of a forward that is traced cannot be told from outside.
    """
    code = (line for function in functions_of(module) for line in dis.get_instructions(function))
    return any("GLOBAL" in line.opname and line.argval == "type" for line in code)


def sequence(module: nn.Module) -> Forward | None:
    """What `trace` gives for a `Sequential` that is no more than that; None for other modules."""
    cls = type(module)
    same = cls.forward is nn.Sequential.forward and cls.__iter__ is nn.Sequential.__iter__
    if not same or "forward" in vars(module):
        return None
    graph = fx.Graph()
    x = graph.placeholder("input")
    for name in module._modules:
        x = graph.call_module(name, (x,))
    graph.output(x)
    return Forward(graph, graph, Notes())


def _required(module: nn.Module) -> list[str]:
    """Names of the positional arguments without default of `module.forward`."""
    if "forward" in vars(module):
        raise Mismatch("its forward was replaced on the instance")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    if not names:
        raise Mismatch("its forward names no input")
    return names


def is_call(node: fx.Node, functions: Collection[Any]) -> bool:
    """Whether `node` calls one of `functions`, or a method of such a name."""
    return node.op in ("call_function", "call_method") and node.target in functions


def is_layer(node: fx.Node) -> bool:
    """Whether `node` is the call of a module or of a ReLU on one value."""
    unary = len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    return unary and (is_call(node, RELU) or (node.op == "call_module" and not node.kwargs))


def label(node: fx.Node) -> str:
    """What `node` calls."""
    return node.target if isinstance(node.target, str) else node.target.__name__
