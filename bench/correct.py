"""Correctness checks of timed GPU code, before timing: same sizes, same dtype, same plan.

First every convolution of a model alone, in inference and in training, under the rule of
`spec.tolerance`. Then the whole model: `bench.gate` at full size, a CUDA graph against eager calls,
and identical bits in two runs. Nothing here is timed or needs a sanitizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from bench import gate, models, step
from bench.layers import EPS, Layer, joins_of, layers_of, tensors
from bench.step import Case
from resnet_fast.dispatch import ops
from resnet_fast.spec import reference, tolerance
from resnet_fast.spec.dtypes import PRECISIONS

AWAY = 0.1  # conv_bprop recomputes a ReLU: minimum distance of its inputs from the kink
RESULTS = {
    "conv_bn_act": ("y",),
    "conv_add_projection": ("y",),
    "conv_fprop": ("z", "mean", "m2", "scale", "shift", "rstd"),
    "conv_bprop": ("dx", "dw", "sum of dx", "sum of dx·xhat", "b", "c"),
}

Call = tuple[str, list[Any]]
"""An op's name and its arguments except `impl`."""
Check = tuple[str, Callable[[], list[str]]]
"""The name of a check, and the function that runs it and returns its failures."""


def checks(cases: Iterable[Case]) -> Iterator[Check]:
    """All checks to run before `cases` are timed; none has run yet."""
    cases = list(cases)
    for what, draw in draws(cases):
        yield what, partial(of_call, draw, cases[0].impl)
    for case in cases:
        plain = models.plain_model(case.model, case.image_size)
        yield f"{case}: every tensor", partial(of_model, plain, case)
        yield f"{case}: graph and eager, twice", partial(of_graph, plain, case)


def draws(
    cases: Iterable[Case], device: torch.device | None = None
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Each op of each layer of `cases`, and the function that draws its arguments on `device`."""
    for case in cases:
        where = device or case.device
        makes = {"fprop": fprop, "dgrad and wgrad": bprop}
        if case.mode == "infer":
            makes = {"inference": inference}
        for layer in layers_of(case.model, case.image_size):
            for name, make in makes.items():
                what = f"{name} of {layer}, batch {case.batch}"
                yield what, partial(make, layer, case.batch, PRECISIONS[case.dtype], where)
        if case.mode == "infer":
            for pair in joins_of(case.model, case.image_size):
                what = f"{pair[1]} with its projection, batch {case.batch}"
                yield what, partial(join, pair, case.batch, PRECISIONS[case.dtype], where)


def on(device: torch.device, cases: Iterable[Case]) -> None:
    """Run every checked op once on tensors of `device`; "meta" lists the launches."""
    for _, draw in draws(cases, device):
        op, args = draw()
        getattr(ops, op)(*args, "triton")


def splits() -> int:
    """How many convolutions have run by split-K."""
    from resnet_fast.kernels import config_select

    chosen = config_select._chosen.items()
    return sum("conv_affine_act" in name and config[-1] > 1 for (name, *_), (config, _) in chosen)


def inference(layer: Layer, n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """conv + normalization (+ residual) + ReLU."""
    x, w, norm, residual = tensors(layer, n, dtype, device)
    args = [x, w, None, *norm, residual, layer.relu, EPS, *layer.conv.args()]
    return "conv_bn_act", args


def join(pair: tuple[Layer, Layer], n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """The projection of a residual in the convolution that adds it."""
    (source, source_w, side, _), (x, w, norm, _) = (tensors(one, n, dtype, device) for one in pair)
    projection, layer = pair
    stride = list(projection.conv.stride)
    args = [x, w, *norm[:2], source, source_w, *side[:2], layer.relu, *layer.conv.args(), stride]
    return "conv_add_projection", args


def fprop(layer: Layer, n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """The normalization and ReLU of the input, the convolution, the next normalization."""
    x, w, (weight, bias, *_), _ = tensors(layer, n, dtype, device)
    affine = _affine(layer, device)
    args = [x, w, *affine, True, weight, bias, EPS, None, False, *layer.conv.args()]
    return "conv_fprop", args


def bprop(layer: Layer, n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """Backward of a normalization, dx, dw, backward of the previous ReLU, sums of its BN."""
    x, w, (a, b, c, mean), _ = tensors(layer, n, dtype, device)
    dy, z = (torch.randn_like(F.conv2d(x, w, None, *layer.conv.args())) for _ in range(2))
    scale, shift = _affine(layer, device)
    below = [None] * 4
    if scale is not None:
        u = x.float() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        away = torch.where(u < 0, -3 * AWAY, 3 * AWAY) / scale.view(-1, 1, 1)
        x = torch.where(u.abs() < AWAY, x + away, x).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        spread = [torch.rand(layer.channels, device=device) + 0.5 for _ in range(2)]
        below = [scale, shift, *spread]
    need = layer.channels >= 16, True, False  # the gradient of an image is not computed
    args = [dy, w, x, None, a, z, mean, b, c, *below, None, None, None, *layer.conv.args(), *need]
    return "conv_bprop", args


def _affine(layer: Layer, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """scale and shift of the layer's input; None for an image."""
    if layer.channels < 16:
        return None, None
    scale, shift = (torch.rand(layer.channels, device=device) + 0.5 for _ in range(2))
    return scale, shift - 1


def of_call(draw: Callable[[], Call], impl: str) -> list[str]:
    """Compare each result of an op with fp64, and bitwise with a second call."""
    torch.manual_seed(0)
    op, args = draw()
    run = partial(getattr(ops, op), *args, impl)
    found, again = (_several(run()) for _ in range(2))
    plain = partial(getattr(reference, op), *args)
    same, exact = _several(plain()), _several(getattr(reference, op)(*map(_wide, args)))
    wrong, results = [], zip(RESULTS[op], found, again, same, exact, strict=True)
    for i, (name, value, other, *expected) in enumerate(results):
        verdict = tolerance.compare(
            value, *expected, gradient=op == "conv_bprop",
            more=lambda i=i: [_several(run)[i] for run in tolerance.plain_runs(plain)],
        )  # fmt: skip
        if not verdict.ok:
            wrong.append(f"{name}: {verdict}")
        if not torch.equal(value, other):
            wrong.append(f"{name}: different bits in a second call")
    return wrong


def of_model(plain: nn.Module, case: Case) -> list[str]:
    """The gate at full size: logits, in training loss, gradients and statistics too."""
    build = models.PROVIDERS["resnet_fast"].build
    found = gate.gate(build, plain, replace(case, graph=False), full=True)
    return [str(check) for check in found if not check.ok]


def of_graph(plain: nn.Module, case: Case) -> list[str]:
    """Replays on two batches give the same bits as eager calls, and so do repeated eager calls.

    cuDNN uses its deterministic algorithms.
    """
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        module = models.PROVIDERS["resnet_fast"].build(plain, case, None)
        batches = step.inputs(case, "channels_last", step.classes(plain))[:2]
        eager, again = ([_eager(module, case, *batch) for batch in batches] for _ in range(2))
        replayed = _replayed(module, case, batches)
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    wrong = []
    for what, results in (("a second call", again), ("a replay", replayed)):
        for i, (one, other) in enumerate(zip(eager, results, strict=True)):
            differ = [name for name in one if not torch.equal(one[name], other[name])]
            if differ:
                found = f"{len(differ)}, first {differ[0]}"
                wrong.append(f"batch {i}: different bits in {what}: {found}")
    return wrong


def _eager(module: nn.Module, case: Case, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    if case.mode == "infer":
        return {"logits": step.infer(module, x).clone()}
    _, loss = step.train(module, x, target, PRECISIONS[case.dtype])
    return {"loss": loss.clone(), **_gradients(module)}


def _replayed(
    module: nn.Module, case: Case, batches: list[tuple[Tensor, Tensor]]
) -> list[dict[str, Tensor]]:
    if case.mode == "infer":
        graph = resnet_fast.graph(module, batches[0][0])
        return [{"logits": graph(x).clone()} for x, _ in batches]
    dtype = PRECISIONS[case.dtype]
    narrow = dtype if dtype != torch.float32 else None
    recorded = resnet_fast.graph_step(module, F.cross_entropy, None, *batches[0], autocast=narrow)
    return [{"loss": recorded(*batch).clone(), **_gradients(module)} for batch in batches]


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def _several(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _wide(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
