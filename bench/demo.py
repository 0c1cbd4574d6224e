"""`python -m bench demo`: the whole of resnet_fast in a few minutes, on the CPU.

    environment    as `resnet-fast env` prints it
    verification   every op and block in fp32 and bf16, and ResNet-50
    training       ResNet-20 on scikit-learn's digits, plain and fused side by side (`bench.digits`)
    throughput     ResNet-18 and ResNet-50 beside eager PyTorch (`bench.models`)
    report         OUT/report.html, its pictures and the rows and checks it was made from

Every part makes claims; the last line is `demo: ok` when all of them hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench import digits, report, rows
from resnet_fast import verify
from resnet_fast.commands import env
from resnet_fast.commands.shared import missing
from resnet_fast.spec.chain import IMPLS
from resnet_fast.verify import report as checks_report

MODEL = "resnet50"
VERIFIED = {"ops": ["fp32", "bf16"], "blocks": ["fp32", "bf16"], "models": ["fp32"]}
GOAL = 0.97
EARLY = {"fp32": (5, 1e-3), "fp64": (20, 1e-9)}  # steps, and how far apart a loss may be in them
THROUGHPUT = (
    "--model resnet18,resnet50 --mode infer,train --batch 1,8 --dtype fp32 --device cpu "
    "--providers eager,resnet_fast --rounds 7"
).split()


@dataclass(frozen=True)
class Claim:
    """One sentence that the demo stands for, and whether it held."""

    text: str
    ok: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.text}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/demo"), metavar="DIR",
        help="where report.html goes (default: build/demo)")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto", help="implementation that resnet_fast runs")


def run(args: argparse.Namespace) -> int:
    """All parts in order; 1 when a claim does not hold or a part cannot run, else 0."""
    start = time.perf_counter()
    reasons = list(missing([args.impl], ["cpu"], ["fp32", "bf16"]))
    if reasons:
        print(f"demo: FAILED: {reasons[0]}")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        _heading("environment")
        environment = env.collect()
        print(env.text(environment))
        _heading("verification")
        checks, claims = verification(args.impl, args.out)
        _heading("training")
        curves, more = training(args.impl)
        claims += more
        _heading("throughput")
        measured, claim = throughput(args.impl, args.out)
        claims.append(claim)
        path = report.write(
            args.out,
            environment=env.text(environment),
            checks=checks,
            curves=curves,
            measured=measured,
            claims=[(claim.text, claim.ok) for claim in claims],
            facts=rows.facts(torch.device("cpu")),
        )
    except (RuntimeError, OSError) as error:  # a missing package, a disk that is full
        print(f"demo: FAILED: {error}")
        return 1
    _heading("claims")
    for claim in claims:
        print(claim)
    print(f"\n{path}, after {time.perf_counter() - start:.0f} s")
    broken = [claim.text for claim in claims if not claim.ok]
    print(f"demo: FAILED: not true: {broken[0]}" if broken else "demo: ok")
    return int(bool(broken))


def verification(impl: str, out: Path) -> tuple[list[verify.Check], list[Claim]]:
    """Checks of ops, blocks and ResNet-50, kept in OUT/verify.json; a claim a part."""
    checks: list[verify.Check] = []
    claims = []
    for part, dtypes in VERIFIED.items():
        trials = verify.trials([impl], dtypes=dtypes, parts=[part], names=[MODEL])
        found = verify.verify(list(trials))
        checks += found
        name = MODEL if part == "models" else part
        print(f"{name:10}{checks_report.summary(found)}")
        for check in found:
            if not check.ok:
                print(checks_report.failure(check))
        right = sum(check.ok for check in found)
        text = f"{name}: {right} of {len(found)} results as near to fp64 as plain PyTorch's"
        claims.append(Claim(text, bool(found) and right == len(found)))
    document = checks_report.document(checks, env.collect())
    (out / "verify.json").write_text(json.dumps(document) + "\n")
    return checks, claims


def training(impl: str) -> tuple[dict[str, digits.Curve], list[Claim]]:
    """The curves of the three nets, printed epoch by epoch; claims on early steps and the end."""
    data = digits.load()
    count = len(data.train_y) + len(data.test_y)
    print(f"{digits.MODEL} on {count} scans of digits, {digits.EPOCHS} epochs, equal batches")
    steps = EARLY["fp64"][0]
    with _threads(1):  # the nets are so small that more threads mostly wait for each other
        double = digits.nets(impl, torch.float64)
        exact = digits.train(
            double, data, steps=steps, progress=functools.partial(tqdm, desc="train fp64")
        )
        curves = digits.train(
            digits.nets(impl), data, progress=functools.partial(tqdm, desc="train fp32")
        )
    steps = len(curves["plain"].losses) // digits.EPOCHS
    print("epoch  " + "  ".join(f"{name:>18}" for name in curves) + "   (loss, test accuracy)")
    for epoch in range(digits.EPOCHS):
        cells = []
        for curve in curves.values():
            loss = sum(curve.losses[epoch * steps : (epoch + 1) * steps]) / steps
            cells.append(f"{loss:9.4f} {curve.accuracies[epoch]:8.2%}")
        print(f"{epoch + 1:5}  " + "  ".join(cells))
    for name, curve in curves.items():
        print(f"{name}: {1e3 * curve.seconds / len(curve.losses):.1f} ms a step")
    return curves, training_claims(curves, exact)


def training_claims(
    curves: Mapping[str, digits.Curve], exact: Mapping[str, digits.Curve]
) -> list[Claim]:
    """The fused net follows the plain one, in fp64 for long, and both end above GOAL."""
    claims = []
    for dtype, found in (("fp64", exact), ("fp32", curves)):
        steps, allowed = EARLY[dtype]
        apart = max(digits.drift(found, "fused")[:steps])
        text = (
            f"the first {steps} losses in {dtype} are the plain ones to {allowed:g} ({apart:.1e})"
        )
        claims.append(Claim(text, apart <= allowed))
    for name in ("plain", "fused"):
        reached = curves[name].accuracies[-1]
        text = f"the {name} net reads at least {GOAL:.0%} of the test digits ({reached:.2%})"
        claims.append(Claim(text, reached >= GOAL))
    return claims


def throughput(impl: str, out: Path) -> tuple[list[rows.Row], Claim]:
    """Rows of `bench.models`, kept in OUT/throughput.jsonl, which starts anew."""
    from bench.__main__ import main as bench

    path = out / "throughput.jsonl"
    path.unlink(missing_ok=True)
    status = bench(["models", *THROUGHPUT, "--impl", impl, "--out", str(path)])
    measured = rows.read([path]) if path.exists() else []
    claim = Claim("whole models pass their gate before they are timed", status == 0)
    return measured, claim


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _heading(text: str) -> None:
    print(f"\n== {text} ==", flush=True)
