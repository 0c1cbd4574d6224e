"""Copies of a model's modules around other tensors: the same ones, or fake ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


class _Tensors(TorchFunctionMode):
    """Answers `copy.deepcopy` of a tensor, wherever one is held."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            return self.answer(args[0])
        return func(*args, **(kwargs or {}))


def copy_modules(
    model: Model,
    answer: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    shared: Iterable[Any] = (),
) -> Model:
    """A deep copy of `model` that holds answer(t) for every tensor t, by itself t, and `shared`.

    Unlike `copy.deepcopy` it takes what a forward has kept (tensors with a history), gives a
    `GraphModule` its mode and attributes, and leaves processes of a `SyncBatchNorm` as they are.

    Raises:
        TypeError: `model` holds what cannot be copied.
    """
    memo: dict[int, Any] = {id(value): value for value in shared}
    graphs = []
    for module in model.modules():
        for parameter in module._parameters.values():  # their __deepcopy__ asks no function mode
            if parameter is not None:
                memo[id(parameter)] = answer(parameter)
        if isinstance(module, nn.SyncBatchNorm):
            memo[id(module.process_group)] = module.process_group
        if isinstance(module, fx.GraphModule):  # its __deepcopy__ makes a new one from its code
            graphs.append(module)
            memo[id(module)] = type(module).__new__(type(module))
    try:
        with _Tensors(answer):
            copied = copy.deepcopy(model, memo)
            for module in graphs:
                vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
                memo[id(module)].graph = memo[id(module)]._graph  # compiles its forward
    except Exception as error:
        raise TypeError(f"{type(error).__name__}: {error}") from error
    return copied
