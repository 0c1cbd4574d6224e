"""pytest-benchmark suite of the ops: fused against unfused PyTorch, at the shapes of ResNet-50.

    pytest bench/ops.py                                        everything
    pytest bench/ops.py -k "bn_act and bf16 and train"         part of it
    pytest bench/ops.py --benchmark-json=FILE                  with versions and machine

A group is one op at one layer, mode and dtype, and compares resnet_fast with eager. Inference:
weights and activations in the dtype. Training: forward and backward, fp32 parameters, activations
in the dtype under autocast. `bench.gate` checks resnet_fast against fp64 before it is timed.
Environment variables, with defaults: RESNET_FAST_BENCH_BATCH (16), RESNET_FAST_BENCH_DEVICE (cpu),
RESNET_FAST_BENCH_IMPL (auto).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from bench import gate, timing
from bench.step import autocast
from resnet_fast.modules import run_fused
from resnet_fast.runtime import settings
from resnet_fast.spec.layers import Parts

BATCH = settings.BENCH_BATCH.read()
DEVICE = torch.device(settings.BENCH_DEVICE.read())
IMPL = settings.BENCH_IMPL.read()
GATE_BATCH = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Forward = Callable[[nn.Module, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Layer:
    """A place in ResNet-50: channels and size of x, its module, channels and size of a residual."""

    name: str
    channels: int
    size: int
    make: Callable[[], nn.Module]
    residual: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.size}x{self.size}x{self.channels}"


class ConvBN(nn.Module):
    """A convolution and its normalization; the benchmark calls them."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)


def _conv(name: str, c: int, size: int, k: int, kernel: int, stride: int = 1, skip: bool = False):
    residual = (k, size // stride) if skip else None
    return Layer(name, c, size, lambda: ConvBN(c, k, kernel, stride), residual)


def _norm(name: str, c: int, size: int, skip: bool = False):
    return Layer(name, c, size, lambda: nn.BatchNorm2d(c), (c, size) if skip else None)


def _stem_end() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))


def _block(name: str, c: int, size: int, planes: int, stride: int = 1):
    return Layer(name, c, size, lambda: resnet_fast.Bottleneck(c, planes, stride, impl=IMPL))


CONVS = [
    _conv("conv1", 3, 224, 64, 7, stride=2),
    _conv("layer1.conv1", 256, 56, 64, 1),
    _conv("layer1.conv2", 64, 56, 64, 3),
    _conv("layer1.conv3", 64, 56, 256, 1, skip=True),
    _conv("layer2.0.conv2", 128, 56, 128, 3, stride=2),
    _conv("layer3.conv2", 256, 14, 256, 3),
    _conv("layer4.conv3", 512, 7, 2048, 1, skip=True),
]
NORMS = [
    _norm("bn1", 64, 112),
    _norm("layer1.bn1", 64, 56),
    _norm("layer1.bn3", 256, 56, skip=True),
    _norm("layer2.bn3", 512, 28, skip=True),
    _norm("layer3.bn3", 1024, 14, skip=True),
    _norm("layer4.bn3", 2048, 7, skip=True),
]
POOLS = [Layer("maxpool", 64, 112, _stem_end)]
ADDS = [
    Layer("layer1", 256, 56, nn.Identity, (256, 56)),
    Layer("layer2", 512, 28, nn.Identity, (512, 28)),
    Layer("layer3", 1024, 14, nn.Identity, (1024, 14)),
    Layer("layer4", 2048, 7, nn.Identity, (2048, 7)),
]
BLOCKS = [
    _block("layer1.1", 256, 56, 64),
    _block("layer2.0", 256, 56, 128, stride=2),
    _block("layer2.1", 512, 28, 128),
    _block("layer3.1", 1024, 14, 256),
    _block("layer4.1", 2048, 7, 512),
]


def _join(y: Tensor, residual: Tensor | None) -> Tensor:
    """Residual and ReLU in place on a normalization's output, as torchvision's blocks do."""
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True)


def eager_conv_bn_act(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return _join(m.bn(m.conv(x)), residual)


def eager_bn_act(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return _join(m(x), residual)


def eager_add_relu(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return F.relu(x + residual, inplace=True)


def eager_bottleneck(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    y = F.relu(m.bn1(m.conv1(x)), inplace=True)
    y = F.relu(m.bn2(m.conv2(y)), inplace=True)
    return _join(m.bn3(m.conv3(y)), x if m.downsample is None else m.downsample(x))


def fused_conv_bn_act(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return resnet_fast.conv_bn_act(
        x, m.conv.weight, m.bn.weight, m.bn.bias, m.bn.running_mean, m.bn.running_var,
        residual=residual, stride=m.conv.stride, padding=m.conv.padding, training=m.training,
        impl=IMPL,
    )  # fmt: skip


def fused_bn_act(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return resnet_fast.bn_act(
        x, m.weight, m.bias, m.running_mean, m.running_var,
        residual=residual, training=m.training, impl=IMPL,
    )  # fmt: skip


def eager_bn_relu_max_pool(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return m(x)


def fused_bn_relu_max_pool(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return run_fused(Parts((), (m[0],), True, "none", pool=m[2]), x, impl=IMPL)


def fused_add_relu(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return resnet_fast.add_relu(x, residual, impl=IMPL)


def fused_bottleneck(m: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return m(x)


OPS: dict[str, tuple[list[Layer], Forward, Forward]] = {
    "conv_bn_act": (CONVS, eager_conv_bn_act, fused_conv_bn_act),
    "bn_act": (NORMS, eager_bn_act, fused_bn_act),
    "bn_relu_max_pool": (POOLS, eager_bn_relu_max_pool, fused_bn_relu_max_pool),
    "add_relu": (ADDS, eager_add_relu, fused_add_relu),
    "bottleneck": (BLOCKS, eager_bottleneck, fused_bottleneck),
}
CASES = [
    pytest.param(op, layer, id=f"{op}-{layer}".replace(" ", "-"))
    for op, (layers, _, _) in OPS.items()
    for layer in layers
]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def problem(layer: Layer, batch: int, mode: str, dtype: torch.dtype):
    """The layer's module and its inputs x and, where it has one, residual."""
    torch.manual_seed(0)
    module = layer.make()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean, 0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    narrow = dtype if mode == "infer" else torch.float32
    module.to(DEVICE, narrow, memory_format=torch.channels_last).train(mode == "train")
    x = noise((batch, layer.channels, layer.size, layer.size), dtype, 1)
    residual = None
    if layer.residual is not None:
        k, size = layer.residual
        residual = noise((batch, k, size, size), dtype, 2)
    return module, x, residual


def stepper(forward: Forward, module: nn.Module, x: Tensor, residual: Tensor | None, mode: str):
    """A function that runs one step: the output and, in training, all gradients by name."""
    if mode == "infer":

        def infer() -> tuple[Tensor, dict[str, Tensor]]:
            with torch.inference_mode():
                return forward(module, x, residual), {}

        return infer
    leaves = {"x": x.detach().requires_grad_()}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    leaves |= dict(module.named_parameters())
    grad: list[Tensor] = []

    def train() -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(DEVICE, x.dtype):
            y = forward(module, leaves["x"], leaves.get("residual"))
        if not grad:
            grad.append(noise(tuple(y.shape), x.dtype, 3).to(y.dtype))
        gradients = torch.autograd.grad(y, list(leaves.values()), grad[0])
        return y.detach(), dict(zip(leaves, gradients, strict=True))

    return train


def check(op: str, layer: Layer, mode: str, dtype: torch.dtype) -> None:
    """Assert that the fused error against fp64 is within the gate of eager's, at GATE_BATCH."""
    _, eager, fused = OPS[op]
    module, x, residual = problem(layer, GATE_BATCH, mode, dtype)
    runs = []
    for forward, wide in ((fused, False), (eager, False), (eager, True)):
        own = copy.deepcopy(module)
        tensors = x, residual
        if wide:
            own.double()
            tensors = x.double(), None if residual is None else residual.double()
        y, gradients = stepper(forward, own, *tensors, mode)()
        running = {n: b for n, b in own.named_buffers() if n.endswith(("_mean", "_var"))}
        runs.append(({"y": y}, gradients, running))
    kinds = zip(("output", "gradients", "running statistics"), zip(*runs, strict=True), strict=True)
    for kind, tensors in kinds:
        if tensors[2]:
            verdict = gate.compare(kind, *tensors, dtype, gradients=kind == "gradients")
            assert verdict.ok, f"{op} {layer}: {verdict}"


@pytest.mark.parametrize("provider", ["eager", "resnet_fast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(("op", "layer"), CASES)
def test_op(benchmark, op: str, layer: Layer, mode: str, dtype: str, provider: str) -> None:
    """One op, one layer, one mode, one dtype, one provider: gate, warm-up, measurement."""
    if provider == "resnet_fast":
        check(op, layer, mode, DTYPES[dtype])
    module, x, residual = problem(layer, BATCH, mode, DTYPES[dtype])
    forward = OPS[op][1 if provider == "eager" else 2]
    run = stepper(forward, module, x, residual, mode)
    sync = timing.synchronizer(DEVICE)
    timing.warm_up(lambda i: run(), sync)
    benchmark.group = f"{op} {layer}, {mode} {dtype}, batch {BATCH}"
    benchmark.extra_info.update(
        torch=torch.__version__, device=str(DEVICE), threads=torch.get_num_threads(), impl=IMPL
    )

    def measured() -> None:
        run()
        sync()

    benchmark(measured)
