"""The models by name: each is a function that `register` has noted."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from .resnet import ResNet

MODELS: dict[str, Callable[..., ResNet]] = {}


def register(model: Callable[..., ResNet]) -> Callable[..., ResNet]:
    """Decorator: `create_model` finds the function under its own name."""
    MODELS[model.__name__] = model
    return model


def list_models() -> list[str]:
    """The names that `create_model` takes, sorted."""
    return sorted(MODELS)


def check_name(name: str) -> str:
    """`name`; ValueError where no model bears it, the message offers close ones."""
    if not isinstance(name, str) or name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"they are {list_models()}"
        raise ValueError(f"name: expected one of resnet_fast.list_models(), got {name!r}; {hint}")
    return name


def create_model(name: str, **options: Any) -> ResNet:
    """The model `name` with `options` of `ResNet`: num_classes, impl, fused, zero_init_residual, …

    Raises:
        ValueError: an unknown name; the message offers close ones.
        TypeError: an unknown option, or one that makes this model what it is (`groups` of a
            ResNeXt, `shortcut` of a plain net).
    """
    return MODELS[check_name(name)](**options)
