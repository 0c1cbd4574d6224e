"""`python -m bench demo`: a tour of resnet_fast in a few minutes, on the CPU.

    environment    as `resnet-fast env` prints it
    verification   every op and block in fp32 and bf16, and ResNet-50
    training       ResNet-20 on scikit-learn's digits, plain and fused in lock step (`bench.digits`)
    throughput     ResNet-18 and ResNet-50 against eager PyTorch (`bench.models`)
    report         OUT/report.html with its pictures, and the rows and checks behind it

Every part makes claims; the last line is `demo: ok` if all of them hold.
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
EARLY = {"fp32": (5, 1e-3), "fp64": (20, 1e-9)}  # steps, and the largest difference of their losses
THROUGHPUT = (
    "--model resnet18,resnet50 --mode infer,train --batch 1,8 --dtype fp32 --device cpu "
    "--providers eager,resnet_fast --rounds 7"
).split()


@dataclass(frozen=True)
class Claim:
    """One claim of the demo, and whether it holds."""

    text: str
    ok: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.text}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench demo`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("build/demo"), metavar="DIR",
        help="folder for report.html and its data (default: build/demo)")  # fmt: skip
    add("--impl", choices=IMPLS, default="auto", help="of resnet_fast (default: auto)")


def run(args: argparse.Namespace) -> int:
    """Run all parts in order; 1 if a claim does not hold or a part cannot run, else 0."""
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
    except (RuntimeError, OSError) as error:  # a missing package, a full disk
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
    """Check ops, blocks and ResNet-50; write OUT/verify.json. One claim per part."""
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
        text = f"{name}: {right} of {len(found)} results as close to fp64 as plain PyTorch's"
        claims.append(Claim(text, bool(found) and right == len(found)))
    document = checks_report.document(checks, env.collect())
    (out / "verify.json").write_text(json.dumps(document) + "\n")
    return checks, claims


def training(impl: str) -> tuple[dict[str, digits.Curve], list[Claim]]:
    """Train the three nets and print their curves; claims about the first steps and the end."""
    data = digits.load()
    count = len(data.train_y) + len(data.test_y)
    print(f"{digits.MODEL} on {count} scans of digits, {digits.EPOCHS} epochs, same batches")
    steps = EARLY["fp64"][0]
    with _threads(1):  # the nets are too small for more threads to help
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
        print(f"{name}: {1e3 * curve.seconds / len(curve.losses):.1f} ms per step")
    return curves, training_claims(curves, exact)


def training_claims(
    curves: Mapping[str, digits.Curve], exact: Mapping[str, digits.Curve]
) -> list[Claim]:
    """Claims: the fused net's first losses match the plain net's, and both reach GOAL."""
    claims = []
    for dtype, found in (("fp64", exact), ("fp32", curves)):
        steps, allowed = EARLY[dtype]
        apart = max(digits.drift(found, "fused")[:steps])
        text = (
            f"the first {steps} losses in {dtype} match the plain ones to {allowed:g} ({apart:.1e})"
        )
        claims.append(Claim(text, apart <= allowed))
    for name in ("plain", "fused"):
        reached = curves[name].accuracies[-1]
        text = f"the {name} net classifies at least {GOAL:.0%} of the test digits ({reached:.2%})"
        claims.append(Claim(text, reached >= GOAL))
    return claims


def throughput(impl: str, out: Path) -> tuple[list[rows.Row], Claim]:
    """Rows of `bench.models`, written to a new OUT/throughput.jsonl."""
    from bench.__main__ import main as bench

    path = out / "throughput.jsonl"
    path.unlink(missing_ok=True)
    status = bench(["models", *THROUGHPUT, "--impl", impl, "--out", str(path)])
    measured = rows.read([path]) if path.exists() else []
    claim = Claim("whole models pass the correctness gate before they are timed", status == 0)
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
