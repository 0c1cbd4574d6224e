"""`python -m bench layers`: every convolution of a model, fused beside the library's.

A layer is a convolution with its normalization, addition and ReLU in inference. `resnet_fast` runs
`conv_bn_act` once; `torch` runs the convolution alone and then the rest as PyTorch does, each in
place; `torch conv` is the bare convolution, what the rest costs being the difference. The floor is
what the bytes and operations of a layer take at the machine's measured limits.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from bench import rows
from bench.ceilings import DEVICES, Ceilings, measure, median_ms
from bench.step import DTYPES
from resnet_fast import ops
from resnet_fast.blocks import ChainBlock
from resnet_fast.chain import Conv


@dataclass(frozen=True)
class Layer:
    """A convolution [N,C,H,W] → [N,K,P,Q] with its normalization, and whether a residual is added.

    relu: false for a projection. bytes and flops are for a batch of n, 2 a multiply-add.
    """

    channels: int
    height: int
    width: int
    filters: int
    kernel: tuple[int, int]
    conv: Conv
    residual: bool = False
    relu: bool = True

    @property
    def out_size(self) -> tuple[int, int]:
        """P, Q."""
        height = self.conv.output_size(self.height, self.kernel[0], 0)
        return height, self.conv.output_size(self.width, self.kernel[1], 1)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[K,C/groups,R,S]."""
        return self.filters, self.channels // self.conv.groups, *self.kernel

    def shapes(self, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of x and y for a batch of n."""
        return (n, self.channels, self.height, self.width), (n, self.filters, *self.out_size)

    def flops(self, n: int) -> int:
        """Floating point operations of the convolution."""
        k, c, r, s = self.weight_shape
        p, q = self.out_size
        return 2 * n * p * q * k * c * r * s

    def bytes(self, n: int, size: int) -> int:
        """Bytes that inference must move: x, filters, residual and y once, `size` an element."""
        x, y = (torch.Size(shape).numel() for shape in self.shapes(n))
        return size * (x + torch.Size(self.weight_shape).numel() + y * (1 + self.residual))

    def __str__(self) -> str:
        r, stride = self.kernel[0], self.conv.stride[0]
        name = f"{r}x{r}/{stride} {self.channels}>{self.filters} @{self.height}"
        return name + ("+res" if self.residual else "")


def layers_of(model: str, image: int = 224) -> dict[Layer, int]:
    """Every different convolution of `model` on images of `image` pixels, and how many of each."""
    found: Counter[Layer] = Counter()

    ends: dict[nn.Module, tuple[bool, bool]] = {}  # residual, relu; others: False, True

    def seen(module: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        _, channels, height, width = inputs[0].shape
        conv = Conv(module.stride, module.padding, module.dilation, module.groups)
        size = (channels, height, width, module.out_channels, module.kernel_size)
        found[Layer(*size, conv, *ends.get(module, (False, True)))] += 1

    with torch.device("meta"):
        net = resnet_fast.unfuse(resnet_fast.create_model(model, impl="reference")).eval()
        for block in net.modules():
            if isinstance(block, ChainBlock):
                parts = block.parts()
                ends[parts.convs[-1]] = parts.shortcut != "none", parts.relu
                ends[parts.projection] = False, False
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(seen)
        net(torch.empty(1, 3, image, image))
    return dict(found)


def tensors(
    layer: Layer, n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
    """x, filters, (weight, bias, mean, var) and the residual of `layer`, all channels_last."""
    x_shape, y_shape = layer.shapes(n)

    def draw(shape: tuple[int, ...], spread: float = 1.0) -> Tensor:
        value = torch.randn(shape, device=device) * spread
        return value.to(dtype).contiguous(memory_format=torch.channels_last)

    fan_in = torch.Size(layer.weight_shape[1:]).numel()
    norm = [torch.rand(layer.filters, device=device) + 0.5 for _ in range(4)]
    w = draw(layer.weight_shape, fan_in**-0.5)
    return draw(x_shape), w, norm, draw(y_shape) if layer.residual else None


def providers(
    layer: Layer, n: int, dtype: torch.dtype, device: torch.device, impl: str
) -> dict[str, Callable[[], Tensor]]:
    """What is compared, each on the same tensors."""
    x, w, norm, residual = tensors(layer, n, dtype, device)
    weight, bias, mean, var = norm
    narrow = [v.to(dtype) for v in norm]
    geometry = layer.conv.args()

    def fused() -> Tensor:
        return ops.conv_bn_act(
            x, w, None, weight, bias, mean, var, residual, layer.relu, EPS, *geometry, impl
        )

    def unfused() -> Tensor:
        z = F.conv2d(x, w, None, *geometry)
        z = F.batch_norm(z, narrow[2], narrow[3], narrow[0], narrow[1], False, 0.0, EPS)
        if residual is not None:
            z += residual
        return z.relu_() if layer.relu else z

    return {
        "resnet_fast": fused,
        "torch": unfused,
        "torch conv": lambda: F.conv2d(x, w, None, *geometry),
    }


EPS = 1e-5


def layer_rows(
    layer: Layer, count: int, n: int, dtype: str, impl: str, limits: Ceilings, facts: rows.Row
) -> list[rows.Row]:
    """Time `layer` by every provider, after the fused result has met the unfused one."""
    device = torch.device(facts["device"])
    runs = providers(layer, n, DTYPES[dtype], device, impl)
    with torch.inference_mode():
        found, expected = runs["resnet_fast"]().float(), runs["torch"]().float()
        error = ((found - expected).norm() / expected.norm()).item()
        if not error <= 16 * torch.finfo(DTYPES[dtype]).eps:
            raise RuntimeError(f"{layer}: fused and unfused differ by {error:.2e} of the norm")
        times = {name: median_ms(run, device) for name, run in runs.items()}
    size = DTYPES[dtype].itemsize
    moved, flops = layer.bytes(n, size), layer.flops(n)
    return [
        rows.layer_row(
            facts, benchmark="layers", mode="infer", batch=n, dtype=dtype,
            layout="channels_last", provider=name, ms_p50=ms, impl=impl, layer=str(layer),
            launches=count, gb_per_s=moved / ms / 1e6, tflop_per_s=flops / ms / 1e9,
            percent_of_floor=100 * limits.floor_ms(moved, flops) / ms,
        )
        for name, ms in times.items()
    ]  # fmt: skip


def text(found: list[rows.Row]) -> str:
    """One line a layer: times of every provider, then what ours reaches."""
    names = list(dict.fromkeys(row["provider"] for row in found))
    lines = [
        f"{'layer':28} {'n':>2} " + " ".join(f"{name + ' ms':>15}" for name in names)
        + f" {'GB/s':>6} {'TFLOP/s':>7} {'% of floor':>10}"
    ]  # fmt: skip
    for layer in dict.fromkeys(row["layer"] for row in found):
        own = {row["provider"]: row for row in found if row["layer"] == layer}
        ours = own["resnet_fast"]
        lines.append(
            f"{layer:28} {ours['launches']:2d} "
            + " ".join(f"{own[name]['ms_p50']:15.4f}" for name in names)
            + f" {ours['gb_per_s']:6.0f} {ours['tflop_per_s']:7.1f}"
            + f" {ours['percent_of_floor']:10.0f}"
        )
    totals = [
        sum(row["ms_p50"] * row["launches"] for row in found if row["provider"] == name)
        for name in names
    ]
    lines.append(f"{'all':28} {'':2} " + " ".join(f"{total:15.4f}" for total in totals))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench layers`."""
    parser.add_argument("--model", choices=resnet_fast.list_models(), default="resnet50",
                        metavar="NAME")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the rows")


def run(args: argparse.Namespace) -> int:
    """Measure every layer and print the table; 1 where a result was wrong, 2 without a device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: expected cpu, torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    if args.batch < 1 or args.image_size < 32:
        print("--batch: expected at least 1, and --image-size at least 32", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    facts = {**rows.facts(device), "model": args.model, "image_size": args.image_size}
    limits = measure(device, args.dtype)
    found: list[rows.Row] = []
    try:
        for layer, count in layers_of(args.model, args.image_size).items():
            found += layer_rows(layer, count, args.batch, args.dtype, args.impl, limits, facts)
    except RuntimeError as error:
        print(f"layers: {error}", file=sys.stderr)
        return 1
    print(text(found))
    if args.out is not None:
        rows.append(args.out, found)
    return 0
