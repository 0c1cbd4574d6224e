"""`python -m bench host`: host time of a call, without the device's time.

A step is timed from its call to its return, with an empty queue and without synchronization:
checks, dispatch, allocations and launches. A device that is faster than this waits for the host,
unless a CUDA graph replaces the launches. Images are small, so that the queue never fills; the
host's work does not depend on their size. PyTorch's profiler counts the launches, including copies
and memory clears.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fast
from bench import models, rows, step, timing
from bench.step import Case
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime.options import integers, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

PROVIDERS = ("eager", "auto", "triton", "native")
ROUNDS = 20
Steps = dict[str, Callable[[], object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench host`."""
    add = parser.add_argument
    add("--model", type=names(models.model_names), default=["resnet50"], metavar="NAME,…",
        help="models (default: resnet50)")  # fmt: skip
    add("--batch", type=integers, default=[2], metavar="N,…", help="batch sizes (default: 2)")
    add("--image-size", type=positive(int), default=64, metavar="N", help="pixels (default: 64)")
    add("--dtype", choices=list(PRECISIONS), default="bf16", help="default: bf16")
    add("--providers", type=names(lambda: PROVIDERS), default=list(PROVIDERS), metavar="NAME,…",
        help=f"some of {', '.join(PROVIDERS)} (default: all)")  # fmt: skip
    add("--rounds", type=positive(int), default=ROUNDS, metavar="N",
        help=f"timed rounds (default: {ROUNDS})")  # fmt: skip
    add("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("host: needs a CUDA GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    facts, found = rows.facts(torch.device("cuda")), []
    for size in args.batch:
        for mode, steps in cases(args, size):
            found += measured(facts, mode, size, args, steps)
    print(text(found))
    if args.out is not None:
        rows.append(args.out, found)
    return 0


def cases(args: argparse.Namespace, batch: int):
    """(name, steps by provider): one convolution alone, then models in both modes."""
    yield "conv_bn_act", convolutions(batch, PRECISIONS[args.dtype], args.providers)
    for name in args.model:
        plain = models.plain_model(name, args.image_size)
        for mode in models.MODES:
            case = Case(name, mode, batch, args.dtype, torch.device("cuda"), args.image_size)
            yield f"{name} {mode}", whole(plain, case, args.providers)


def convolutions(batch: int, dtype: torch.dtype, providers: list[str]) -> Steps:
    """relu(BN(conv3x3(x))) of 64 channels by one resnet_fast op, and by three PyTorch ops."""
    options = {"device": "cuda", "dtype": dtype}
    x, w = torch.randn(batch, 64, 14, 14, **options), torch.randn(64, 64, 3, 3, **options)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    norm = [torch.ones(64, device="cuda") for _ in range(4)]
    weight, bias, mean, var = norm

    def eager() -> Tensor:
        z = torch.nn.functional.conv2d(x, w, padding=1)
        return torch.batch_norm(z, weight, bias, mean, var, False, 0.1, 1e-5, True).relu_()

    def ours(impl: str) -> Tensor:
        return ops.conv_bn_act(x, w, None, *norm, None, True, 1e-5, [1, 1], [1, 1], [1, 1], 1, impl)

    steps: Steps = {}
    for name in providers:
        if name == "eager":
            steps[name] = torch.inference_mode()(eager)
        elif backends.refusal(name, "conv_bn_act", "cuda", dtype) is None or name == "auto":
            steps[name] = torch.inference_mode()(partial(ours, name))
    return steps


def whole(plain: nn.Module, case: Case, providers: list[str]) -> Steps:
    """The case's step; in training with the optimizer's update."""
    (x, target), *_ = step.inputs(case, "channels_last", step.classes(plain))
    steps: Steps = {}
    for name in providers:
        if name == "eager":
            module = copy.deepcopy(plain)
        else:
            refusal = backends.refusal(name, "bn_act", x.device.type, x.dtype)
            if name != "auto" and refusal is not None:
                continue
            module = resnet_fast.create_model(case.model, impl=name)
            module.load_state_dict(plain.state_dict())
        step.prepare(module, case, "channels_last")
        if case.mode == "infer":
            steps[name] = partial(step.infer, module, x)
        else:
            sgd = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9, fused=x.is_cuda)
            steps[name] = partial(step.train, module, x, target, PRECISIONS[case.dtype], sgd)
    return steps


def measured(
    facts: rows.Row, mode: str, batch: int, args: argparse.Namespace, steps: Steps
) -> list[rows.Row]:
    """One row per provider, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(3 + args.rounds):
        for name in timing.rotated(list(steps), turn):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            steps[name]()
            took = (time.perf_counter() - begin) * 1e3
            if turn >= 3:  # the first calls compile, choose and record
                times[name].append(took)
    torch.cuda.synchronize()
    found = []
    for name, ms in times.items():
        p20, p50, p80 = timing.spread(ms)
        model, _, what = mode.rpartition(" ")
        found.append(rows.layer_row(
            facts, benchmark="host", model=model or None, mode=what, batch=batch,
            dtype=args.dtype, layout="channels_last", provider=name, rounds=args.rounds,
            image_size=args.image_size if model else None, ms_p20=p20, ms_p50=p50, ms_p80=p80,
            launches=launches(steps[name]),
        ))  # fmt: skip
    return found


def launches(run: Callable[[], object]) -> int:
    """Number of device operations of run(): kernels, copies, memory clears."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def text(found: list[rows.Row]) -> str:
    """One line per row: host microseconds, launches, microseconds per launch."""
    head = f"{'what':20} {'batch':>5} {'provider':10} {'host us':>9} {'launches':>8} {'each':>7}"
    lines = [head]
    for row in found:
        what = " ".join(filter(None, (row["model"], row["mode"])))
        us, count = 1e3 * row["ms_p50"], row["launches"]
        each = f"{us / count:7.1f}" if count else f"{'-':>7}"
        place = f"{what:20} {row['batch']:5d} {row['provider']:10}"
        lines.append(f"{place} {us:9.0f} {count:8d} {each}")
    return "\n".join(lines)
