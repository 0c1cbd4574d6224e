"""`python -m bench models`: whole models, ours beside plain PyTorch, eager and compiled.

For every model, mode and dtype the correctness gate runs first (`bench.gate`); a red gate means no
row at all for them and exit status 1. Then, for every batch size, the providers are built, their
peak memory is measured (`bench.memory`), and they are timed in turns (`bench.timing`). The peers
run the plain PyTorch modules that `resnet_fast.unfuse` gives, on the same weights.
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

from bench import gate, memory, rows, step, table, timing
from bench.step import Case
from resnet_fast.runtime.options import device, integers, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

MODES = ("infer", "train")
OPTIMIZERS = ("none", "sgd")
IMPLS = ("auto", "reference", "native", "triton")
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, OSError, MemoryError)


@dataclass(frozen=True)
class Provider:
    """A way to run a model. `build(plain, case, x)` makes its own copy, ready for inputs like x."""

    build: Callable[[nn.Module, Case, Tensor], nn.Module]
    layout: str
    gated: bool = False
    graphs_itself: bool = False


def _eager(layout: str) -> Callable[[nn.Module, Case, Tensor], nn.Module]:
    return lambda plain, case, x: step.prepare(copy.deepcopy(plain), case, layout)


def compiled(module: nn.Module, case: Case, best: bool = True) -> nn.Module:
    """`module` by torch.compile; compiles when first called.

    best: as fast as it is made for the case, which takes minutes on a GPU. Else the default mode,
    as "reduce-overhead" where the case asks for a CUDA graph: that is the same code in one.
    """
    torch._dynamo.reset()  # a second batch size would otherwise compile for dynamic shapes
    default = "reduce-overhead" if case.graph else None
    return torch.compile(
        module, mode="max-autotune" if best and case.device.type == "cuda" else default
    )


def freezing(case: Case) -> AbstractContextManager:
    """In inference the first call compiles with parameters as constants where this is in force."""
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
    "resnet_fast": Provider(_resnet_fast, "channels_last", gated=True),
}
USUAL = ("eager_nchw", "eager", "compile", "resnet_fast")


def model_names() -> list[str]:
    """Names `--model` takes."""
    import resnet_fast

    return resnet_fast.list_models()


def plain_model(name: str, image_size: int) -> nn.Module:
    """Plain PyTorch modules of model `name`, seeded and conditioned (`bench.gate.condition`)."""
    import resnet_fast

    torch.manual_seed(0)
    return gate.condition(resnet_fast.unfuse(resnet_fast.create_model(name)), image_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench models`; comma lists are checked item by item."""
    add = parser.add_argument
    add("--model", type=names(model_names), default=["resnet50"], metavar="NAME,…")
    add("--mode", type=names(lambda: MODES), default=["infer", "train"], metavar="infer,train")
    add("--batch", type=integers, default=[1, 16], metavar="N,…")
    add("--dtype", type=names(lambda: PRECISIONS), default=["fp32"], metavar="fp32,bf16,fp16")
    add("--device", type=device, default=torch.device("cpu"), metavar="cpu|cuda")
    add("--providers", type=names(lambda: PROVIDERS), default=list(USUAL), metavar="NAME,…",
        help=f"of {', '.join(PROVIDERS)}; eager is channels_last (default: all but "
             "compile_default)")  # fmt: skip
    add("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's)")
    add("--rounds", type=positive(int), metavar="N", help="exactly N rounds a case")
    add("--seconds", type=positive(float), default=20.0, metavar="S",
        help=f"time a case for S seconds, at least {timing.MIN_ROUNDS} rounds (20)")  # fmt: skip
    add("--image-size", type=integers, default=[224], metavar="N,…")
    add("--impl", choices=IMPLS, default="auto", help="implementation that resnet_fast runs")
    add("--optimizer", choices=OPTIMIZERS, default="none", help="update the weights in train")
    add(
        "--graph",
        action="store_true",
        help="a step by a CUDA graph where the provider has none of its own (compile has)",
    )
    add("--json", action="store_true", help="rows as JSON lines on stdout instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure all that was asked for; 1 when a gate was red or a provider failed, else 0."""
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
            if not admitted(plain, cases[0], args.providers):
                failed = True
                continue
            for case in cases:
                new, why = measure(
                    plain, case, args.providers, facts, rounds=args.rounds, seconds=args.seconds
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
    """Whether the gate is green for those of `providers` that must pass it; says what it found."""
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
    """Rows of one case, and why each other provider gave none: "gate" or its error.

    An output that is wrong at full size leaves all of them without rows; check=False where that has
    been looked at already. Says on stderr what it does; rounds and seconds are
    `timing.interleave`'s.
    """
    steps: dict[str, timing.Step] = {}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    try:
        layouts = {PROVIDERS[name].layout for name in providers}
        inputs = {layout: step.inputs(case, layout, step.classes(plain)) for layout in layouts}
        for name in providers:
            try:
                steps[name], peaks[name], full = _build(name, plain, case, inputs, check)
            except FAILURES as error:  # the others go on; the exit status tells
                failed[name] = _reason(error)
                say(f"{case}: {name} raised {type(error).__name__}: {error}")
                continue
            if full is not None and not _green(case, name, full):
                return [], dict.fromkeys(providers, "gate")
        times = _times(steps, case, rounds, seconds)
    except FAILURES as error:  # no memory for the inputs, or for all of them side by side
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
) -> tuple[timing.Step, float, gate.Check | None]:
    """The warm step of a provider, its peak memory, and if it is gated the `check` at full size."""
    provider, first, start = PROVIDERS[name], [], time.perf_counter()

    def build() -> timing.Step:
        run = step_of(provider, plain, case, inputs[provider.layout])
        first.append(run(0).clone())
        return run

    run, peak = memory.peak_of(build, case.device)
    say(f"{case}: {name} built and warm after {time.perf_counter() - start:.1f} s")
    if not (provider.gated and check):
        return run, peak, None
    x = inputs[provider.layout][0][0]
    return run, peak, gate.at_full_size(first[0], plain, case, x)


def _times(
    steps: Mapping[str, timing.Step], case: Case, rounds: int | None, seconds: float
) -> dict[str, list[float]]:
    sync = timing.synchronizer(case.device)
    fastest = min((timing.warm_up(s, sync) for s in steps.values()), default=0.0)
    say(f"{case}: timing {', '.join(steps)}")
    return timing.interleave(
        steps, rounds=rounds, seconds=seconds, repeats=timing.repeats_for(fastest), sync=sync
    )


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def step_of(
    provider: Provider, plain: nn.Module, case: Case, batches: Sequence[tuple[Tensor, Tensor]]
) -> timing.Step:
    """One step on input i of the rotation; gives its logits."""
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
            kept[:] = [logits.detach()]  # the recorded call's, which each replay writes
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
    """A line of progress on stderr, at once."""
    print(line, file=sys.stderr, flush=True)
