"""The models of `python -m bench coverage`: what builds each, its image size, how it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

PACKAGES = ("timm", "torchvision", "transformers", "segmentation_models_pytorch")
SIZE = 64  # pixels


def call(model: nn.Module, x: Tensor) -> Any:
    """The whole model on images."""
    return model(x)


def backbone(model: nn.Module, x: Tensor) -> Any:
    """What a detector computes on images before it looks for boxes."""
    return model.backbone(x)


def backbone_and_head(model: nn.Module, x: Tensor) -> Any:
    """What RetinaNet computes before it selects boxes."""
    return model.head(list(model.backbone(x).values()))


class Model(NamedTuple):
    """build() makes the model with random weights; run(model, x) calls it on `size` pixels."""

    build: Callable[[], nn.Module]
    size: int = SIZE
    run: Callable[[nn.Module, Tensor], Any] = call


def package(name: str) -> str:
    """The package of a model in `MODELS`."""
    return name.partition("/")[0]


def why_missing(name: str) -> str | None:
    """Why the package cannot be imported, or None."""
    try:
        importlib.import_module(name)
    except Exception as error:  # absent, or built for another torch
        return f"{type(error).__name__}: {error}"
    return None


def _timm(name: str, size: int = SIZE, **options: Any) -> Model:
    def build() -> nn.Module:
        return importlib.import_module("timm").create_model(name, num_classes=10, **options)

    return Model(build, size)


def _torchvision(path: str, size: int = SIZE, run: Any = call, **options: Any) -> Model:
    def build() -> nn.Module:
        module, _, name = f"torchvision.models.{path}".rpartition(".")
        given = {"weights": None, "num_classes": 10, **options}
        return getattr(importlib.import_module(module), name)(**given)

    return Model(build, size, run)


def _detector(name: str, run: Any = backbone) -> Model:
    def build() -> nn.Module:
        module = importlib.import_module("torchvision.models.detection")
        return getattr(module, name)(weights=None, weights_backbone=None)

    return Model(build, run=run)


def _frozen_detector() -> nn.Module:
    detection = importlib.import_module("torchvision.models.detection")
    frozen = importlib.import_module("torchvision.ops.misc").FrozenBatchNorm2d
    body = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=frozen
    )
    return detection.FasterRCNN(body, 91)


def _features() -> nn.Module:
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    net = importlib.import_module("torchvision.models").resnet18(weights=None)
    return extraction.create_feature_extractor(net, {"layer2": "middle", "layer4": "last"})


def _transformers(kind: str) -> Model:
    def build() -> nn.Module:
        module = importlib.import_module("transformers")
        return getattr(module, f"{kind}Model")(getattr(module, f"{kind}Config")())

    return Model(build)


def _unet() -> nn.Module:
    module = importlib.import_module("segmentation_models_pytorch")
    return module.Unet("resnet34", encoder_weights=None, classes=5)


TIMM = (
    "resnet18", "resnet50", "resnet50d", "resnetv2_50", "resnext50_32x4d", "wide_resnet50_2",
    "resnetaa50", "resnetblur50", "seresnet50", "legacy_seresnet18", "ecaresnet50t", "skresnet18",
    "resnest26d", "res2net50_26w_4s", "cspresnet50", "tresnet_m", "regnetx_002", "regnety_002",
    "regnetz_b16", "repvgg_a2", "hrnet_w18_small", "dla34", "dpn68", "densenet121", "selecsls42",
    "xception41", "vgg11_bn", "efficientnet_b0", "mobilenetv2_100", "mobilenetv3_large_100",
    "mnasnet_100", "hardcorenas_a", "ghostnet_100", "rexnet_100",
)  # fmt: skip
MODELS: dict[str, Model] = {
    **{f"timm/{name}": _timm(name) for name in TIMM},
    "timm/inception_v3": _timm("inception_v3", 128),
    "timm/resnet50_clip": _timm("resnet50_clip", img_size=SIZE),
    **{
        f"torchvision/{name}": _torchvision(name)
        for name in (
            "resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x1_0", "mnasnet1_0",
            "regnet_x_400mf", "efficientnet_b0", "vgg11_bn",
        )
    },
    "torchvision/googlenet": _torchvision("googlenet", aux_logits=False, init_weights=False),
    "torchvision/inception_v3": _torchvision(
        "inception_v3", 128, aux_logits=False, init_weights=False
    ),
    "torchvision/create_feature_extractor(resnet18)": Model(_features),
    "torchvision/fasterrcnn_resnet50_fpn": _detector("fasterrcnn_resnet50_fpn"),
    "torchvision/FasterRCNN, FrozenBatchNorm2d": Model(_frozen_detector, run=backbone),
    "torchvision/retinanet_resnet50_fpn": _detector("retinanet_resnet50_fpn", backbone_and_head),
    "torchvision/deeplabv3_resnet50": _torchvision(
        "segmentation.deeplabv3_resnet50", weights_backbone=None
    ),
    "torchvision/fcn_resnet50": _torchvision("segmentation.fcn_resnet50", weights_backbone=None),
    "transformers/ResNet": _transformers("ResNet"),
    "transformers/RegNet": _transformers("RegNet"),
    "segmentation_models_pytorch/Unet(resnet34)": Model(_unet),
}  # fmt: skip
"""name → model; a name begins with its package."""
