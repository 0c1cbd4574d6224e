"""The models by name: each is a function decorated with `register`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from ..spec.values import given
from .resnet import ResNet

MODELS: dict[str, Callable[..., ResNet]] = {}


def register(model: Callable[..., ResNet]) -> Callable[..., ResNet]:
    """Decorator: registers the function for `create_model` under its own name."""
    MODELS[model.__name__] = model
    return model


def list_models() -> list[str]:
    """Names of all models that `create_model` can build, sorted."""
    return sorted(MODELS)


def check_name(name: str) -> str:
    """Return `name`; ValueError with similar names if there is no such model."""
    if not isinstance(name, str) or name not in MODELS:
        text = given(name)
        close = difflib.get_close_matches(text.strip("'"), MODELS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"valid names: {list_models()}"
        raise ValueError(f"name: expected one of resnet_fast.list_models(), got {text}; {hint}")
    return name


def create_model(name: str, **options: Any) -> ResNet:
    """Build a model by name, with random weights and torchvision's parameter names.

    Args:
        name: one of `list_models()`, such as "resnet50".
        **options: arguments of `ResNet`: num_classes, impl, fused, zero_init_residual and others.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: an unknown name (the message lists similar ones) or an invalid option.
        TypeError: an unknown option, or one that the model itself sets (`groups` of a ResNeXt,
            `shortcut` of a plain net).
    """
    return MODELS[check_name(name)](**options)
