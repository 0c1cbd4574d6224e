"""`python -m bench models`: whole models by resnet_fast and by PyTorch, eager and compiled.

For every model, mode and dtype the correctness gate runs first (`bench.gate`). If it fails, they
get no rows and the exit status is 1. Then, for every batch size, the providers are built, their
peak memory is measured (`bench.memory`), and they are timed in turns (`bench.timing`). The PyTorch
providers run the modules that `resnet_fast.unfuse` returns, with the same weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import gate, memory, peers, rows, step, table, timing
from bench.step import Case
from resnet_fast.runtime.options import device, integers, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

MODES = ("infer", "train")
OPTIMIZERS = ("none", "sgd")
IMPLS = ("auto", "reference", "native", "triton")
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError, MemoryError)


@dataclass(frozen=True)
class Provider:
    """A way to run a model. `build(plain, case, x)` returns a copy, ready for inputs like x."""

    build: Callable[[nn.Module, Case, Tensor], nn.Module]
    layout: str
    gated: bool = False
    graphs_itself: bool = False
    takes: Callable[[Case], bool] = lambda case: True
    in_pytorch: bool = True  # its memory is PyTorch's, and can be measured


def _eager(layout: str) -> Callable[[nn.Module, Case, Tensor], nn.Module]:
    return lambda plain, case, x: step.prepare(copy.deepcopy(plain), case, layout)


def compiled(module: nn.Module, case: Case, best: bool = True) -> nn.Module:
    """`module` by torch.compile, which compiles at the first call.

    best: on a GPU max-autotune, which takes minutes. Otherwise the default mode; with a CUDA graph
    "reduce-overhead", which is the same code in a graph.
    """
    torch._dynamo.reset()  # otherwise a second batch size compiles for dynamic shapes
    default = "reduce-overhead" if case.graph else None
    return torch.compile(
        module, mode="max-autotune" if best and case.device.type == "cuda" else default
    )


def freezing(case: Case) -> AbstractContextManager:
    """In inference, compilation within this context treats parameters as constants."""
    import torch._inductor.config as inductor

    return inductor.patch(freezing=True) if case.mode == "infer" else nullcontext()


def _compiled(plain: nn.Module, case: Case, x: Tensor, best: bool = True) -> nn.Module:
    module = compiled(step.prepare(copy.deepcopy(plain), case, "channels_last"), case, best)
    if case.mode == "infer":
        with freezing(case):
            step.infer(module, x)
    return module


def _resnet_fast(plain: nn.Module, case: Case, x: Tensor) -> nn.Module:
    import resnet_fast

    module = resnet_fast.create_model(case.model, impl=case.impl)
    module.load_state_dict(plain.state_dict())
    return step.prepare(module, case, "channels_last")


PROVIDERS: dict[str, Provider] = {
    "eager_nchw": Provider(_eager("nchw"), "nchw"),
    "eager": Provider(_eager("channels_last"), "channels_last"),
    "compile": Provider(_compiled, "channels_last", graphs_itself=True),
    "compile_default": Provider(
        partial(_compiled, best=False), "channels_last", graphs_itself=True
    ),
    "openvino": Provider(
        peers.openvino, "nchw", gated=True, takes=peers.openvino_takes, in_pytorch=False
    ),
    "onnxruntime": Provider(
        peers.onnxruntime, "nchw", gated=True, takes=peers.onnxruntime_takes, in_pytorch=False
    ),
    "resnet_fast": Provider(_resnet_fast, "channels_last", gated=True),
}
USUAL = ("eager_nchw", "eager", "compile", "resnet_fast")


def model_names() -> list[str]:
    """Names that `--model` accepts."""
    import resnet_fast

    return resnet_fast.list_models()


def plain_model(name: str, image_size: int) -> nn.Module:
    """Plain PyTorch modules of model `name`, seeded and conditioned (`bench.gate.condition`)."""
    import resnet_fast

    torch.manual_seed(0)
    return gate.condition(resnet_fast.unfuse(resnet_fast.create_model(name)), image_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench models`; every item of a list is checked."""
    add = parser.add_argument
    add("--model", type=names(model_names), default=["resnet50"], metavar="NAME,…",
        help="models (default: resnet50)")  # fmt: skip
    add("--mode", type=names(lambda: MODES), default=["infer", "train"], metavar="infer,train",
        help="default: infer,train")  # fmt: skip
    add("--batch", type=integers, default=[1, 16], metavar="N,…",
        help="batch sizes (default: 1,16)")  # fmt: skip
    add("--dtype", type=names(lambda: PRECISIONS), default=["fp32"], metavar="fp32,bf16,fp16",
        help="default: fp32")  # fmt: skip
    add("--device", type=device, default=torch.device("cpu"), metavar="cpu|cuda",
        help="default: cpu")  # fmt: skip
    add("--providers", type=names(lambda: PROVIDERS), default=list(USUAL), metavar="NAME,…",
        help=f"some of {', '.join(PROVIDERS)}; eager is channels_last; openvino and onnxruntime "
             "run inference on a CPU (default: " + ", ".join(USUAL) + ")")  # fmt: skip
    add("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--rounds", type=positive(int), metavar="N", help="time exactly N rounds per case")
    add("--seconds", type=positive(float), default=20.0, metavar="S",
        help=f"time each case for S seconds, at least {timing.MIN_ROUNDS} rounds "
             "(default: 20)")  # fmt: skip
    add("--image-size", type=integers, default=[224], metavar="N,…",
        help="pixels (default: 224)")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto",
        help="implementation of resnet_fast (default: auto)")  # fmt: skip
    add("--optimizer", choices=OPTIMIZERS, default="none",
        help="optimizer that updates the weights in train (default: none)")  # fmt: skip
    add(
        "--graph",
        action="store_true",
        help="on a GPU, run each step as a CUDA graph (torch.compile makes its own)",
    )
    add("--json", action="store_true", help="print JSON lines instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure all requested cases; 1 if a gate or a provider failed, else 0."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    facts = rows.facts(args.device)
    measured, failed = [], False
    for model, image_size in product(args.model, args.image_size):
        plain = plain_model(model, image_size)
        for mode, dtype in product(args.mode, args.dtype):
            cases = [
                Case(model, mode, batch, dtype, args.device, image_size, args.impl,
                     args.optimizer if mode == "train" else "none",
                     args.graph and args.device.type == "cuda")
                for batch in args.batch
            ]  # fmt: skip
            providers = [name for name in args.providers if PROVIDERS[name].takes(cases[0])]
            if not admitted(plain, cases[0], providers):
                failed = True
                continue
            for case in cases:
                new, why = measure(
                    plain, case, providers, facts, rounds=args.rounds, seconds=args.seconds
                )
                failed = failed or bool(why)
                measured += new
                if new and args.out is not None:
                    rows.append(args.out, new)
    if args.json:
        print("".join(json.dumps(one) + "\n" for one in measured), end="")
    else:
        print(table.text(measured))
    return int(failed)


def admitted(plain: nn.Module, case: Case, providers: Iterable[str]) -> bool:
    """Whether all gated `providers` pass the gate; prints the verdicts to stderr."""
    return all(_gate(name, plain, case) for name in providers if PROVIDERS[name].gated)


def _gate(name: str, plain: nn.Module, case: Case) -> bool:
    title = f"{case.model} {case.mode} {case.dtype}"
    try:
        checks = gate.gate(PROVIDERS[name].build, plain, case)
    except FAILURES as error:
        say(f"{title}: gate RED, {name} raised {type(error).__name__}: {error}")
        return False
    return all([_green(title, name, check) for check in checks])


def _green(title: object, name: str, check: gate.Check) -> bool:
    say(f"{title}: gate {'green' if check.ok else 'RED'}, {name} {check}")
    return check.ok


def measure(
    plain: nn.Module,
    case: Case,
    providers: Sequence[str],
    facts: Mapping[str, Any],
    *,
    rounds: int | None = None,
    seconds: float = 20.0,
    check: bool = True,
) -> tuple[list[rows.Row], dict[str, str]]:
    """Rows of one case, and for each provider without rows the reason: "gate" or its error.

    If an output is wrong at full size, no provider gets rows; check=False skips this check.
    Progress goes to stderr. rounds and seconds are those of `timing.interleave`.
    """
    steps: dict[str, timing.Step] = {}
    peaks: dict[str, float | None] = {}
    failed: dict[str, str] = {}
    try:
        layouts = {PROVIDERS[name].layout for name in providers}
        inputs = {layout: step.inputs(case, layout, step.classes(plain)) for layout in layouts}
        for name in providers:
            try:
                steps[name], peaks[name], full = _build(name, plain, case, inputs, check)
            except FAILURES as error:  # the others continue; the exit status reports it
                failed[name] = _reason(error)
                say(f"{case}: {name} raised {type(error).__name__}: {error}")
                continue
            if full is not None and not _green(case, name, full):
                return [], dict.fromkeys(providers, "gate")
        times = _times(steps, case, rounds, seconds)
    except FAILURES as error:  # out of memory for the inputs, or for all providers together
        say(f"{case}: raised {type(error).__name__}: {error}")
        return [], {name: failed.get(name, _reason(error)) for name in providers}
    finally:
        steps.clear()
        if "torch._dynamo" in sys.modules:  # compiled code and its CUDA graphs keep memory
            torch._dynamo.reset()
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    new = []
    for name, values in times.items():
        p20, p50, p80 = timing.spread(values)
        ratio = timing.speedup(times["eager"], values) if "eager" in times else None
        new.append(rows.row(
            facts, benchmark="models", model=case.model, mode=case.mode, batch=case.batch,
            dtype=case.dtype, layout=PROVIDERS[name].layout, provider=name,
            images_per_s=case.batch / p50 * 1e3, ms_p20=p20, ms_p50=p50, ms_p80=p80,
            peak_mb=peaks[name], speedup_vs_eager=ratio, image_size=case.image_size,
            rounds=len(values), impl=case.impl, optimizer=case.optimizer,
            graph=case.graph,
        ))  # fmt: skip
    return new, failed


def _build(
    name: str,
    plain: nn.Module,
    case: Case,
    inputs: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    check: bool,
) -> tuple[timing.Step, float | None, gate.Check | None]:
    """The warm step of a provider, its peak memory, and for gated ones the check at full size."""
    provider, first, start = PROVIDERS[name], [], time.perf_counter()

    def build() -> timing.Step:
        run = step_of(provider, plain, case, inputs[provider.layout])
        first.append(run(0).clone())
        return run

    run, peak = memory.peak_of(build, case.device)
    say(f"{case}: {name} built and warm after {time.perf_counter() - start:.1f} s")
    known = peak if provider.in_pytorch else None
    if not (provider.gated and check):
        return run, known, None
    x = inputs[provider.layout][0][0]
    return run, known, gate.at_full_size(first[0], plain, case, x)


def _times(
    steps: Mapping[str, timing.Step], case: Case, rounds: int | None, seconds: float
) -> dict[str, list[float]]:
    sync = timing.synchronizer(case.device)
    fastest = min((timing.warm_up(s, sync) for s in steps.values()), default=0.0)
    say(f"{case}: timing {', '.join(steps)}")
    return timing.interleave(
        steps, rounds=rounds, seconds=seconds, repeats=timing.repeats_for(fastest), sync=sync,
        pause=timing.PAUSE_S if case.device.type == "cpu" else 0.0,
    )  # fmt: skip


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def step_of(
    provider: Provider, plain: nn.Module, case: Case, batches: Sequence[tuple[Tensor, Tensor]]
) -> timing.Step:
    """A function that runs one step on input i of the rotation and returns its logits."""
    from resnet_fast import graph, graph_step

    module = provider.build(plain, case, batches[0][0])
    graphs = case.device.type == "cuda"
    captured = case.graph and not provider.graphs_itself
    if captured and case.mode == "infer":
        recorded = graph(module, batches[0][0])
        return lambda i: recorded(batches[i % len(batches)][0])
    if case.mode == "infer":

        def infer(i: int) -> Tensor:
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()
            return step.infer(module, batches[i % len(batches)][0])

        return infer
    dtype, optimizer = PRECISIONS[case.dtype], step.optimizer_of(module, case)
    if captured:
        narrow = dtype if dtype != torch.float32 else None
        kept: list[Tensor] = []

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            kept[:] = [logits.detach()]  # of the recorded call; each replay overwrites them
            return F.cross_entropy(logits, target)

        replay_step = graph_step(module, loss, optimizer, *batches[0], autocast=narrow)

        def replay(i: int) -> Tensor:
            replay_step(*batches[i % len(batches)])
            return kept[0]

        return replay

    def train(i: int) -> Tensor:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return step.train(module, *batches[i % len(batches)], dtype, optimizer)[0]

    return train


def say(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
