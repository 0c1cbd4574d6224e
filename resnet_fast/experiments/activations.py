"""Feature maps, mean, standard deviation and sparsity of every stage of a net for one image.

The net is trained first, or read from `--weights FILE` (of `resnet-fast train`, or torchvision's,
which may be given by name); `--image FILE` replaces the test image.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models import ResNet
from ..spec.values import printable
from ..training.evaluation import as_input
from ..training.images import read_image
from ..training.preprocessing import Preprocessing
from ..training.weights import load_weights
from . import compare, nets
from .findings import Claim, Findings
from .options import add_count, add_depth

ABOUT = """\
One image goes through {what} in eval mode. For each stage the picture shows the {maps} channels \
that vary most over the image. Beside them are the mean, the standard deviation and the sparsity \
(the share of zeros, which ReLU makes) of all values of the stage.

With each stage the maps become coarser and the channels more: early maps still look like the \
image, later ones show where something was found. Prediction for this image: {reading}.

A ReLU after a normalization makes about half of its values zero, as after the stem. In a \
residual stage fewer values are zero: x is not negative, and only F(x) ≤ −x gives zero. Each \
block adds to the signal, so its values grow."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment activations`."""
    add = parser.add_argument
    add("--index", type=int, default=0, metavar="I", help="number of the test image (default: 0)")
    add("--image", type=Path, metavar="FILE", help="an image file, in place of a test image")
    add("--weights", type=Path, metavar="FILE", help="weights, in place of training; "
        "also published ones, such as IMAGENET1K_V2")  # fmt: skip
    add("--model", metavar="NAME", help="model of --weights (default: as in FILE)")
    add("--key", metavar="KEY", help="which weights, if FILE has several")
    add_count(parser, "--maps", 8, "channels to show per stage")
    add_depth(parser, 20)
    compare.add_training(parser, epochs=10, repeats=None)


def stages(model: ResNet, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the stem and of every stage for x, and the logits, in eval mode."""
    found: dict[str, Tensor] = {}
    hooks = []
    for number in range(1, model.stages + 1):
        name = f"layer{number}"
        stage = getattr(model, name)
        hooks.append(stage.register_forward_hook(lambda _, __, y, n=name: found.update({n: y})))
        if number == 1:
            hooks.append(stage.register_forward_pre_hook(lambda _, x: found.update(stem=x[0])))
    try:
        with torch.no_grad():
            logits = model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found, logits


def statistics(h: Tensor) -> dict[str, float]:
    """mean, std, sparsity (share of values ≤ 0), size and channels of activations [1,C,H,W]."""
    wide = h.float()
    return {
        "channels": h.size(1), "size": h.size(2), "mean": wide.mean().item(),
        "std": wide.std().item(), "sparsity": (wide <= 0).float().mean().item(),
    }  # fmt: skip


def run(args: argparse.Namespace) -> Findings:
    """Train or load a net; collect the outputs of its stages for one image."""
    if args.weights is not None:
        loaded = load_weights(
            args.weights, args.model, key=args.key, impl=args.impl, device=args.device
        )
        model, names, preprocessing = loaded.model, loaded.classes, loaded.preprocessing
        what = f"{loaded.name} ({args.weights.name})"
        image = None if args.image is None else read_image(args.image, preprocessing)
        if image is None:
            image = _test_image(compare.data_of(args), args.index)
    else:
        data = compare.data_of(args)
        names, preprocessing = data.classes, data.preprocessing
        image = _test_image(data, args.index)
        if args.image is not None:
            image = read_image(args.image, preprocessing)
        model = _train(args, data)
        what = f"a residual net of {args.depth} layers, trained {args.epochs} epochs"
    x = as_input(image[None].to(args.device), preprocessing, model)
    found, logits = stages(model, x)
    figures = {name: statistics(h) for name, h in found.items()}
    share, label = logits.float().softmax(1)[0].max(0)
    name = printable(names[label]) if names else str(int(label))
    reading = f"{name}, probability {share:.1%}"
    claims = _claims(figures) if args.weights is None else []  # of these nets only
    return Findings(
        "Activations", ABOUT.format(what=what, maps=args.maps, reading=reading),
        claims, _table(figures), {"stages": figures, "reading": reading},
        lambda figure: _draw(figure, _shown(image, preprocessing), found, figures, args.maps),
        (0.6 * (args.maps + 2), 0.82 * (len(found) + 1)),
    )  # fmt: skip


def _test_image(data: Any, index: int) -> Tensor:
    count = data.count("test")
    if not 0 <= index < count:
        raise ValueError(f"index: expected 0 to {count - 1}, got {index}")
    ((x, _),) = data.batches("test", [torch.tensor([index])], torch.device("cpu"))
    return x[0]


def _train(args: argparse.Namespace, data: Any) -> nn.Module:
    runs = compare.compare(
        {"residual": lambda: nets.net(
            args.depth, "zero_pad", num_classes=data.num_classes, in_channels=data.channels,
            planes=args.planes, impl=args.impl,
        )}, data, args,
    )  # fmt: skip
    return runs["residual"][0].model


def _claims(figures: dict[str, dict[str, float]]) -> list[Claim]:
    stem, *later = figures.values()
    most = max(one["sparsity"] for one in later)
    return [
        Claim(
            f"{stem['sparsity']:.0%} of the stem's values are zero, and fewer in the residual "
            f"stages: at most {most:.0%}",
            most < stem["sparsity"],
        ),
        Claim(
            f"the standard deviation grows from {stem['std']:.2f} after the stem to "
            f"{later[-1]['std']:.2f} after the last stage",
            stem["std"] < later[-1]["std"],
        ),
    ]


def _table(figures: dict[str, dict[str, float]]) -> list[list[str]]:
    lines = [["stage", "channels", "pixels", "mean", "std", "sparsity"]]
    for name, one in figures.items():
        lines.append([
            name, str(one["channels"]), f"{one['size']}×{one['size']}", f"{one['mean']:.3f}",
            f"{one['std']:.3f}", f"{one['sparsity']:.1%}",
        ])  # fmt: skip
    return lines


def _shown(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[H,W,C] in [0, 1]."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    return image.permute(1, 2, 0).clamp(0, 1)


def _draw(figure: Any, image: Tensor, found: dict[str, Tensor], figures: Any, maps: int) -> None:
    grid = figure.subplots(len(found) + 1, maps + 1, width_ratios=[2, *[1] * maps])
    for axes in grid.flat:
        axes.set_axis_off()
    shown = image if image.size(2) == 3 else image[:, :, 0]
    grid[0, 0].imshow(shown.numpy(), cmap="gray")
    grid[0, 1].text(0, 0.5, "the image", va="center")
    for row, (name, h) in zip(grid[1:], found.items(), strict=True):
        one = figures[name]
        row[0].text(
            0, 0.5, f"{name}\n{one['channels']} × {one['size']}×{one['size']}\n"
            f"mean {one['mean']:.2f}\nstd {one['std']:.2f}\n{one['sparsity']:.0%} zeros",
            va="center", fontsize=9,
        )  # fmt: skip
        h = h[0].float().cpu()
        order = h.flatten(1).std(1).argsort(descending=True)
        for axes, channel in zip(row[1:], order.tolist(), strict=False):
            axes.imshow(h[channel].numpy(), cmap="magma")
