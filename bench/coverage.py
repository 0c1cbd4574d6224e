"""`python -m bench coverage`: the share of other packages' models that runs fused after `fuse`.

Each model runs in fp64 with random weights, before and after `fuse`. The table shows how many of
its convolutions, ReLUs and additions no longer run in plain PyTorch (`bench.executed`), how far
the results of both are apart, and why most of the rest is left alone.

docs/coverage.md holds the table between `<!-- coverage:begin -->` and `<!-- coverage:end -->`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import resnet_fast
from bench.coverage_models import MODELS, PACKAGES, Model, package, why_missing
from bench.executed import Counts, executed
from bench.rows import ROOT
from resnet_fast.fusion.survey import IN_A_GATE
from resnet_fast.runtime.files import replacing

PAGE = ROOT / "docs" / "coverage.md"
BEGIN, END = "<!-- coverage:begin -->", "<!-- coverage:end -->"
HEADER = ("model", "convolutions", "ReLUs", "additions", "training", "results", "left alone")
BATCH = 3  # images; of two, the norm of a 1x1 image has almost no gradient
EQUAL = 1e-9
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Coverage:
    """One model.

    Attributes:
        evaluation, training: its layers, and those that the fused model runs in plain PyTorch.
        apart: largest relative difference of outputs, gradients and buffers.
        reason: why most of the modules that are left alone are, from `explain`; or "".
    """

    name: str
    evaluation: tuple[Counts, Counts]
    training: tuple[Counts, Counts]
    apart: float
    reason: str

    def cells(self) -> list[str]:
        """Its line of the table."""
        evaluation, training = _fused(*self.evaluation), _fused(*self.training)
        modes = "same" if evaluation == training else ", ".join(training)
        results = "equal" if self.apart < EQUAL else f"{self.apart:.0e} apart"
        rest = any(any(shown(counts[1])) for counts in (self.evaluation, self.training))
        reason = (self.reason or "explain lists no module") if rest else ""
        return [self.name, *evaluation, modes, results, reason]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench coverage`."""
    add = parser.add_argument
    add("--models", nargs="+", metavar="NAME", default=list(MODELS), choices=MODELS,
        help="such as timm/resnet50 (default: all)")  # fmt: skip
    add("--update", action="store_true",
        help="write the lines of these models in docs/coverage.md")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and print, or write, the table; 1 when results differ or a model fails."""
    missing = {name: why for name in PACKAGES if (why := why_missing(name)) is not None}
    for name, why in missing.items():
        print(f"coverage: its models are left out: {name}: {why}", file=sys.stderr)
    gc.freeze()  # fuse collects garbage; what the packages hold is none
    try:
        return _each(args, missing)
    finally:
        gc.unfreeze()


def _each(args: argparse.Namespace, missing: dict[str, str]) -> int:
    failed = bool(args.update and missing)
    for name in args.models if not failed else ():
        if package(name) in missing:
            continue
        begin = time.perf_counter()
        try:
            one = measure(name, MODELS[name])
        except Exception as error:  # of one model; the others are measured
            failed = True
            print(f"coverage: {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        failed |= not one.apart < EQUAL
        print(" | ".join(one.cells()), f"| {time.perf_counter() - begin:.0f} s", flush=True)
        if args.update:
            text = PAGE.read_text(encoding="utf-8")
            with replacing(PAGE, "w", encoding="utf-8") as file:
                file.write(spliced(text, [one], measured_with()))
    return int(failed)


def measure(name: str, model: Model) -> Coverage:
    """Run `model` plain and fused, in evaluation and in training."""
    torch.manual_seed(0)
    plain = model.build().double()
    randomize(plain)
    x = torch.randn(BATCH, 3, model.size, model.size, dtype=torch.float64)
    fused = resnet_fast.fuse(copy.deepcopy(plain))
    rows = [row for row in resnet_fast.explain(fused).rows if row.why not in ("", IN_A_GATE)]
    left = [row.why for row in rows if row.state == "left alone"]
    left = left or [f"fused {row.why}" for row in rows]
    ours, theirs = _results(fused, model, x), _results(plain, model, x)
    apart = max(difference(ours[key], theirs[key]) for key in ("outputs", "gradients", "buffers"))
    counts = {mode: (theirs[mode], ours[mode]) for mode in ("evaluation", "training")}
    return Coverage(name, **counts, apart=apart, reason=main_reason(left))


def _results(net: nn.Module, model: Model, x: Tensor) -> dict[str, object]:
    """Counts of both modes, and what an evaluation and a training step compute."""
    outputs = []

    def forward() -> None:
        torch.manual_seed(1)
        outputs.extend(t for t in _pytree.tree_leaves(model.run(net, x)) if isinstance(t, Tensor))

    net.eval()
    with torch.no_grad():
        forward()
    evaluation = executed(forward, gradients=False)
    done = len(outputs)
    net.train()
    training = executed(forward, gradients=True)
    leaves = [p for p in net.parameters() if p.requires_grad]
    loss = sum(y.square().mean() for y in outputs[done:] if y.requires_grad)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {
        "evaluation": evaluation,
        "training": training,
        "outputs": [y.detach() for y in outputs],
        "gradients": list(gradients),
        "buffers": [b.clone() for b in net.buffers()],
    }


def randomize(model: nn.Module) -> None:
    """Draw the vectors of every norm with running statistics, frozen ones too."""
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), Tensor):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.5)


def difference(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest of max|actual − expected| / max|expected| of all tensors.

    A tensor that is NEGLIGIBLE beside the largest one, such as the gradient of a bias that a norm
    removes, counts as if it were as large as that. Infinite if a tensor is missing or not finite.
    """
    sizes = [_largest(t) for t in expected]
    floor = NEGLIGIBLE * max(sizes, default=0.0)
    worst = 0.0
    for one, other, size in zip(actual, expected, sizes, strict=True):
        if one is None or other is None:
            worst = worst if one is other else math.inf
            continue
        apart = _largest(one - other) if one.shape == other.shape else math.inf
        worst = max(worst, apart / max(size, floor) if apart else 0.0)
    return worst


def _largest(t: Tensor | None) -> float:
    if t is None or not t.numel():
        return 0.0
    largest = t.double().abs().max().item()
    return largest if math.isfinite(largest) else math.inf


def main_reason(reasons: Iterable[str]) -> str:
    """The most frequent of `reasons`, without the names of modules and the advice behind ";"."""
    kinds = Counter(
        re.sub(r"\S+ \((\w+)\)", r"\1", why.partition(";")[0]) for why in reasons if why
    )
    return kinds.most_common(1)[0][0] if kinds else ""


def shown(counts: Counts) -> tuple[int, ...]:
    """The counts of the table."""
    return counts.convolutions, counts.relus, counts.additions


def _fused(every: Counts, rest: Counts) -> list[str]:
    """ "n of m" for each count of the table; "–" where there is none."""
    pairs = zip(shown(every), shown(rest), strict=True)
    return [f"{of - left} of {of}" if of else "–" for of, left in pairs]


def measured_with() -> str:
    """The versions of what the table is measured with, as the line below it."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PACKAGES))
    return f"Measured with {versions}."


def lines_of(text: str) -> dict[str, list[str]]:
    """The lines of a page's table, in cells, by model. ValueError unless it has one table."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{PAGE.name}: expected one {BEGIN} followed by one {END}")
    table = text.partition(BEGIN)[2].partition(END)[0]
    rows = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in rows[2:]}


def spliced(text: str, found: Iterable[Coverage], versions: str) -> str:
    """The page `text` with the lines of `found`; those of other models stay.

    If the table was measured with other versions, it starts anew.
    """
    lines = lines_of(text)
    lines = lines if versions in text else {}
    lines |= {one.name: one.cells() for one in found}
    order = [lines[name] for name in MODELS if name in lines]
    header = [list(HEADER), ["---", *["---:"] * 3, *["---"] * 3]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (*header, *order))
    before, rest = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n{table}\n\n{versions}\n{END}{rest}"
