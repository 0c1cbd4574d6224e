"""`python -m bench layers`: every convolution of a model, by resnet_fast and by PyTorch.

A layer is a convolution with the operations around it, in one of four modes:

    infer   normalization by running statistics, addition, ReLU
    fprop   the normalization and ReLU of its input, the statistics of its output
    dgrad   backward of its normalization, dx, backward of the previous ReLU, sums of the previous
            normalization
    wgrad   dw, with its input and its normalization's backward recomputed

`resnet_fast` is one resnet_fast op; `torch` is the convolution and the other operations in PyTorch;
`torch conv` is the bare convolution. On a GPU `fused` and `library` are that plan of the op
(RESNET_FAST_TRITON_CONV), `resnet_fast` chooses by table or rule, and `native` runs the CUDA
kernels. The floor is the time of the layer's bytes and operations at the machine's measured limits.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from bench import rows
from bench.ceilings import Ceilings, measure, median_ms
from resnet_fast.blocks import ChainBlock
from resnet_fast.dispatch import ops
from resnet_fast.dispatch.backends import refusal
from resnet_fast.runtime.options import DEVICES
from resnet_fast.runtime.settings import TRITON_CONV
from resnet_fast.spec.chain import Conv
from resnet_fast.spec.dtypes import PRECISIONS


@dataclass(frozen=True)
class Layer:
    """A convolution [N,C,H,W] → [N,K,P,Q] with its normalization, and whether a residual is added.

    relu: False for a projection. bytes and flops are for a batch of n; a multiply-add counts as 2.
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
        """Floating-point operations of the convolution."""
        k, c, r, s = self.weight_shape
        p, q = self.out_size
        return 2 * n * p * q * k * c * r * s

    def bytes(self, n: int, size: int, mode: str = "infer") -> int:
        """Bytes that a mode must move, `size` per element: each tensor it reads or writes, once.

        infer: x, filters, residual, y. fprop: x, filters, z. dgrad: dy, z, filters, x, dx. wgrad:
        dy, z, x, dw. A strided 1x1 convolution reads only the pixels of x that it uses.
        """
        x, y = (torch.Size(shape).numel() for shape in self.shapes(n))
        w = torch.Size(self.weight_shape).numel()
        read = y // self.filters * self.channels if self.kernel == (1, 1) else x
        moved = {
            "infer": read + w + y * (1 + self.residual),
            "fprop": read + w + y,
            "dgrad": 2 * y + w + 2 * x,
            "wgrad": 2 * y + w + read,
        }
        return size * moved[mode]

    def __str__(self) -> str:
        r, stride = self.kernel[0], self.conv.stride[0]
        name = f"{r}x{r}/{stride} {self.channels}>{self.filters} @{self.height}"
        return name + ("+res" if self.residual else "")


@functools.cache
def layers_of(model: str, image: int = 224) -> Mapping[Layer, int]:
    """Every distinct convolution of `model` on images of `image` pixels, and its count."""
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
    return MappingProxyType(found)


def flops_of(model: str, kind: str, image: int = 224) -> int:
    """Floating-point operations of the convolutions per image, in inference or training.

    kind: "infer" or "train", which adds dgrad and wgrad. The gradient of an image is not computed.
    """
    layers = layers_of(model, image)
    forward = sum(count * layer.flops(1) for layer, count in layers.items())
    first = sum(count * layer.flops(1) for layer, count in layers.items() if layer.channels < 16)
    return forward if kind == "infer" else 3 * forward - first


def joins_of(model: str, image: int = 224) -> Iterator[tuple[Layer, Layer]]:
    """Every distinct projection, and the convolution whose residual it is."""
    layers = layers_of(model, image)
    for projection in layers:
        if not projection.relu and not projection.residual:
            y = projection.filters, projection.out_size
            for one in layers:
                if one.residual and (one.filters, one.out_size) == y:
                    yield projection, one


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


EPS = 1e-5
MODES = ("infer", "fprop", "dgrad", "wgrad")
Runs = dict[str, Callable[[], Tensor]]


def infer(layer: Layer, n: int, dtype: torch.dtype, device: torch.device, impl: str) -> Runs:
    """The calls that are compared in inference, all on the same tensors."""
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

    conv = partial(F.conv2d, x, w, None, *geometry)
    found: Runs = {"resnet_fast": fused, "torch": unfused, "torch conv": conv}
    if device.type == "cuda" and refusal("native", "conv_bn_act", "cuda", dtype) is None:
        args = [x, w, None, weight, bias, mean, var, residual, layer.relu, EPS, *geometry]
        found["native"] = partial(ops.conv_bn_act, *args, "native")
    return found


def train(mode: str) -> Callable[[Layer, int, torch.dtype, torch.device, str], Runs]:
    """The calls that are compared in one pass of training: "fprop", "dgrad" or "wgrad"."""

    def runs(layer: Layer, n: int, dtype: torch.dtype, device: torch.device, impl: str) -> Runs:
        x, w, norm, _ = tensors(layer, n, dtype, device)
        weight, bias, *_ = norm
        below = [torch.rand(layer.channels, device=device) + 0.5 for _ in range(4)]
        if layer.channels < 16:  # the image has no normalization
            below = [None] * 4
        geometry = layer.conv.args()
        need = mode == "dgrad", mode == "wgrad"

        h = x if below[0] is None else F.relu(_affine(x, *below[:2]))
        z = F.conv2d(h, w, None, *geometry)
        dy = torch.randn_like(z)
        wide = z.float()
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
        rstd = torch.rsqrt(var + EPS)
        count = z.numel() // z.size(1)
        xhat = (wide - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1)
        sums = dy.float().sum((0, 2, 3)), (dy.float() * xhat).sum((0, 2, 3))
        del wide, xhat
        a = weight * rstd
        b, c = -a * rstd * sums[1] / count, -a * sums[0] / count

        def fused() -> Tensor:
            if mode == "fprop":
                return ops.conv_fprop(
                    x, w, *below[:2], True, weight, bias, EPS, None, False, *geometry, impl
                )[0]
            grads = ops.conv_bprop(
                dy, w, x, None, a, z, mean, b, c, *below[:2],
                *(below[2:] if mode == "dgrad" else (None, None)), None, None, None, *geometry,
                *need, False, impl,
            )  # fmt: skip
            return grads[mode == "wgrad"]

        def asked(how: str) -> Tensor:
            with TRITON_CONV.set_to(how):
                return fused()

        def backward(dz: Tensor) -> Tensor:
            return torch.ops.aten.convolution_backward(
                dz, h, w, None, *geometry[:3], False, [0, 0], geometry[3], [*need, False]
            )[mode == "wgrad"]

        norm_backward = batch_norm_backward(z, weight, bias) if mode == "dgrad" else None

        def unfused() -> Tensor:
            if mode == "fprop":
                u = F.conv2d(h, w, None, *geometry)
                F.batch_norm(u, None, None, weight, bias, True, 0.0, EPS).relu_()
                return u
            if mode == "dgrad":
                return torch.ops.aten.threshold_backward(backward(norm_backward(dy)), h, 0)
            return backward(dz)

        dz = (_affine(dy.float(), a, c) + _affine(z.float() - mean.view(-1, 1, 1), b)).to(dtype)
        dz = dz.contiguous(memory_format=torch.channels_last)
        bare = (
            (lambda: F.conv2d(h, w, None, *geometry)) if mode == "fprop" else partial(backward, dz)
        )
        found: Runs = {"resnet_fast": fused, "torch": unfused, "torch conv": bare}
        if device.type == "cuda":
            found |= {"fused": partial(asked, "fused"), "library": partial(asked, "library")}
        return found

    return runs


def batch_norm_backward(z: Tensor, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """dz from dy, as autograd computes it after F.batch_norm in training: by cuDNN or PyTorch.

    The forward pass runs here. An autograd graph would run its backward on the stream of its
    forward, which may differ from the stream that a CUDA graph captures.
    """
    aten, cudnn = torch.ops.aten, torch.backends.cudnn.enabled
    _, mean, rstd, reserve, which = aten._batch_norm_impl_index(
        z, weight, bias, None, None, True, 0.0, EPS, cudnn
    )

    def backward(dy: Tensor) -> Tensor:
        saved = mean, rstd, True, EPS, [True, False, False], reserve
        return aten._batch_norm_impl_index_backward(which, z, dy, weight, None, None, *saved)[0]

    return backward


def _affine(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """scale·x + shift per channel in x's dtype."""
    y = x.float() * scale.view(-1, 1, 1)
    return (y if shift is None else y + shift.view(-1, 1, 1)).to(x.dtype)


def layer_rows(
    layer: Layer, count: int, n: int, dtype: str, impl: str, mode: str, limits: Ceilings,
    facts: rows.Row,
) -> list[rows.Row]:  # fmt: skip
    """Time `layer` by every provider, after comparing the fused with the unfused result."""
    device = torch.device(facts["device"])
    make = infer if mode == "infer" else train(mode)
    with torch.no_grad():
        runs = make(layer, n, PRECISIONS[dtype], device, impl)
        found, expected = runs["resnet_fast"]().float(), runs["torch"]().float()
        error = difference(found, expected)
        # gradients: a recomputed ReLU input may change its sign where it is nearly zero
        allowed = max(16 * torch.finfo(PRECISIONS[dtype]).eps, 1e-3 * (mode in MODES[2:]))
        if not error <= allowed:
            raise RuntimeError(
                f"fused and unfused differ by {error:.2e} of the norm, allowed {allowed:.2e}"
            )
        del found, expected
        times = {name: median_ms(run, device) for name, run in runs.items()}
    size = PRECISIONS[dtype].itemsize
    moved, flops = layer.bytes(n, size, mode), layer.flops(n)
    return [
        rows.layer_row(
            facts, benchmark="layers", mode=mode, batch=n, dtype=dtype,
            layout="channels_last", provider=name, ms_p50=ms, impl=impl, layer=str(layer),
            launches=count, gb_per_s=moved / ms / 1e6, tflop_per_s=flops / ms / 1e9,
            percent_of_floor=100 * limits.floor_ms(moved, flops) / ms,
        )
        for name, ms in times.items()
    ]  # fmt: skip


def difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).norm() / expected.norm()).item()


def text(found: list[rows.Row]) -> str:
    """One table per mode: one line per layer with all times, then the rates of resnet_fast."""
    modes = dict.fromkeys(row["mode"] for row in found)
    return "\n\n".join(table([row for row in found if row["mode"] == mode]) for mode in modes)


def table(found: list[rows.Row]) -> str:
    """The table of one mode."""
    names = list(dict.fromkeys(row["provider"] for row in found))
    lines = [
        f"{found[0]['mode'] + ' of layer':28} {'n':>2} "
        + " ".join(f"{name + ' ms':>15}" for name in names)
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
                        metavar="NAME", help="model (default: resnet50)")  # fmt: skip
    parser.add_argument("--mode", default="infer",
                        help=f"some of {','.join(MODES)} (default: infer)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256, help="batch size (default: 256)")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="bf16", help="default: bf16")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    parser.add_argument("--impl", default="auto",
                        help="implementation of resnet_fast (default: auto)")  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl",
                        help="append the rows to this file")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure every layer and print the table; 1 if a layer failed, 2 for a bad argument.

    Each layer's rows are appended when it is done; layers after a failed one still run.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: expected cpu: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    if args.batch < 1 or args.image_size < 32:
        print("--batch: expected at least 1, and --image-size at least 32", file=sys.stderr)
        return 2
    unknown = [mode for mode in args.mode.split(",") if mode not in MODES]
    if unknown:
        print(f"--mode: expected some of {', '.join(MODES)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    facts = {**rows.facts(device), "model": args.model, "image_size": args.image_size}
    limits = measure(device, args.dtype)
    done = rows.Collection("layers", args.out)
    for mode in args.mode.split(","):
        for layer, count in layers_of(args.model, args.image_size).items():
            if mode == "dgrad" and layer.channels < 16:
                continue  # the gradient of an image is not computed
            with done.part(f"{layer} {mode}"):
                done.add(layer_rows(
                    layer, count, args.batch, args.dtype, args.impl, mode, limits, facts
                ))  # fmt: skip
    if done.found:
        print(text(done.found))
    return done.status()
