"""Copies of a module tree with other tensors: shared ones, or fake ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


class _Tensors(TorchFunctionMode):
    """Replaces `copy.deepcopy` of every tensor by `answer`."""

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
    """A deep copy of `model` with answer(t) for every tensor t (default: t), sharing `shared`.

    Unlike `copy.deepcopy`, it accepts tensors with an autograd history, keeps the mode and
    attributes of a `GraphModule`, and shares the process group of a `SyncBatchNorm`. A fused
    `GraphModule` is copied as a plain one.

    Raises:
        TypeError: `model` holds an object that cannot be copied.
    """
    memo: dict[int, Any] = {id(value): value for value in shared}
    graphs = []
    for module in model.modules():
        for parameter in module._parameters.values():  # their __deepcopy__ bypasses function modes
            if parameter is not None:
                memo[id(parameter)] = answer(parameter)
        if isinstance(module, nn.SyncBatchNorm):
            memo[id(module.process_group)] = module.process_group
        if isinstance(module, fx.GraphModule):  # its __deepcopy__ makes a new one from its code
            graphs.append(module)
            cls = getattr(type(module), "_plain_class", type(module))
            memo[id(module)] = cls.__new__(cls)
    try:
        with _Tensors(answer):
            copied = copy.deepcopy(model, memo)
            for module in graphs:
                held = {k: v for k, v in vars(module).items() if not k.startswith("_fused_")}
                vars(memo[id(module)]).update(copy.deepcopy(held, memo))
                memo[id(module)].graph = memo[id(module)]._graph  # compiles its forward
    except Exception as error:
        raise TypeError(f"{type(error).__name__}: {error}") from error
    return copied
