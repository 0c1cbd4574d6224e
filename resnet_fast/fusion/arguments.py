"""How a forward is called: which arguments are tensors, lists of tensors, or other values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

SIMPLE = (bool, int, float, str, type(None))


class Argument(NamedTuple):
    """An argument: of kind "tensor"; "list" or "tuple" of `value` tensors; or "value" itself.

    "any" stands for whatever a forward passes on without a look at it. text: type and value in
    words, since True == 1 and 0.0 == -0.0.
    """

    kind: str
    value: Any = None
    text: str = ""


TENSOR = Argument("tensor")
Signature = tuple[Argument, ...]


def passed(call: fx.Node, kind: Callable[[fx.Node], Argument]) -> Signature | None:
    """The arguments of `call`, by the `kind` of each value; None if a signature cannot say them."""
    found = []
    for arg in call.args:
        if isinstance(arg, fx.Node):
            found.append(kind(arg))
        elif isinstance(arg, (list, tuple)) and all(isinstance(one, fx.Node) for one in arg):
            found.append(Argument("list" if isinstance(arg, list) else "tuple", len(arg)))
        elif isinstance(arg, SIMPLE):
            found.append(Argument("value", arg, _text(arg)))
        else:
            return None
    return None if call.kwargs else tuple(found)


def _text(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def fits(call: Signature | None, signature: Signature | None) -> bool:
    """Whether a forward with `signature` takes the arguments of `call`."""
    if call is None or signature is None:
        return call is not None
    pairs = zip(call, signature, strict=False)
    return len(call) == len(signature) and all(b.kind == "any" or a == b for a, b in pairs)


def tensors_of(signature: Signature, args: Sequence[Any]) -> list[Any] | None:
    """The tensors in `args`, and values of kind "any"; None if `args` are not as in `signature`."""
    if len(args) != len(signature):
        return None
    found: list[Any] = []
    for (kind, value, text), arg in zip(signature, args, strict=True):
        if kind == "any" or (kind == "tensor" and isinstance(arg, Tensor)):
            found.append(arg)
        elif kind == "value" and isinstance(arg, SIMPLE) and _text(arg) == text:
            continue
        elif type(arg) is {"list": list, "tuple": tuple}.get(kind) and len(arg) == value:
            if not all(isinstance(one, Tensor) for one in arg):
                return None
            found += arg
        else:
            return None
    return found


def names_of(module: nn.Module, signature: Signature | None) -> tuple[list[str], Signature]:
    """Names of the arguments of `module.forward` in `signature`, and the signature.

    None is one tensor for each argument without a default. ValueError if they do not fit.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds]
    required = [p.name for p in parameters if p.kind in kinds and p.default is p.empty]
    signature = (TENSOR,) * len(required) if signature is None else signature
    if not required:
        raise ValueError("its forward has no required positional argument")
    if not len(required) <= len(signature) <= len(names):
        raise ValueError("it is called with other arguments than its forward takes")
    return names[: len(signature)], signature


def is_default(module: nn.Module, signature: Signature) -> bool:
    """Whether `signature` is one tensor for each argument without a default."""
    try:
        return names_of(module, None)[1] == signature
    except ValueError:
        return False
