"""A model from a file of `fit`, torchvision, timm or another script, or from published weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ResNet, create_model, list_models
from ..models.imagenet_classes import same_classes
from ..models.pretrained import (
    Pretrained,
    difference,
    find,
    is_name,
    is_published,
    published_file,
)
from ..models.registry import check_name
from ..runtime.files import opened, reason
from ..spec.checks import check_impl
from ..spec.values import brief, given
from . import state_dicts
from .checkpoint import CheckpointError, ModelSpec, about, is_own
from .checks import check_device, check_path
from .forms import is_dense
from .preprocessing import Preprocessing, imagenet
from .state_dicts import StateDict
from .torch_file import Unread, read_any

MOST_NAMES = 1 << 24  # bytes of a file of class names
MOST_GROWTH = 2  # of the weights in memory over the size of their file
OWN = "weights"  # where a file of `fit` has the model


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, with its classes and preprocessing.

    Attributes:
        model: in fp32 and channels_last.
        spec: name, of `resnet_fast.list_models()`, and options of the model.
        classes: class names; None if they are unknown.
        preprocessing: of the model's inputs.
        notes: which published weights were taken, and what was not taken as it is in the file, such
            as a prefix that was removed; one line each.
    """

    model: ResNet
    spec: ModelSpec
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name


def load_weights(
    path: str | Path,
    model: str | None = None,
    *,
    key: str | None = None,
    classes: Sequence[str] | None = None,
    impl: str = "auto",
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load the model whose weights are at `path`, in fp32 and channels_last on `device`.

    Published weights are downloaded unless they are cached, and get the class names and the
    preprocessing that they were published with; so does a file of torchvision under its own name,
    such as resnet50-11ad3fa6.pth. Other files without preprocessing get ImageNet's.

    No code of the file is run. A state dict may be in dicts (`state_dict`, `model`, `ema`
    and others of `state_dicts.WRAPPERS`), its names after prefixes (`module.`, `backbone.` and
    others of `state_dicts.PREFIXES`), and its head named `fc`, `head` or `classifier`.

    Args:
        path: a checkpoint or `model.pt` of `fit`, or a file of `torch.save` or safetensors with the
            tensors of a ResNet by torchvision's names. If there is no such file: a name of
            published weights, "IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT" or "timm/…", as in
            `resnet_fast.create_model`.
        model: name, of `resnet_fast.list_models()`. None takes the name in the file; without one,
            the model with the same keys and shapes; for torchvision's published weights, resnet50.
        key: which state dict, if the file has several: names of dicts and prefixes with dots, such
            as "teacher.backbone"; "." is the file's content as it is.
        classes: for training, the classes of the data. A head that is missing or of other classes
            is replaced by a new one, initialized as `nn.Linear`. None keeps the head of the file.
        impl: implementation of the fused blocks.
        device: device of the model.

    Raises:
        ValueError: the file is missing, damaged or of another model, or no model or several match
            it; the message names the file or the argument.
        NotDownloaded: published weights cannot be downloaded, or are damaged in the cache; the
            message says what to do.
        NotWritten: the cache cannot be written.
        MissingPackage: safetensors or huggingface_hub is needed and not installed.
    """
    check_path(path, "path")
    if model is not None:
        try:
            check_name(model)
        except ValueError as error:
            raise ValueError(f"model: {str(error).removeprefix('name: ')}") from None
    if not (key is None or isinstance(key, str)):
        raise ValueError(f"key: expected names with dots or None, got {given(key)}")
    check_impl(impl)
    path, device, published = Path(path), check_device(device), None
    if is_name(path.as_posix()) and not path.is_file():
        published = find(path.as_posix(), model)
        model, path = published.model, published.file()
    content = read_any(path)
    names, preprocessing, options = None, imagenet(), {}
    origin: tuple[str, ...] = ()
    if is_own(content):
        spec, names, found = about(path, content)
        preprocessing = imagenet() if found is None else found
        if found is None:
            origin = (f"{path}: no preprocessing in the file; took ImageNet's",)
        if spec is not None and model in (None, spec.name):
            model, options = spec.name, dict(spec.options)
        weights = content.get("weights")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{path}: weights: expected a dict, got {given(weights)}")
        _check_tensors(f"{path}: weights", weights)
        key = OWN if key is None else key
    else:
        published, origin = _origin(path, published)
        if published is not None:
            names, preprocessing = published.classes, _preprocessing(published)
    match = _only_match(path, _found(path, content, key), model, options, preprocessing.channels)
    head, why = _head(path, match, names, classes)
    if why and classes is None:
        raise ValueError(
            f"{path}: {why}; expected fc.weight [classes, features] and fc.bias [classes]. Only "
            "training can replace the head: resnet-fast train --weights"
        )
    notes = _notes(path, match.found, why, names, classes)
    count = len(head["weight"]) if head else len(classes)
    if names is not None and head and len(names) != count:
        raise CheckpointError(
            f"{path}: classes: expected {count} names, one per row of fc.weight, got {len(names)}"
        )
    read = [*match.found.body.values(), *head.values()]
    if sum(t.nbytes for t in read) > MOST_GROWTH * path.stat().st_size:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint: its tensors overlap")
    spec = ModelSpec(match.name, {**match.options, "num_classes": count})
    net = _on_meta(path, spec.name, spec.options, impl)
    if not head:
        net.fc = nn.Linear(net.fc.in_features, count)
        head, names = net.fc.state_dict(), None
    weights = {**match.found.body, **{f"fc.{name}": t for name, t in head.items()}}
    net.load_state_dict(weights, assign=True)
    net.to(device, torch.float32, memory_format=torch.channels_last).eval()
    return Loaded(net, spec, names, preprocessing, (*origin, *notes))


def read_names(path: Path) -> tuple[str, ...]:
    """Class names from a text file, one per line. Raises ValueError if it cannot be read."""
    try:
        with opened(path) as file:
            text = file.read(MOST_NAMES + 1)
        if len(text) > MOST_NAMES:
            raise ValueError(f"expected at most {MOST_NAMES >> 20} MiB")
        lines = text.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = reason(error)
        raise ValueError(f"{path}: not a readable text file of class names: {why}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _origin(path: Path, known: Pretrained | None) -> tuple[Pretrained | None, tuple[str, ...]]:
    """The published weights at `path`, if they are known or are torchvision's by the name and the
    SHA-256 of the file, and a note.
    """
    published = known or published_file(path)
    if published is None:
        return None, ()
    if known is None and not is_published(path, published):
        note = f"{path}: not torchvision's file of this name, because its SHA-256 differs"
        return None, (note,)
    asks = published.preprocessing
    return published, (
        f"{path}: {published.name} of {published.model}, for images of {asks['size']} px "
        f"(resized to {asks['resize']} px, {asks['interpolation']})",
    )


def _preprocessing(published: Pretrained) -> Preprocessing:
    try:
        return Preprocessing.of(dict(published.preprocessing))
    except ValueError as error:
        raise ValueError(f"{published.name}: {error}") from None


def _found(path: Path, content: Any, key: str | None) -> list[StateDict]:
    """The state dicts in the content of a file, at least one."""
    if isinstance(content, Unread):
        raise CheckpointError(
            f"{path}: a pickled {content.path}, not its weights; save its state_dict() with "
            "torch.save"
        )
    found = state_dicts.find(content, key) if isinstance(content, dict) else []
    if found:
        return found
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: neither a checkpoint of resnet_fast nor a state dict")
    names = ", ".join(given(name) for name in list(content)[:6])
    more = ", …" if len(content) > 6 else ""
    if key is not None:
        raise ValueError(f"key: {path} has no ResNet at {given(key)}; it has {names}{more}")
    others = state_dicts.places(content)
    if others:
        raise ValueError(f"{path}: expected a ResNet; choose with key (--key): {brief(others[0])}")
    pickled = [v.path for v in content.values() if isinstance(v, Unread)]
    hint = f"; save the state_dict() of the pickled {pickled[0]}" if pickled else ""
    raise ValueError(
        f"{path}: expected a ResNet; it has {names}{more}, without {state_dicts.FIRST}{hint}"
    )


@dataclass(frozen=True)
class _Match:
    """A state dict, and the name and options of the model that it fits."""

    found: StateDict
    name: str
    options: Mapping[str, Any]


def _only_match(
    path: Path, candidates: Sequence[StateDict], model: str | None, options: Mapping[str, Any],
    channels: int,
) -> _Match:  # fmt: skip
    """The one of `candidates` that fits `model`, or any model if it is None."""
    matches, errors = [], []
    for found in candidates:
        try:
            matches.append(_match(path, found, model, options, channels))
        except ValueError as error:
            errors.append(error)
    if len(matches) > 1:
        keys = " and ".join(match.found.key for match in matches)
        raise ValueError(f"key: {path} has several state dicts; choose one with --key: {keys}")
    if not matches:
        raise errors[0]
    return matches[0]


def _match(
    path: Path, found: StateDict, model: str | None, options: Mapping[str, Any], channels: int
) -> _Match:
    where = f"{path}" if found.key in (OWN, state_dicts.ITSELF) else f"{path}: {found.key}"
    _check_tensors(where, found.body)
    first = found.body.get(state_dicts.FIRST)
    if first is None:
        raise ValueError(f"{where}: expected a ResNet; there is no {state_dicts.FIRST}")
    if first.dim() != 4 or first.size(1) != channels:
        raise ValueError(
            f"{where}: {state_dicts.FIRST}: expected [planes, {channels}, height, width], of "
            f"{channels} input channels, got {list(first.shape)}"
        )
    options = {**options, "in_channels": channels}
    if model is None:
        return _Match(found, _recognize(path, found.body, channels), options)
    wrong = difference(found.body, _shapes(_on_meta(path, model, options)))
    if wrong:
        raise ValueError(f"model: the weights in {where} do not fit {model}: {wrong}")
    return _Match(found, model, options)


def _head(
    path: Path, match: _Match, names: Sequence[str] | None, classes: Sequence[str] | None
) -> tuple[Mapping[str, Tensor], str]:
    """Weight and bias of the classification head for `classes`; none, and why, without them.

    names: the file's class names, if it has them.
    """
    heads = match.found.heads
    if not heads:
        return {}, "the classification head is missing"
    name, head = next(iter(heads.items()))
    if len(heads) > 1 or head.keys() != {"weight", "bias"}:
        keys = [f"{n}.{brief(k)}" for n, tensors in heads.items() for k in tensors]
        return {}, f"the head has {', '.join(keys[:4])}"
    _check_tensors(f"{path}", {f"{name}.{k}": v for k, v in head.items()})
    weight, bias = head["weight"], head["bias"]
    features = _on_meta(path, match.name, match.options).fc.in_features
    if weight.dim() != 2 or weight.size(1) != features or not len(weight):
        return {}, f"{name}.weight has shape {list(weight.shape)}, not [classes, {features}]"
    if bias.shape != weight.shape[:1]:
        return {}, f"{name}.bias has shape {list(bias.shape)}"
    if classes is not None and len(classes) != len(weight):
        return {}, f"the head has {len(weight)} classes"
    if classes is not None and names is not None and not same_classes(classes, names):
        return {}, f"the head has {len(weight)} classes, of other names"
    return head, ""


def _notes(
    path: Path, found: StateDict, why: str, names: Sequence[str] | None,
    classes: Sequence[str] | None,
) -> tuple[str, ...]:  # fmt: skip
    notes = []
    if found.key not in (OWN, state_dicts.ITSELF):
        beside = f" ({found.unused} other entries not used)" if found.unused else ""
        notes.append(f"{path}: took {found.key}{beside}")
    head = next(iter(found.heads), "")
    if why:
        notes.append(f"{path}: {why}; a new head of {len(classes or ())} classes replaces it")
    elif head.rpartition(".")[2] != "fc":
        notes.append(f"{path}: took {head} as fc")
    if not why and classes is not None and names is None:
        notes.append(f"{path}: kept the head of {len(classes)} classes, whose names are unknown")
    return tuple(notes)


def _check_tensors(where: str, tensors: Mapping[str, Any]) -> None:
    """Whether every entry is a dense tensor with values that fp32 can hold."""
    for name, value in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: expected names of tensors, got {given(name)}")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {brief(name)}: expected a tensor, got {given(value)}")
        if not is_dense(value):
            raise CheckpointError(
                f"{where}: {brief(name)}: expected a dense tensor with values, got one that is "
                "sparse, nested, quantized or on meta"
            )
        counter = name.endswith("num_batches_tracked") and not value.dim()
        if not (value.is_floating_point() or counter):
            raise CheckpointError(
                f"{where}: {brief(name)}: expected floating-point values, got {value.dtype}"
            )


def _on_meta(path: Path, name: str, options: Mapping[str, Any], impl: str = "auto") -> ResNet:
    """The model without memory for its parameters."""
    try:
        with torch.device("meta"):
            return create_model(name, **{**options, "impl": impl})
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: spec: {reason(error)}") from None


def _recognize(path: Path, body: Mapping[str, Tensor], channels: int) -> str:
    preactivation = "bn_last.weight" in body  # only pre-activation nets have it
    found = [
        name for name in list_models()
        if ("preact" in name) == preactivation and not difference(body, _known(name, channels))
    ]  # fmt: skip
    if len(found) != 1:
        of = " and ".join(found) or "no model of resnet_fast.list_models()"
        raise ValueError(f"model: the keys and shapes in {path} are those of {of}; give its name")
    return found[0]


@functools.cache
def _known(name: str, channels: int) -> dict[str, torch.Size]:
    return _shapes(_on_meta(Path(), name, {"in_channels": channels}))


def _shapes(net: ResNet) -> dict[str, torch.Size]:
    """Shapes by name, without the head."""
    return {k: v.shape for k, v in net.state_dict().items() if not k.startswith("fc.")}
