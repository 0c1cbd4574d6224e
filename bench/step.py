"""One step of inference or training, shared by the gate, the memory measurement and the timing.

Inference: eval mode, `torch.inference_mode`, model and input in `dtype`. Training: forward, cross
entropy, backward and `zero_grad(set_to_none=True)`, fp32 parameters, autocast when `dtype` is
narrower, and optionally an SGD update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast.spec.dtypes import PRECISIONS

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
ROTATION_BYTES = 2**26  # inputs rotated over at least this much, past the last-level cache
ROTATION_INPUTS = (2, 64)


@dataclass(frozen=True)
class Case:
    """A measured case, without the provider."""

    model: str
    mode: str
    batch: int
    dtype: str
    device: torch.device
    image_size: int = 224
    impl: str = "auto"
    optimizer: str = "none"
    graph: bool = False

    @property
    def parameter_dtype(self) -> torch.dtype:
        """dtype of parameters and inputs: training keeps fp32 and lets autocast narrow it."""
        return PRECISIONS[self.dtype] if self.mode == "infer" else torch.float32

    def __str__(self) -> str:
        return f"{self.model} {self.mode} {self.dtype} batch {self.batch}, {self.image_size} px"


def prepare(module: nn.Module, case: Case, layout: str) -> nn.Module:
    """`module` itself, moved to the case's device, dtype, layout and mode."""
    module.to(device=case.device, dtype=case.parameter_dtype, memory_format=LAYOUTS[layout])
    return module.train(case.mode == "train")


def classes(module: nn.Module) -> int:
    """Number of classes: output features of the last linear layer."""
    return [m for m in module.modules() if isinstance(m, nn.Linear)][-1].out_features


def inputs(case: Case, layout: str, num_classes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of normal noise and labels, enough to exceed the caches."""
    size = (case.batch, 3, case.image_size, case.image_size)
    one = math.prod(size) * case.parameter_dtype.itemsize
    count = min(max(math.ceil(ROTATION_BYTES / one), ROTATION_INPUTS[0]), ROTATION_INPUTS[1])
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        x = torch.randn(size, generator=generator).to(case.device, case.parameter_dtype)
        target = torch.randint(num_classes, (case.batch,), generator=generator).to(case.device)
        batches.append((x.contiguous(memory_format=LAYOUTS[layout]), target))
    return batches


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """autocast to `dtype`; switched off for fp32 and fp64."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if narrow else torch.bfloat16, enabled=narrow)


def infer(module: nn.Module, x: Tensor) -> Tensor:
    """Logits in inference mode."""
    with torch.inference_mode():
        return module(x)


def optimizer_of(module: nn.Module, case: Case) -> torch.optim.Optimizer | None:
    """The case's optimizer; on a GPU its learning rate is a tensor, so that a graph can update."""
    if case.optimizer == "none":
        return None
    gpu = case.device.type == "cuda"
    rate = torch.tensor(1e-3, device=case.device) if gpu else 1e-3
    return torch.optim.SGD(module.parameters(), rate, momentum=0.9, fused=gpu)


def train(
    module: nn.Module,
    x: Tensor,
    target: Tensor,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and loss of a step; the gradients stay in `.grad` until the next step."""
    module.zero_grad(set_to_none=True)
    with autocast(x.device, dtype):
        logits = module(x)
        loss = F.cross_entropy(logits, target)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return logits.detach(), loss.detach()
