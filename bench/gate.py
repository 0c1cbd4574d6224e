"""The correctness gate: only correct results are timed.

The candidate and eager PyTorch run the same weights on the same small batch in the same dtype. Both
are compared with PyTorch in fp64, by the rule of `spec.tolerance` with norms instead of maxima. The
error of a tensor is ‖value − fp64‖₂ / ‖fp64‖₂. For all tensors of one kind (output, loss,
gradients, running statistics) together

    worst error of the candidate ≤ FACTOR·(worst error of eager + eps (+ KINK for gradients))

KINK: a pre-activation within rounding of zero can switch a ReLU gradient on or off in either of
them, however exact both are. This gate is for whole models; `resnet-fast verify` checks single ops
more closely.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.step import Case, autocast, classes, infer, prepare, train
from resnet_fast.spec.dtypes import PRECISIONS
from resnet_fast.spec.tolerance import FACTOR

GATE_BATCH = 4
GATE_SIZE = 64
KINK = 0.03

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The worst tensor of one kind, its error and what was allowed."""

    kind: str
    tensor: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        sign = "<=" if self.ok else "> "
        return f"{self.kind} ({self.tensor}): {self.error:.2e} {sign} {self.allowed:.2e}"


def relative(value: Tensor | None, expected: Tensor) -> float:
    """‖value − expected‖₂ / ‖expected‖₂ in fp64; infinite when missing or of another shape."""
    if value is None or value.shape != expected.shape:
        return math.inf
    expected = expected.double()
    difference = (value.to(expected.device).double() - expected).norm().item()
    if math.isnan(difference):
        return math.inf
    size = expected.norm().item()
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


def compare(
    kind: str,
    candidate: Tensors,
    eager: Tensors,
    reference: Tensors,
    dtype: torch.dtype,
    *,
    gradients: bool = False,
) -> Check:
    """The worst of the candidate's tensors against the worst of eager's."""
    errors = {name: relative(candidate.get(name), ref) for name, ref in reference.items()}
    own = max(relative(eager.get(name), ref) for name, ref in reference.items())
    floor = torch.finfo(dtype).eps + (KINK if gradients else 0)
    worst = max(errors, key=errors.__getitem__)
    return Check(kind, worst, errors[worst], FACTOR * (own + floor))


def condition(plain: nn.Module, image_size: int, seed: int = 0) -> nn.Module:
    """Randomize the normalizations of `plain` in place, so that swapped or ignored vectors show.

    Each block's last normalization and last convolution are scaled down. Otherwise a freshly
    initialized deep net doubles an error every few blocks, and in 16 bits loses its gradients.
    Running statistics become those of a batch of noise.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0, 1, generator=generator)
            norm.momentum = 1.0
        for block in plain.modules():
            children = dict(block.named_children())
            if {"conv1", "bn1", "conv2", "bn2"} <= children.keys():
                last = 3 if "conv3" in children else 2
                for parameter in children[f"bn{last}"].parameters():
                    parameter.mul_(0.1)
                children[f"conv{last}"].weight.mul_(0.1)
        mode = plain.training
        size = min(image_size, GATE_SIZE)
        plain.train()(torch.randn(2 * GATE_BATCH, 3, size, size, generator=generator))
    plain.train(mode)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return plain


def gate(
    build: Callable[[nn.Module, Case, Tensor], nn.Module],
    plain: nn.Module,
    case: Case,
    full: bool = False,
) -> list[Check]:
    """Checks of the candidate that `build` makes from `plain` (fp32 on the CPU) at reduced size.

    full: use the case's own size, which needs memory for a step in fp64.
    """
    if not full:
        case = replace(case, batch=GATE_BATCH, image_size=min(case.image_size, GATE_SIZE))
    dtype = PRECISIONS[case.dtype]
    generator = torch.Generator().manual_seed(1)
    size = (case.batch, 3, case.image_size, case.image_size)
    x = torch.randn(size, generator=generator).to(case.device, case.parameter_dtype)
    target = torch.randint(classes(plain), (case.batch,), generator=generator).to(case.device)
    last = x.contiguous(memory_format=torch.channels_last)
    eager = prepare(copy.deepcopy(plain), case, "channels_last")
    reference = copy.deepcopy(eager).double()
    candidate = build(plain, case, last)
    if case.mode == "infer":
        results = [{"logits": infer(m, i)} for m, i in ((candidate, last), (eager, last))]
        expected = {"logits": infer(reference, x.double())}
        return [compare("output", *results, expected, dtype)]
    return _train_checks(candidate, eager, reference, last, target, dtype)


def at_full_size(logits: Tensor, plain: nn.Module, case: Case, x: Tensor) -> Check:
    """Check the candidate's logits for the timed batch x: the size can select the kernel."""
    eager = prepare(copy.deepcopy(plain), case, "channels_last")
    reference = copy.deepcopy(eager).double()
    dtype = PRECISIONS[case.dtype]
    if case.mode == "infer":
        own, expected = infer(eager, x), infer(reference, x.double())
    else:
        with torch.no_grad(), autocast(x.device, dtype):
            own = eager(x)
        with torch.no_grad():
            expected = reference(x.double())
    results = [{"logits": value} for value in (logits, own, expected)]
    return compare("output at full size", *results, dtype)


def _train_checks(
    candidate: nn.Module,
    eager: nn.Module,
    reference: nn.Module,
    x: Tensor,
    target: Tensor,
    dtype: torch.dtype,
) -> list[Check]:
    modules = (candidate, eager, reference)
    inputs = (x, x, x.double())
    dtypes = (dtype, dtype, torch.float64)
    steps = [train(m, i, target, d) for m, i, d in zip(modules, inputs, dtypes, strict=True)]
    output = compare("output", *({"logits": logits} for logits, _ in steps), dtype)
    # the loss is 2-Lipschitz in the largest logit; eager's own loss may be exact by luck
    losses = [loss.double().item() for _, loss in steps]
    slack = 2 * (steps[1][0].double() - steps[2][0]).abs().max().item()
    eps = torch.finfo(dtype).eps * abs(losses[2])
    loss = Check("loss", "cross entropy", abs(losses[0] - losses[2]), FACTOR * (slack + eps))
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in modules]
    running = [dict(m.named_buffers()) for m in modules]
    return [
        output,
        loss,
        compare("parameter gradients", *grads, dtype, gradients=True),
        compare("running statistics", *running, dtype),
    ]
