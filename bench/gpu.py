"""`python -m bench gpu`: check and measure resnet_fast on a GPU, in stages, within a time budget.

The most important stages come first; `bench.stages` runs each in a separate process:

    machine          versions, whether Triton's cache is warm, the machine's ceilings
    compile          compile every kernel of the stages below, in parallel; estimate their times
    correct_infer    inference against fp64 (`bench.correct`)
    correct_train    training against fp64 (`bench.correct`)
    models           whole models: resnet_fast and eager, in CUDA graphs, in turns
    profile          kernel times of three replays, next to the estimate
    library          the models with cuDNN's convolutions (RESNET_FAST_TRITON_CONV=library)
    layers           every convolution alone, in inference and in each pass of training
    passes           the memory-bound ops relative to a copy
    compile_default  the models again, with torch.compile in its default mode
    compile_max      the models again, with torch.compile's max-autotune

All results go to the `--out` folder: stages.json, rows.jsonl, profile.json, estimates.json,
log.txt, summary.txt. `--resume` runs what is missing in such a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, correct, layers, models, passes, profile, rows, stages, step, table
from bench.stages import Context, Outcome, Stage
from bench.step import Case
from resnet_fast.runtime.options import names, positive
from resnet_fast.runtime.settings import TRITON_CONV
from resnet_fast.spec.dtypes import PRECISIONS

BUDGET = 540.0
OUT = Path("build/gpu")
ESTIMATES, PROFILE = "estimates.json", "profile.json"
PROFILED = ("model", "mode", "batch", "dtype", "provider")  # key of a step in PROFILE
LOST = re.compile(r"CUDA error|Triton Error \[CUDA\]")  # no later call of the process succeeds
# Imported before the stages are forked: none of them initializes CUDA.
PRELOAD = ("torch", "triton", "resnet_fast.kernels", "bench.gpu")
SECONDS = 6.0  # of timing per case
GPUS = ("h200", "h100")  # names in `bench.estimate`
HEADLINE = "models and their checks"


@dataclass(frozen=True)
class Plan:
    """What is measured: whole models in `cases`, their layers at `batch`."""

    cases: tuple[Case, ...]
    batch: int = 256

    @property
    def first(self) -> Case:
        """The case with the model, dtype, device and image size of the layers."""
        return self.cases[0]


def headline(device: torch.device) -> tuple[Case, ...]:
    """ResNet-50 in bf16: training and inference at batch 256, inference of one image."""
    case = partial(Case, "resnet50", dtype="bf16", device=device, graph=True)
    return (
        case(mode="train", batch=256, optimizer="sgd"),
        case(mode="infer", batch=256),
        case(mode="infer", batch=1),
    )


def stages_of(plan: Plan) -> list[Stage]:
    """The stages with their limits in seconds, most important first."""
    table = (
        ("machine", 60, 5, machine),
        ("compile", 120, 10, compile_kernels),
        ("correct_infer", 45, 15, partial(correctness, "infer")),
        ("correct_train", 75, 20, partial(correctness, "train")),
        ("models", 120, 20, whole_models),
        ("profile", 45, 15, profiles),
        ("library", 60, 20, library),
        ("layers", 240, 20, single_layers),
        ("passes", 45, 10, single_passes),
        ("compile_default", 150, 60, partial(beside, "compile_default")),
        ("compile_max", 400, 90, partial(beside, "compile")),
    )
    return [Stage(name, limit, partial(run, plan), least) for name, limit, least, run in table]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench gpu`."""
    add, every = parser.add_argument, [stage.name for stage in stages_of(Plan(()))]
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, default=OUT, metavar="DIR",
                       help=f"new folder for the results (default: {OUT})")  # fmt: skip
    where.add_argument("--resume", type=Path, metavar="DIR",
                       help="run what is missing in this folder")  # fmt: skip
    add("--budget", type=positive(float), default=BUDGET, metavar="SECONDS",
        help=f"time for all stages, in seconds (default: {BUDGET:.0f}); if it exceeds the sum of "
             "their limits, the limits are scaled up")  # fmt: skip
    add("--only", type=names(every), default=[], metavar="STAGE,…",
        help=f"run only some of {', '.join(every)}")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the stages that fit; 1 if one failed, 2 without a GPU or for another run's folder."""
    if not torch.cuda.is_available():
        print("gpu: needs a CUDA GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2
    out = args.resume or args.out
    if args.resume is None and (out / stages.RECORD).exists():
        print(f"--out: {out} already has a run; continue it with --resume {out}", file=sys.stderr)
        return 2
    for row in stages.read_rows(out):
        here = rows.device_name(torch.device("cuda")), rows.git_sha()
        there = row["cpu_or_gpu"], row["git_sha"]
        if there != here:
            said = " at ".join(map(str, there))
            print(f"--resume: {out} has rows of {said}, but this is {here[0]} at {here[1]}; "
                  "use a new --out", file=sys.stderr)  # fmt: skip
            return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the running stage
    return measure(Plan(headline(torch.device("cuda"))), out, args.budget, args.only)


def measure(plan: Plan, out: Path, budget: float = BUDGET, only: Sequence[str] = ()) -> int:
    """Run the stages of `plan` and print the summary; 1 if one failed."""
    todo = stages_of(plan)
    asked = sum(stage.seconds for stage in todo if not only or stage.name in only)
    todo = [replace(stage, seconds=max(1.0, budget / asked) * stage.seconds) for stage in todo]
    stages.preload(PRELOAD)
    found = stages.run_stages(
        todo, out, budget, only=only, summarize=partial(summary, plan, out),
        say=partial(print, flush=True),
    )  # fmt: skip
    print(f"\n{summary(plan, out, found)}")
    return int(any(outcome.status == stages.FAILED for outcome in found))


def machine(plan: Plan, context: Context) -> str:
    """Versions, state of Triton's cache, and the ceilings."""
    from resnet_fast.commands import env

    cache = one_kernel(plan)
    print(f"TRITON_CACHE_DIR={os.environ.get('TRITON_CACHE_DIR', '')}: {cache}", flush=True)
    print(json.dumps(env.collect()))
    facts = rows.facts(plan.first.device)
    found = ceilings.measure(plan.first.device, plan.first.dtype)
    context.append([ceilings.row(facts, found)])
    copied, products = found.bytes_per_s / 1e9, found.flops_per_s / 1e12
    return f"Triton's cache: {cache}; copy {copied:.0f} GB/s, matmul {products:.0f} TFLOP/s"


def one_kernel(plan: Plan) -> str:
    """Whether Triton's cache has the first kernel of the last case, as a sample of the cache."""
    from bench.compile import compile_launches
    from bench.launches import launches_of

    target = target_of(plan.first.device)
    launches = (one for one in launches_of(plan.cases[-1], target) if one.kernel is not None)
    (done,) = compile_launches([next(launches)], target, 1)
    if done.failure and done.failure.startswith("does not compile"):
        raise RuntimeError(f"{done.kernel}: {done.failure}")
    return "hit" if done.cached else f"miss, {done.seconds:.1f} s per kernel"


def target_of(device: torch.device) -> Any:
    """The target of `device`, for which kernels are chosen."""
    from resnet_fast.kernels import launch

    return launch.target(torch.empty(0, device=device))


def compile_kernels(plan: Plan, context: Context) -> str:
    """Compile the kernels of all stages, so that no stage waits for a compiler."""
    from bench.compile import compile_launches

    target, jobs = target_of(plan.first.device), len(os.sched_getaffinity(0))
    done: dict[tuple[Any, ...], Any] = {}
    for what, launches in wanted(plan, target):
        new = [one for one in launches if one.kernel is not None and one.code not in done]
        context.need(5, what)
        for one in compile_launches(new, target, jobs) if new else ():
            done[one.code] = one
            said = one.failure or ("hit" if one.cached else f"{one.seconds:.1f} s")
            print(f"{one.kernel:24} {one.config:40} {said}", flush=True)
        if what == HEADLINE:
            estimates(plan, context, list(done.values()))
    hits, failed = sum(one.cached for one in done.values()), []
    for one in done.values():
        if one.failure:
            failed.append(f"{one.kernel} {one.config}: {one.failure}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(done)} kernels: {failed[0]}")
    return f"{len(done)} kernels, {hits} of them from the cache"


def wanted(plan: Plan, target: Any) -> Iterator[tuple[str, list[Any]]]:
    """(name, launches): those of the headline first, then those of the other stages."""
    from bench.launches import launches_by, launches_of

    meta = torch.device("meta")
    found = [one for case in plan.cases for one in launches_of(case, target)]
    yield HEADLINE, found + launches_by(partial(correct.on, meta, plan.cases), target)
    with TRITON_CONV.set_to("library"):
        found = [one for case in plan.cases for one in launches_of(case, target)]
    for mode, layer, _ in layers_in(plan):
        run = partial(layer_on_meta, plan, mode, layer)
        for how in ("auto",) if mode == "infer" else ("fused", "library"):
            with TRITON_CONV.set_to(how):
                found += launches_by(run, target)
    yield "library and layers", found


def layer_on_meta(plan: Plan, mode: str, layer: layers.Layer) -> None:
    """The resnet_fast calls of the stage `layers`, on meta tensors."""
    make = layers.infer if mode == "infer" else layers.train(mode)
    dtype = PRECISIONS[plan.first.dtype]
    make(layer, plan.batch, dtype, torch.device("meta"), plan.first.impl)["resnet_fast"]()


def estimates(plan: Plan, context: Context, compiled: list[Any]) -> None:
    """Write the estimated time of each case, computed from the compiled code."""
    from bench.estimate import estimate

    gpu, found = clock_of(rows.device_name(plan.first.device)), []
    target = target_of(plan.first.device)
    for case in plan.cases:
        try:
            found.append(estimate(case, gpu, compiled=compiled, target=target))
        except (RuntimeError, KeyError) as error:  # measure even without an estimate
            print(f"{case}: no estimate: {type(error).__name__}: {error}")
    stages.replace_file(context.out / ESTIMATES, json.dumps(found) + "\n")


def clock_of(name: str) -> str:
    """The name of the GPU `name` in `bench.estimate`; "h200" for an unknown GPU."""
    return next((gpu for gpu in GPUS if gpu in name.lower()), GPUS[0])


def estimate_of(out: Path, case: Case) -> dict[str, Any] | None:
    """The estimate of `case` in the folder, or None."""
    try:
        found = json.loads((out / ESTIMATES).read_text())
    except FileNotFoundError:
        return None
    keys = ("model", "mode", "batch", "dtype")
    return next((one for one in found if all(one[k] == getattr(case, k) for k in keys)), None)


def correctness(mode: str, plan: Plan, context: Context) -> str:
    """Run the checks of `bench.correct` for the cases in `mode`, until a CUDA error stops them."""
    torch.backends.cudnn.allow_tf32 = False
    count, failed = 0, []
    for what, check in correct.checks([case for case in plan.cases if case.mode == mode]):
        if failed and context.left() < 3:
            break
        context.need(3, what)
        try:
            wrong = check()
        except Exception as error:
            if LOST.search(str(error)):
                raise RuntimeError(f"{what}: {error}") from error
            wrong = [f"{type(error).__name__}: {error}"]
        count += 1
        print(f"{what}: {'; '.join(wrong) or 'ok'}")
        if wrong:
            failed.append(f"{what}: {wrong[0]}")
    split = correct.splits()
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} checks failed: {failed[0]}")
    return f"{count} checks, {split} convolutions by split-K"


def whole_models(plan: Plan, context: Context) -> str:
    """resnet_fast and eager, each in a CUDA graph; checked here unless `correct_*` passed."""
    return timed(plan, context, ("eager", "resnet_fast"))


def library(plan: Plan, context: Context) -> str:
    """The models with cuDNN's convolutions: rows of provider "library"."""
    with TRITON_CONV.set_to("library"):
        return timed(plan, context, ("resnet_fast",), name="library")


def beside(compiled: str, plan: Plan, context: Context) -> str:
    """The models and torch.compile, all in turns."""
    return timed(plan, context, ("eager", "resnet_fast", compiled), least=30)


def timed(
    plan: Plan,
    context: Context,
    providers: Sequence[str],
    name: str = "",
    least: float = 15,
) -> str:
    """Time every case without rows of this stage in the folder.

    name: the provider that the rows give, instead of the name in PROVIDERS. The stages `correct_*`
    check the default plan. The output of another plan is checked here, and so are cases that those
    stages found wrong or did not reach.
    """
    torch.backends.cudnn.benchmark = True
    had = [row for row in context.rows() if row["stage"] == context.name]
    told, failed = [], []
    for case in plan.cases:
        there = {row["provider"] for row in had if same_case(row, case)}
        if there >= ({name} if name else set(providers)):
            continue
        if failed and context.left() < least:
            break
        context.need(least, str(case))
        plain = models.plain_model(case.model, case.image_size)
        if not name and f"correct_{case.mode}" not in context.ok:
            wrong = correct.of_model(plain, case)
            if wrong:
                failed.append(f"{case}: {wrong[0]}")
                continue
        facts = rows.facts(case.device)
        seconds = min(SECONDS, context.left() / 3)
        new, why = models.measure(plain, case, providers, facts, seconds=seconds, check=bool(name))
        new = [row | {"provider": name or row["provider"]} for row in new]
        context.append(new)
        print(table.text(new) if new else "no rows", flush=True)
        failed += [f"{case}: {provider}: {reason}" for provider, reason in why.items()]
        last = name or providers[-1]
        told += [f"{row['images_per_s']:.0f}" for row in new if row["provider"] == last]
    if failed:
        raise RuntimeError("; ".join(failed))
    return f"{', '.join(told)} images/s by {name or providers[-1]}" if told else ""


def same_case(row: rows.Row, case: Case) -> bool:
    """Whether a row is of `case`."""
    keys = ("model", "mode", "batch", "dtype", "image_size")
    return row["benchmark"] == "models" and all(row[key] == getattr(case, key) for key in keys)


def profiles(plan: Plan, context: Context) -> str:
    """Kernel times of resnet_fast, then of eager while time remains; keeps earlier results."""
    torch.backends.cudnn.benchmark = True
    path = context.out / PROFILE
    found = json.loads(path.read_text()) if path.exists() else []
    there = {tuple(one[key] for key in PROFILED) for one in found}
    for provider in ("resnet_fast", "eager"):
        for case in plan.cases:
            of = {**{key: getattr(case, key) for key in PROFILED[:-1]}, "provider": provider}
            if tuple(of.values()) in there:
                continue
            context.need(8, f"{provider} {case}")
            plain = models.plain_model(case.model, case.image_size)
            layout = models.PROVIDERS[provider].layout
            batches = step.inputs(case, layout, step.classes(plain))
            run = models.step_of(models.PROVIDERS[provider], plain, case, batches)
            for i in range(2):
                run(i)
            guess = estimate_of(context.out, case) if provider == "resnet_fast" else None
            one = profile.summary(profile.recorded(run), guess)
            found.append({**of, "device": rows.device_name(case.device), **one})
            stages.replace_file(path, json.dumps(stages.finite(found), indent=1) + "\n")
            print(f"{provider} {case}\n{profile.text(one)}", flush=True)
            del run, batches
            torch.cuda.empty_cache()
    return f"{len(found)} steps in {PROFILE}"


def layers_in(plan: Plan) -> Iterator[tuple[str, layers.Layer, int]]:
    """(mode, layer, count), inference first."""
    for mode in layers.MODES:
        for layer, count in layers.layers_of(plan.first.model, plan.first.image_size).items():
            if mode != "dgrad" or layer.channels >= 16:  # the gradient of an image is not computed
                yield mode, layer, count


class Kept(rows.Collection):
    """Rows that are appended to a stage's file as they come."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.name, None)
        self.context = context

    def add(self, more: list[rows.Row]) -> None:
        self.context.append(more)
        super().add(more)

    def check(self, after: str) -> None:
        """Raise after a CUDA error, or without enough time for the next part."""
        if self.failed and (LOST.search(self.failed[-1]) or self.context.left() < 3):
            self.end()
        self.context.need(3, after)

    def end(self) -> None:
        """Print the failures, and raise if there are any."""
        print(*self.failed, sep="\n", flush=True)
        if self.failed:
            raise RuntimeError(f"{len(self.failed)} failed: {self.failed[0]}")


def single_layers(plan: Plan, context: Context) -> str:
    """Every layer in every mode; its rows are written at once."""
    case, done = plan.first, Kept(context)
    facts, limits = setting(plan, context)
    had = {(row["mode"], row["layer"]) for row in context.rows() if row["stage"] == context.name}
    for mode, layer, count in layers_in(plan):
        if (mode, str(layer)) in had:
            continue
        done.check(f"{mode} of {layer}")
        with done.part(f"{mode} of {layer}"):
            found = layers.layer_rows(
                layer, count, plan.batch, case.dtype, case.impl, mode, limits, facts
            )
            done.add(found)
            print(layers.text(found), flush=True)
    done.end()
    return totals([row for row in context.rows() if row["stage"] == context.name])


def totals(found: Sequence[rows.Row]) -> str:
    """Total milliseconds of all layers in each mode, for resnet_fast and PyTorch."""
    parts = []
    for mode in dict.fromkeys(row["mode"] for row in found):
        of = [row for row in found if row["mode"] == mode and row["ms_p50"] is not None]
        ms = [
            sum(row["ms_p50"] * row["launches"] for row in of if row["provider"] == provider)
            for provider in ("resnet_fast", "torch")
        ]
        if of:
            parts.append(f"{mode} {ms[0]:.2f} ms, torch {ms[1]:.2f}")
    return "; ".join(parts)


def single_passes(plan: Plan, context: Context) -> str:
    """The memory-bound ops at every shape; their rows are written at once."""
    case, done = plan.first, Kept(context)
    facts, limits = setting(plan, context)
    keys = ("layer", "mode", "provider")
    own = [row for row in context.rows() if row["stage"] == context.name]
    had = {tuple(row[key] for key in keys) for row in own}
    with torch.no_grad():
        for name in passes.SHAPES:
            timed = passes.measurements(name, plan.batch, case.dtype, limits, facts)
            for what, impl, run in timed:
                if (name, what, impl) not in had:
                    done.check(f"{what} at {name}")
                    with done.part(f"{what} at {name} by {impl}"):
                        done.add([run()])
    if done.found:
        print(passes.text(done.found), flush=True)
    done.end()
    found = [row for row in context.rows() if row["stage"] == context.name]
    shares = [row["percent_of_floor"] for row in found if row["percent_of_floor"] is not None]
    return f"{min(shares):.0f} to {max(shares):.0f}% of a copy" if shares else ""


def setting(plan: Plan, context: Context) -> tuple[rows.Row, ceilings.Ceilings]:
    """The facts for layer rows, and the ceilings: those that `machine` measured, else new ones."""
    case = plan.first
    torch.backends.cudnn.benchmark = True
    facts = {**rows.facts(case.device), "model": case.model, "image_size": case.image_size}
    for row in context.rows():
        if row["benchmark"] == "ceilings" and row["gb_per_s"] is not None:
            measured = 1e9 * row["gb_per_s"], 1e12 * row["tflop_per_s"]
            return facts, ceilings.Ceilings(*measured, row["dtype"])
    return facts, ceilings.measure(case.device, case.dtype)


def summary(plan: Plan, out: Path, outcomes: Sequence[Outcome]) -> str:
    """A table of images/s with estimates, and a table of the stages."""
    found = stages.read_rows(out)
    lines = []
    for row in found[-1:]:
        versions = f"torch {row['torch']}, Triton {row['triton']}, CUDA {row['cuda']}"
        lines += [f"{row['cpu_or_gpu']}, {versions}, commit {row['git_sha']}", ""]
    return "\n".join([*lines, throughput(plan, out, found), "", progress(outcomes)])


def throughput(plan: Plan, out: Path, found: Sequence[rows.Row]) -> str:
    """Images/s of each provider, one line per case, newest rows; the last column is an estimate."""
    rated = [row for row in found if row["benchmark"] == "models"]
    providers = list(dict.fromkeys(("resnet_fast", "eager", *(r["provider"] for r in rated))))
    lines = [["images/s", *providers, "vs eager", "estimate"]]
    for case in plan.cases:
        own = {row["provider"]: row for row in rated if same_case(row, case)}
        ours = own.get("resnet_fast", {})
        guess, ratio = estimate_of(out, case), ours.get("speedup_vs_eager")
        lines.append([
            f"{case.model} {case.mode} {case.dtype} {case.batch}",
            *(number(own.get(name, {}).get("images_per_s")) for name in providers),
            "-" if ratio is None else f"{ratio:.2f}x",
            "-" if guess is None else f"~{guess['images_per_s']:.0f}",
        ])  # fmt: skip
    note = "~: an estimate for resnet_fast (bench estimate), not measured"
    return f"{table.columns(lines, left=1)}\n{note}"


def number(value: float | None) -> str:
    """Images/s, or a dash."""
    return "-" if value is None else f"{value:.0f}"


def progress(outcomes: Sequence[Outcome], width: int = 100) -> str:
    """One line per stage: status, seconds, limit, reason."""
    lines = [["stage", "status", "why", "s", "limit"]]
    for one in outcomes:
        took = f"{one.seconds:.0f}" if one.seconds else ""
        lines.append([one.name, one.status, one.why, took, f"{one.limit:.0f}" if one.limit else ""])
    shown = [[name, status, s, limit, why] for name, status, why, s, limit in lines]
    return "\n".join(line[:width].rstrip() for line in table.columns(shown, left=5).splitlines())
