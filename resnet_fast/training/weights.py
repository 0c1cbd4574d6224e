"""A model from a file: of resnet-fast train, or a plain state dict such as torchvision's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import create_model, list_models
from ..models.registry import check_name
from ..spec.checks import check_impl
from .checkpoint import FORMAT, CheckpointError, read_any
from .checks import check_device, check_path
from .preprocessing import Preprocessing, imagenet


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with its classes and preprocessing.

    Attributes:
        model: in fp32 and channels_last.
        name: of `resnet_fast.list_models()`.
        classes: class names; None if the file has none.
        preprocessing: of the model's inputs.
    """

    model: nn.Module
    name: str
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing


def load_weights(
    path: str | Path,
    model: str | None = None,
    *,
    impl: str = "auto",
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load the model whose weights are at `path`, in fp32 and channels_last on `device`.

    Args:
        path: a checkpoint or `model.pt` of `fit`, or a plain state dict with torchvision's keys,
            which gets ImageNet's preprocessing.
        model: name, of `resnet_fast.list_models()`. None takes the name in the file; without one,
            the model with the same keys and shapes.
        impl: implementation of the fused blocks.
        device: device of the model.

    Raises:
        ValueError: the file is missing, damaged or of another model, or no model or several match
            it; the message names the file or `model`.
    """
    check_path(path, "path")
    if model is not None:
        try:
            check_name(model)
        except ValueError as error:
            raise ValueError(f"model: {str(error).removeprefix('name: ')}") from None
    check_impl(impl)
    path, device = Path(path), check_device(device)
    content = read_any(path)
    ours = isinstance(content, dict) and content.get("format") == FORMAT
    weights = content["weights"] if ours else content
    if not isinstance(weights, dict) or not weights or not _all_tensors(weights):
        raise CheckpointError(f"{path}: neither a checkpoint of resnet_fast nor a state dict")
    options: dict[str, Any] = {}
    classes, preprocessing = None, imagenet()
    if ours:
        classes, preprocessing = tuple(content["classes"]), _preprocessing(content)
        spec = content["spec"]
        if model is None and spec is not None:
            model, options = spec["name"], dict(spec["options"])
    if not options:
        options = _sizes(path, weights)
    if model is None:
        model = _recognize(path, weights, options)
    with torch.device("meta"):  # skips the random initialization
        net = create_model(model, impl=impl, **options)
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split("\n\t")[1:2]).strip()
        raise ValueError(f"model: the weights in {path} do not fit {model}: {why}") from None
    net.to(device, torch.float32, memory_format=torch.channels_last).eval()
    return Loaded(net, model, classes, preprocessing)


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one per line. Raises ValueError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable text file of class names: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _all_tensors(weights: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items())


def _preprocessing(content: Mapping[str, Any]) -> Preprocessing:
    values = content["preprocessing"]
    return Preprocessing(
        values["size"], values["resize"], tuple(values["mean"]), tuple(values["std"])
    )


def _sizes(path: Path, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """num_classes and in_channels, from the shapes of the last and first layers."""
    try:
        classes, channels = weights["fc.weight"].size(0), weights["conv1.weight"].size(1)
    except KeyError as error:
        raise ValueError(f"{path}: expected a ResNet; the state dict has no {error}") from None
    return {"num_classes": classes, "in_channels": channels}


def _recognize(path: Path, weights: Mapping[str, Tensor], options: Mapping[str, int]) -> str:
    wanted = _shapes(weights)
    preactivation = "bn_last.weight" in wanted  # only pre-activation nets have it
    found = []
    for name in list_models():
        if ("preact" in name) != preactivation:
            continue
        with torch.device("meta"):
            shapes = _shapes(create_model(name, **options).state_dict())
        if shapes == wanted:
            found.append(name)
    if len(found) != 1:
        of = " and ".join(found) or "no model of resnet_fast.list_models()"
        raise ValueError(f"model: the keys and shapes in {path} are those of {of}; give its name")
    return found[0]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes by key, without the counters, which files from before PyTorch 0.4.1 lack."""
    return {k: v.shape for k, v in weights.items() if not k.endswith("num_batches_tracked")}
