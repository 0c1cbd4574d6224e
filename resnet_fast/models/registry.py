"""The models by name: each is a function decorated with `register`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch

from ..spec.values import check_flag, given
from .pretrained import DEFAULT, difference, find
from .resnet import ResNet

MODELS: dict[str, Callable[..., ResNet]] = {}
# Options with which published weights fit.
KEEP_SHAPES = ("num_classes", "impl", "fused", "keep_activations", "zero_init_residual",
               "replace_stride_with_dilation")  # fmt: skip


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


def create_model(
    name: str, *, pretrained: bool = False, weights: str | None = None, **options: Any
) -> ResNet:
    """Build a model by name, with random or published weights and torchvision's parameter names.

    torchvision's files are cached in the folder of `torch.hub` (TORCH_HOME), those of timm's
    repositories by huggingface_hub. `resnet_fast.training.load_weights` also returns class names
    and preprocessing.

    Args:
        name: one of `list_models()`, such as "resnet50".
        pretrained: True is weights="DEFAULT".
        weights: "IMAGENET1K_V1" or "IMAGENET1K_V2" (torchvision's), "DEFAULT" (the newest of
            these), or a repository such as "timm/resnet50.a1_in1k" (needs huggingface_hub and
            safetensors). With another number of classes than the file's, fc is new and random, as
            in timm. None is random weights.
        **options: arguments of `ResNet`: num_classes (default: as in the file, else 1000), impl,
            fused, zero_init_residual and others. Those that change shapes need random weights.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: an unknown name (the message lists similar ones) or an invalid option; there
            are no such weights, or they do not fit the options.
        TypeError: an unknown option, or one that the model itself sets (`groups` of a ResNeXt,
            `shortcut` of a plain net).
        NotDownloaded: the file cannot be downloaded, or its copy in the cache is damaged; the
            message says what to do.
        NotWritten: the cache cannot be written.
        MissingPackage: huggingface_hub or safetensors is not installed.
    """
    build = MODELS[check_name(name)]
    check_flag(pretrained, "pretrained")
    if pretrained and weights is not None:
        raise ValueError(f"pretrained: expected False with weights={given(weights)}, got True")
    argument = "pretrained" if pretrained else "weights"
    weights = DEFAULT if pretrained else weights
    if weights is None:
        return build(**options)
    found = find(weights, name, argument)
    model = build(**{"num_classes": found.num_classes, **options})
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = build(num_classes=model.fc.out_features)
    wrong = difference(plain.state_dict(), shapes)  # before anything is downloaded
    if wrong:
        changing = ", ".join(key for key in options if key not in KEEP_SHAPES)
        raise ValueError(f"{argument}: {found.name} does not fit {name} with {changing}: {wrong}")
    tensors = found.read()
    if model.fc.out_features != found.num_classes:
        tensors |= {f"fc.{key}": tensor for key, tensor in model.fc.state_dict().items()}
    wrong = difference(tensors, shapes)
    if wrong:
        raise ValueError(f"{argument}: {found.name} does not fit {name}: {wrong}")
    model.load_state_dict(tensors)
    return model
