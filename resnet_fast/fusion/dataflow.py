"""The dataflow of a module's own forward: `torch.fx` traces it with the children as leaves.

Nothing is computed, and no class name matters.
"""

from __future__ import annotations

import inspect
import operator
import textwrap
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
ADD_IN_PLACE = (operator.iadd, "add_")


class Mismatch(Exception):
    """Why something is not the pattern."""


class _Proxy(fx.Proxy):
    def __iadd__(self, other):  # fx would take x += y for x + y
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Every registered module is a leaf; `inputs` are the arguments that are traced."""

    def __init__(self, inputs: list[str]) -> None:
        super().__init__()
        self.inputs = inputs

    def proxy(self, node):
        return _Proxy(node, self)

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def call_module(self, m, forward, args, kwargs):
        if m not in self.submodule_paths:  # made by the forward itself: nn.ReLU()(x)
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        proxies = (self.create_proxy("placeholder", name, (), {}) for name in self.inputs)
        return root_fn, [self.root, *proxies]


def trace(module: nn.Module) -> list[fx.Graph]:
    """The graphs of `module`'s own forward in training and in evaluation mode.

    Arguments with a default take it. What the forward stores on modules is undone.

    Raises:
        Mismatch: a forward without a named input (wrappers such as DistributedDataParallel), one
            replaced on the instance, or one that the tracer cannot follow, with its message.
    """
    inputs = _required(module)
    script = torch.jit.ScriptModule
    before = [(m, dict(vars(m))) for m in module.modules() if not isinstance(m, script)]
    graphs = []
    try:
        for training in (True, False):
            for m, _ in before:
                m.training = training
            graphs.append(_Tracer(inputs).trace(module))
    except Exception as error:
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" ...")
        raise Mismatch(f"its forward cannot be traced: {said}") from None
    finally:
        for m, attributes in before:
            vars(m).clear()
            vars(m).update(attributes)
    return graphs


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
