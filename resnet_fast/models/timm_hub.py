"""timm's repositories on the Hugging Face Hub: the description of a model, and its files.

huggingface_hub downloads and caches; its environment variables (HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE and others) apply.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..runtime.download import NotDownloaded
from ..runtime.files import opened, reason
from ..runtime.optional import imported
from ..spec.values import given, integer, is_number
from .imagenet_classes import imagenet_names

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class TimmConfig:
    """What config.json says of a model.

    Attributes:
        architecture: timm's name of the model.
        num_classes: outputs of its head.
        classes: class names; those of ImageNet for 1000 classes without names, None for others.
        preprocessing: size, resize, mean, std and interpolation.
    """

    architecture: str
    num_classes: int
    classes: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]


def download(repo: str, name: str) -> Path:
    """The path of the file `name` of a repository, downloaded unless it is cached.

    Raises:
        NotDownloaded: it cannot be downloaded; the message names it, the cache and a command.
        MissingPackage: huggingface_hub is not installed.
    """
    hub, constants = (
        cast(Any, imported(module, f"weights {repo}", "huggingface_hub"))
        for module in ("huggingface_hub", "huggingface_hub.constants")
    )
    try:
        return Path(hub.hf_hub_download(repo, name))
    except Exception as error:  # the classes differ between versions of huggingface_hub
        cause = error.__cause__ or error
        raise NotDownloaded(
            f"{repo}: {name}: not downloaded to {constants.HF_HUB_CACHE}: "
            f"{type(cause).__name__}: {reason(cause)}; to download it by hand: hf download {repo}"
        ) from None


def read_config(repo: str) -> TimmConfig:
    """The description of the model in a repository.

    Raises:
        ValueError: config.json is not one of timm, or asks for what resnet_fast does not have; the
            message names it.
        NotDownloaded, MissingPackage: as `download`.
    """
    path = download(repo, CONFIG)
    try:
        with opened(path) as file:
            return _config(json.loads(file.read()))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"weights: {repo}: {CONFIG}: {reason(error)}") from None


def _config(content: Any) -> TimmConfig:
    if not isinstance(content, dict) or not isinstance(content.get("pretrained_cfg"), dict):
        raise ValueError(f"expected an object with pretrained_cfg, got {given(content)}")
    # As in timm, the outer values apply.
    merged: dict[str, Any] = {**content["pretrained_cfg"], **content}
    architecture = merged.get("architecture")
    if not isinstance(architecture, str):
        raise ValueError(f"architecture: expected a name, got {given(architecture)}")
    for key, only in (("global_pool", "avg"), ("crop_mode", "center"), ("model_args", {})):
        if merged.get(key, only) != only:
            raise ValueError(f"{key}: expected {only!r}, got {given(merged[key])}")
    classes = integer(merged.get("num_classes"), "num_classes", "a positive integer", 1)
    sides: Any = merged.get("input_size")
    share: Any = merged.get("crop_pct")
    if not isinstance(sides, list) or len(sides) != 3 or sides[0] != 3 or sides[1] != sides[2]:
        raise ValueError(f"input_size: expected [3, size, size], got {given(sides)}")
    size = integer(sides[1], "input_size", "integers")
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(f"crop_pct: expected a number in (0, 1], got {given(share)}")
    return TimmConfig(architecture, classes, _names(merged, classes), {
        "size": size, "resize": math.floor(size / share), "mean": merged.get("mean"),
        "std": merged.get("std"), "interpolation": merged.get("interpolation"),
    })  # fmt: skip


def _names(merged: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    names, texts = merged.get("label_names"), merged.get("label_descriptions")
    if not names:
        return imagenet_names() if count == len(imagenet_names()) else None
    if isinstance(names, dict):  # by index
        names = [names.get(str(i)) for i in range(count)]
    if not isinstance(names, list) or len(names) != count or None in names:
        raise ValueError(f"label_names: expected {count} names, got {given(names)}")
    texts = texts if isinstance(texts, dict) else {}
    return tuple(str(texts.get(name, name)) for name in map(str, names))
