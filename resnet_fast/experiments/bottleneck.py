"""Basic and bottleneck blocks at 50 layers: parameters, multiply-adds, measured speed.

He et al. 2015 (arXiv:1512.03385, section 4.1): the 3×3 convolution of a bottleneck has a quarter of
the block's channels, which makes depth and width cheaper. ResNet-50 is [3, 4, 6, 3] bottlenecks of
three layers; the other net has as many layers, in basic blocks, in similar proportions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ..models import ResNet
from ..modules import PLAIN, BasicBlock, Bottleneck
from .findings import Claim, Findings, plain_axes
from .html_page import GREY
from .nets import parameters
from .options import add_count

NETS = {
    "basic, 50 layers": (BasicBlock, [5, 6, 9, 4]),
    "bottleneck, 50 layers": (Bottleneck, [3, 4, 6, 3]),
    "basic, 34 layers": (BasicBlock, [3, 4, 6, 3]),
}
BASIC, BOTTLENECK, _ = NETS
IMAGENET = 224
CHANNELS = 256

ABOUT = """\
Three nets for ImageNet with the same stem and stage widths: ResNet-50 (bottlenecks), ResNet-34, \
and a net of 50 layers in basic blocks. Multiply-adds are those of the convolutions for one image \
of 224 pixels. Speed is measured on this machine, the nets in turn: the median of {rounds} rounds \
of {batch} images of {pixels} pixels.

At equal depth bottlenecks have fewer parameters and fewer multiply-adds, and give the \
classifier four times as many channels. The time falls less than the arithmetic: a bottleneck's \
wide 1×1 convolutions, and the normalization, addition and ReLU on its {channels} or more \
channels, are passes over memory. These passes are what resnet_fast fuses."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast experiment bottleneck`."""
    add_count(parser, "--pixels", 112, "height and width of images in pixels")
    add_count(parser, "--batch-size", 8, "images in a batch")
    add_count(parser, "--rounds", 9, "timed rounds")


def multiply_adds(model: nn.Module, pixels: int = IMAGENET) -> int:
    """Multiply-adds of the convolutions of plain `model` for one image, counted on meta."""
    total = 0

    def count(conv: nn.Conv2d, _: Any, z: torch.Tensor) -> None:
        nonlocal total
        total += z[0].numel() * conv.weight[0].numel()

    model = model.to("meta").eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, pixels, pixels, device="meta"))
    return total


def run(args: argparse.Namespace) -> Findings:
    """Count, then time inference and training steps of the three nets in turn."""
    figures: dict[str, dict[str, float]] = {}
    models = {}
    plain = args.impl == "reference"
    for name, (block, layers) in NETS.items():
        torch.manual_seed(args.seed)
        twin = ResNet(block, layers, fused=False)
        figures[name] = {
            "parameters": parameters(twin),
            "multiply_adds": multiply_adds(twin),
            "features": twin.fc.in_features,
        }
        options = {"fused": False} if plain else {"impl": args.impl}
        models[name] = ResNet(PLAIN[block] if plain else block, layers, **options)
        models[name].to(args.device, memory_format=torch.channels_last)
    shape = (args.batch_size, 3, args.pixels, args.pixels)
    x = torch.randn(shape, device=args.device).to(memory_format=torch.channels_last)
    y = torch.arange(args.batch_size, device=args.device)
    for mode, step in (("inference", _infer), ("training", _train)):
        actions = {name: partial(step, model, x, y) for name, model in models.items()}
        seconds = _medians(actions, args.rounds, args.device, mode)
        for name in NETS:
            figures[name][f"{mode}_images_per_second"] = args.batch_size / seconds[name]
    blocks = {
        kind.__name__: parameters(kind(CHANNELS, CHANNELS // kind.expansion))
        for kind in (BasicBlock, Bottleneck)
    }
    about = ABOUT.format(
        rounds=args.rounds, batch=args.batch_size, pixels=args.pixels, channels=CHANNELS
    )
    return Findings(
        "Basic and bottleneck blocks", about, _claims(figures, blocks), _table(figures),
        {"nets": figures, f"parameters of one block on {CHANNELS} channels": blocks},
        lambda figure: _draw(figure, figures), (6.0, 5.0),
    )  # fmt: skip


def _infer(model: nn.Module, x: torch.Tensor, _: torch.Tensor) -> None:
    with torch.no_grad():
        model.eval()(x)


def _train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    F.cross_entropy(model.train()(x), y).backward()
    model.zero_grad(set_to_none=True)


def _medians(
    actions: dict[str, Callable[[], None]], rounds: int, device: str, what: str
) -> dict[str, float]:
    """Median seconds of each action over `rounds`, in turn, after one warm-up call each."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in tqdm(range(rounds + 1), desc=what, unit="round", leave=False, disable=None):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _claims(figures: dict[str, Any], blocks: dict[str, int]) -> list[Claim]:
    basic, narrow = figures[BASIC], figures[BOTTLENECK]
    ratio = blocks["BasicBlock"] / blocks["Bottleneck"]
    return [
        Claim(
            f"50 layers of bottlenecks have {narrow['parameters'] / 1e6:.1f} M parameters, 50 "
            f"layers of basic blocks {basic['parameters'] / 1e6:.1f} M",
            narrow["parameters"] < basic["parameters"],
        ),
        Claim(
            f"bottlenecks take {narrow['multiply_adds'] / 1e9:.2f} G multiply-adds, basic blocks "
            f"{basic['multiply_adds'] / 1e9:.2f} G",
            narrow["multiply_adds"] < basic["multiply_adds"],
        ),
        Claim(
            f"bottlenecks give the classifier {narrow['features']} channels, basic blocks "
            f"{basic['features']}",
            narrow["features"] == 4 * basic["features"],
        ),
        Claim(
            f"on {CHANNELS} channels a basic block has {ratio:.0f} times a bottleneck's parameters",
            ratio > 10,
        ),
    ]


def _table(figures: dict[str, Any]) -> list[list[str]]:
    header = ["net", "M parameters", "G multiply-adds", "features", "infer images/s",
              "train images/s"]  # fmt: skip
    return [header] + [
        [
            name, f"{one['parameters'] / 1e6:.2f}", f"{one['multiply_adds'] / 1e9:.2f}",
            str(one["features"]), f"{one['inference_images_per_second']:.1f}",
            f"{one['training_images_per_second']:.1f}",
        ]
        for name, one in figures.items()
    ]  # fmt: skip


def _draw(figure: Any, figures: dict[str, Any]) -> None:
    shown = {
        "M parameters": ("parameters", 1e6),
        "G multiply-adds, 224 pixels": ("multiply_adds", 1e9),
        "images/s, inference": ("inference_images_per_second", 1),
        "images/s, training": ("training_images_per_second", 1),
    }
    names = [name.replace(", ", "\n") for name in figures]
    axes = figure.subplots(2, 2)
    for one, (title, (key, unit)) in zip(axes.flat, shown.items(), strict=True):
        values = [found[key] / unit for found in figures.values()]
        bars = one.bar(names, values, color=[GREY, "#e8590c", GREY], width=0.6)
        one.bar_label(bars, [f"{value:.3g}" for value in values], color=GREY, fontsize=9)
        one.set_title(title)
        one.tick_params(axis="x", labelsize=9)
        plain_axes(one)
