"""The dataflow of a module's own forward: `torch.fx` traces it with the children as leaves.

Tracing computes nothing, ignores class names and does not change the module.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import inspect
import operator
import sys
import textwrap
import traceback
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
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
    """Why a module cannot run fused, or does not match a pattern."""


@dataclass(frozen=True)
class Forward:
    """The graphs of a module's own forward, and `notes`: what it read besides its inputs."""

    training: fx.Graph
    evaluation: fx.Graph
    notes: Notes

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
        return super().__getattr__(name)

    def __iadd__(self, other):  # fx would record x += y as x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Treats every registered module as a leaf; `inputs` are the names of the traced arguments."""

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs
        self.ambient = _ambient()
        self.proxies: list[weakref.ref[_Proxy]] = []

    def proxy(self, node):
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def leaks(self) -> list[str]:
        """Where values of the forward are still referenced; they are removed from containers."""
        if all(proxy() is None for proxy in self.proxies):
            return []
        gc.collect()
        held = [proxy() for proxy in self.proxies if proxy() is not None]
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
        proxies = (self.create_proxy("placeholder", name, (), {}) for name in self.inputs)
        return root_fn, [self.root, *proxies]


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


def _modes() -> Iterator[tuple[bool, bool, contextlib.AbstractContextManager]]:
    """(mode of the module, mode of all modules below it, context) for every traced run."""
    for training in (True, False):
        yield training, training, contextlib.nullcontext()
        yield training, not training, torch.no_grad()
        yield training, training, torch.inference_mode()
        yield training, not training, _autocast()


def trace(module: nn.Module, fake: FakeTensorMode) -> Forward:
    """The graphs of `module`'s own forward in training and in evaluation mode.

    Arguments with a default take it. The forward runs several times on a copy (`sandbox`), with
    and without gradients and autocast, and must make the same calls every time.

    Raises:
        Mismatch: the forward has no required argument (wrappers such as DistributedDataParallel),
            is replaced on the instance, cannot be traced, has side effects, or depends on more
            than its arguments, attributes and mode.
    """
    inputs = _required(module)
    if _asks_for_types(module):
        raise Mismatch("its forward cannot run fused: it depends on the type of a value")
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
                    raise Mismatch("it switches modules between train and eval mode")
                if leaks := tracer.leaks():
                    raise Mismatch(f"it stores a value that it computes in {min(leaks)}")
                if str(graph) != str(graphs.setdefault(training, graph)):
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
    return Forward(graphs[True], graphs[False], Notes.of(module, reads))


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
    return Forward(graph, graph, Notes())


def _required(module: nn.Module) -> list[str]:
    """Names of the positional arguments of `module.forward` that have no default."""
    if "forward" in vars(module):
        raise Mismatch("its forward is replaced on the instance; override it in a class")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    if not names:
        raise Mismatch("its forward has no required positional argument")
    return names


def is_call(node: fx.Node, functions: Collection[Any]) -> bool:
    """Whether `node` calls one of `functions`, which are functions or names of methods."""
    return node.op in ("call_function", "call_method") and node.target in functions


def is_layer(node: fx.Node) -> bool:
    """Whether `node` calls a module or a ReLU function on one value."""
    unary = len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    return unary and (is_call(node, RELU) or (node.op == "call_module" and not node.kwargs))


def label(node: fx.Node) -> str:
    """The name of what `node` calls."""
    return node.target if isinstance(node.target, str) else node.target.__name__
