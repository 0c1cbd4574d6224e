"""Runs of a module: fused in the tested dtype, plain in the same dtype, and plain in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .check import GRADIENT, Runs, Setting, Values
from .settle import settle

MODES = {
    "train": "batch statistics, gradients and running statistics; 16 bits by autocast",
    "frozen": "running statistics and gradients; 16 bits by autocast",
    "infer": "running statistics, no gradients; 16 bits throughout",
}
DRAWS = 20


def randomize(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every vector of a normalization with random values.

    This reveals swapped, ignored or reordered vectors. One weight in eight is negative.
    """
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                sign = torch.rand(norm.weight.shape, generator=generator) < 0.125
                norm.weight.copy_(torch.where(sign, -norm.weight, norm.weight))
                norm.bias.normal_(0, 0.5, generator=generator)
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)


def round_to(module: nn.Module, exact: torch.dtype) -> None:
    """Round all parameters and buffers, in place, to values that `exact` represents."""
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.copy_(value.to(exact))


def evaluate(
    module: nn.Module,
    inputs: Sequence[Tensor],
    dy: Tensor,
    setting: Setting,
    dtype: torch.dtype,
    mode: str,
) -> Values:
    """Results of a copy of `module` in `dtype` and one of MODES, forward and backward from `dy`.

    They are y; with gradients, those of the inputs (x, residual) and of every parameter; after
    training, also the running statistics. "train, infer" adds an inference after it, "infer y".
    """
    train, infer = mode.startswith("train"), mode == "infer"
    autocast = dtype.itemsize == 2 and not infer
    module = copy.deepcopy(module).train(train)
    where = {"device": setting.device, "memory_format": setting.memory_format}
    module.to(dtype=torch.float32 if autocast else dtype, **where)
    inputs = [x.to(dtype=dtype, **where).clone().requires_grad_(not infer) for x in inputs]
    narrow = torch.autocast(setting.device, dtype) if autocast else nullcontext()
    with narrow, torch.set_grad_enabled(not infer):
        y = module(*inputs)
    values = {"y": y.detach()}
    if infer:
        return values
    y.backward(dy.to(y))
    leaves = {
        **dict(zip(("x", "residual"), inputs, strict=False)),
        **dict(module.named_parameters()),
    }
    values |= {GRADIENT + name: x.grad for name, x in leaves.items() if x.grad is not None}
    if train:
        values |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    if mode.endswith(", infer"):
        module.to(dtype=dtype).eval()
        with torch.inference_mode():
            values["infer y"] = module(inputs[0]).clone()
    return values


def compared(
    setting: Setting,
    plain: nn.Module,
    fused: Callable[[], nn.Module],
    draw: Callable[[int], list[Tensor]],
    mode: str,
    settled: bool = True,
) -> Runs:
    """The runs of `fused()` with the weights of `plain`, and of `plain` (fp32, on the CPU).

    `draw(seed)` makes inputs, exact in `Setting.exact_dtype`. If `settled`, and gradients are
    compared, the biases of `plain` are moved away from ties (`resnet_fast.verify.settle`). If not
    `settled`, root mean squares are compared.
    """
    round_to(plain, setting.exact_dtype)
    inputs = draw(0)
    if settled and mode != "infer":
        inputs = _settled(plain.train(mode.startswith("train")), draw, setting.torch_dtype)
    with torch.no_grad():
        shape = copy.deepcopy(plain)(*inputs).shape
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(shape, generator=generator).to(setting.exact_dtype)

    def candidate() -> nn.Module:
        module = fused()
        module.load_state_dict(plain.state_dict())
        return module

    def run(module: nn.Module, dtype: torch.dtype, other_layout: bool = False) -> Values:
        where = setting.other_layout if other_layout else setting
        return evaluate(module, inputs, dy, where, dtype, mode)

    def same() -> list[Values]:
        first = torch.float32 if setting.dtype == "fp64" else setting.torch_dtype
        return [run(plain, first), run(plain, setting.torch_dtype, other_layout=True)]

    return Runs(
        lambda: run(candidate(), setting.torch_dtype), same, lambda: run(plain, torch.float64),
        rms=not settled,
    )  # fmt: skip


def _settled(
    plain: nn.Module, draw: Callable[[int], list[Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """Inputs for which `plain` can be settled; changes its biases."""
    for seed in range(DRAWS):
        inputs = draw(seed)
        wide = copy.deepcopy(plain).double()
        if settle(wide, *(x.double() for x in inputs), dtype=dtype):
            plain.load_state_dict(wide.state_dict())
            return inputs
    raise RuntimeError(f"none of {DRAWS} random inputs keeps every ReLU and max-pool off a tie")
