"""Published weights by name: torchvision's of ImageNet, and those of timm's repositories.

torchvision's files are cached in the folder of `torch.hub`, under the same names as torchvision's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.download import cached, matches
from ..runtime.files import reason
from ..runtime.optional import imported
from ..spec.values import brief, given
from . import timm_hub
from .imagenet_classes import imagenet_names

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP = 224
BASE = "https://download.pytorch.org/models/"
DEFAULT = "DEFAULT"
# By model and name: the first digits of the file's SHA-256, and the length of an image's shorter
# side before the crop, in pixels (torchvision.models, *_Weights). The last of a model is its
# default.
TORCHVISION: dict[str, dict[str, tuple[str, int]]] = {
    "resnet18": {"IMAGENET1K_V1": ("f37072fd", 256)},
    "resnet34": {"IMAGENET1K_V1": ("b627a593", 256)},
    "resnet50": {"IMAGENET1K_V1": ("0676ba61", 256), "IMAGENET1K_V2": ("11ad3fa6", 232)},
    "resnet101": {"IMAGENET1K_V1": ("63fe2227", 256), "IMAGENET1K_V2": ("cd907fc2", 232)},
    "resnet152": {"IMAGENET1K_V1": ("394f9c45", 256), "IMAGENET1K_V2": ("f82ba261", 232)},
    "resnext50_32x4d": {"IMAGENET1K_V1": ("7cdf4587", 256), "IMAGENET1K_V2": ("1a0047aa", 232)},
    "resnext101_32x8d": {"IMAGENET1K_V1": ("8ba56ff5", 256), "IMAGENET1K_V2": ("110c445d", 232)},
    "resnext101_64x4d": {"IMAGENET1K_V1": ("173b62eb", 232)},
    "wide_resnet50_2": {"IMAGENET1K_V1": ("95faca4d", 256), "IMAGENET1K_V2": ("9ba9bcbe", 232)},
    "wide_resnet101_2": {"IMAGENET1K_V1": ("32ee1156", 256), "IMAGENET1K_V2": ("d733dc28", 232)},
}
NAME = re.compile(r"DEFAULT|IMAGENET1K_V\d+|timm/[\w.-]{1,96}", re.ASCII)
FILE = re.compile(r".*\.(pth|pt|ckpt|bin|safetensors)", re.IGNORECASE)


@dataclass(frozen=True)
class Pretrained:
    """Published weights of one model.

    Attributes:
        name: such as "IMAGENET1K_V2" or "timm/resnet50.a1_in1k".
        model: name, of `resnet_fast.list_models()`.
        num_classes: outputs of the head.
        classes: class names, if they are known.
        preprocessing: size, resize, mean, std and interpolation, as `training.Preprocessing`.
        file: returns the path of the file, which it downloads unless it is cached. It raises
            NotDownloaded, NotWritten or MissingPackage.
    """

    name: str
    model: str
    num_classes: int
    classes: tuple[str, ...] | None
    preprocessing: Mapping[str, Any]
    file: Callable[[], Path]

    def read(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU; downloads the file unless it is cached.

        Raises:
            ValueError: it is not a state dict; the message names it.
            NotDownloaded, NotWritten, MissingPackage: as `file`.
        """
        path = self.file()
        try:
            if path.suffix == ".safetensors":
                return _safetensors(self.name).load_file(path)
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file may raise any exception
            raise ValueError(f"{path}: damaged: {reason(error)}; remove it and run again") from None


def is_name(text: str) -> bool:
    """Whether text has the form of a name of published weights, not that of a file."""
    return bool(NAME.fullmatch(text)) and not FILE.fullmatch(text)


def find(name: str, model: str | None, argument: str = "weights") -> Pretrained:
    """The published weights `name`; only those of timm's repositories need the network here.

    Args:
        name: "IMAGENET1K_V1" or "IMAGENET1K_V2" (torchvision's), "DEFAULT" (the newest of these),
            or a repository such as "timm/resnet50.a1_in1k".
        model: name, of `resnet_fast.list_models()`. None is resnet50, or the repository's.
        argument: named by errors.

    Raises:
        ValueError: there are no such weights of the model; the message says which there are.
        NotDownloaded, MissingPackage: a repository's config.json cannot be downloaded.
    """
    if isinstance(name, str) and name.startswith("timm/") and is_name(name):
        return _of_timm(name, model, argument)
    model = model or "resnet50"
    published = TORCHVISION.get(model)
    if published is None:
        raise ValueError(
            f"{argument}: torchvision has published no weights of {model}; expected one of "
            f"{', '.join(TORCHVISION)}"
        )
    if name == DEFAULT:
        name = list(published)[-1]
    if not isinstance(name, str) or name not in published:
        raise ValueError(
            f"{argument}: expected {', '.join(published)} or DEFAULT for {model}, or a repository "
            f"timm/NAME, got {given(name)}; resnet_fast.training.load_weights reads files"
        )
    return _of_torchvision(model, name)


def published_file(path: Path) -> Pretrained | None:
    """The published weights whose file has the name of `path`, such as resnet50-11ad3fa6.pth."""
    for model, published in TORCHVISION.items():
        for name, (digest, _) in published.items():
            if path.name == _file_name(model, digest):
                return _of_torchvision(model, name)
    return None


def is_published(path: Path, weights: Pretrained) -> bool:
    """Whether `path` has the content of the file of torchvision's `weights`, by its SHA-256."""
    return matches(path, TORCHVISION[weights.model][weights.name][0])


def difference(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> str:
    """The first difference of names or shapes; "" if there is none.

    Counters may be missing, as in files from before PyTorch 0.4.1.
    """
    for name, shape in wanted.items():
        if name not in tensors:
            if name.endswith("num_batches_tracked"):
                continue
            return f"{name} is missing"
        if tensors[name].shape != shape:
            return f"{name}: expected {list(shape)}, got {list(tensors[name].shape)}"
    more = [name for name in tensors if name not in wanted]
    return f"{brief(more[0])} is not expected" if more else ""


def _of_torchvision(model: str, name: str) -> Pretrained:
    digest, resize = TORCHVISION[model][name]
    names, file = imagenet_names(), _file_name(model, digest)
    preprocessing = {
        "size": CROP, "resize": resize, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
        "interpolation": "bilinear",
    }  # fmt: skip

    def get() -> Path:
        return cached(BASE + file, Path(torch.hub.get_dir(), "checkpoints", file), digest)

    return Pretrained(name, model, len(names), names, preprocessing, get)


def _file_name(model: str, digest: str) -> str:
    return f"{model}-{digest}.pth"


def _safetensors(name: str) -> Any:
    return imported("safetensors.torch", f"weights {name}", "safetensors")


def _of_timm(repo: str, model: str | None, argument: str) -> Pretrained:
    _safetensors(repo)  # before anything is downloaded
    config = timm_hub.read_config(repo)
    if config.architecture not in TORCHVISION:  # models that both have
        raise ValueError(
            f"{argument}: {repo} is a {config.architecture!r}, which resnet_fast does not have; "
            f"expected one of {', '.join(TORCHVISION)}"
        )
    if model not in (None, config.architecture):
        raise ValueError(
            f"{argument}: {repo} is a {config.architecture}, not a {model}; expected model "
            f"{config.architecture}"
        )
    return Pretrained(
        repo, config.architecture, config.num_classes, config.classes, config.preprocessing,
        lambda: timm_hub.download(repo, timm_hub.WEIGHTS),
    )  # fmt: skip
