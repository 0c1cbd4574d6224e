"""`python -m bench gpu`: what a GPU does with this package, in one command and a time budget.

In the order of what matters most: the machine's ceilings, the memory-bound ops beside a copy, what
calls cost the host, every convolution of ResNet-50 beside the library's in inference and in each
pass of training, whole models in training and inference beside eager and compiled PyTorch, the time
from import to a first inference, and a coarse look at how cost grows. What does not fit in the
budget is named and left out. Rows go to `bench/results/<gpu>.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import ceilings, first, host, layers, models, passes, rows, scaling

BATCHES = (256, 32, 1)
TRAIN_BATCHES = (256, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench gpu`."""
    parser.add_argument("--minutes", type=float, default=7.0, help="budget (7)")
    parser.add_argument("--batch", type=int, default=256, help="of the layers (256)")
    parser.add_argument("--only", default="", help="steps whose name contains this")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl",
                        help="append rows here (bench/results/<gpu>.jsonl)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the steps that fit; 1 when one failed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("gpu: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    if not args.minutes > 0 or args.batch < 1:
        print("--minutes and --batch: expected positive numbers", file=sys.stderr)
        return 2
    from resnet_fast.tables import slug

    out = args.out or rows.RESULTS / f"{slug(torch.cuda.get_device_name())}.jsonl"
    todo = [step for step in steps(out, args.batch) if args.only in step[0]]
    return run_steps(todo, 60 * args.minutes)


Step = tuple[str, float, Callable[[], int]]
"""Name, seconds it is expected to take, what runs it and gives an exit status."""


def run_steps(
    todo: list[Step], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Run in order what is expected to end within `seconds`; 1 when one gave another status."""
    start, failed = clock(), []
    for name, expected, step in todo:
        left = seconds - (clock() - start)
        if expected > left:
            print(f"gpu: left out {name}: {expected:.0f} s, {left:.0f} s left", flush=True)
            continue
        print(f"gpu: {name}", flush=True)
        begin = clock()
        if step() != 0:
            failed.append(name)
        print(f"gpu: {name} took {clock() - begin:.0f} s", flush=True)
    for name in failed:
        print(f"gpu: FAILED {name}", flush=True)
    return int(bool(failed))


def steps(out: Path, batch: int) -> list[Step]:
    """The steps, most important first."""
    where = ["--device", "cuda", "--out", str(out)]
    each = [*where, "--batch", str(batch)]
    todo: list[Step] = [
        ("ceilings", 20, command(ceilings, where)),
        ("passes", 30, command(passes, each)),
        ("host", 30, command(host, ["--out", str(out)])),
        ("layers", 60, command(layers, each)),
        ("training layers", 120, command(layers, [*each, "--mode", "fprop,dgrad,wgrad"])),
    ]
    for model in ("resnet50", "resnet18"):
        for size in TRAIN_BATCHES:
            options = ["--model", model, "--mode", "train", "--batch", str(size), "--dtype", "bf16"]
            options += ["--providers", "eager,compile,resnet_fast", "--optimizer", "sgd", "--graph"]
            name = f"{model} train bf16 batch {size}"
            seconds = 90 if model == "resnet50" else 60
            todo.append((name, seconds, command(models, [*options, "--seconds", "8", *where])))
    for dtype in ("bf16", "fp16"):
        for model in ("resnet50", "resnet18"):
            for size in BATCHES:
                options = ["--model", model, "--mode", "infer", "--batch", str(size)]
                options += ["--dtype", dtype, "--providers", "eager,compile,resnet_fast"]
                options += ["--seconds", "6", "--graph", *where]
                name = f"{model} {dtype} batch {size}"
                todo.append((name, 75 if model == "resnet50" else 45, command(models, options)))
    todo.append(("first inference", 240, command(first, where)))
    options = ["--model", "resnet18,resnet50,resnet152", "--image-size", "128,224,448"]
    options += ["--batch", "1,16,64,256", "--providers", "eager,resnet_fast", "--graph"]
    options += ["--seconds", "1", "--minutes", "3", *where]
    todo.append(("scaling", 180, command(scaling, options)))
    return todo


def command(module, options: list[str]) -> Callable[[], int]:
    """A call of `module`'s command with `options`."""

    def call() -> int:
        parser = argparse.ArgumentParser(prog=f"python -m {module.__name__}")
        module.add_arguments(parser)
        return module.run(parser.parse_args(options))

    return call
