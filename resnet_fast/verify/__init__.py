"""`resnet-fast verify`: ops, blocks and whole models against plain PyTorch in fp64.

Each result is judged under the one rule of `resnet_fast.tolerance`, from the error that plain
PyTorch makes in the same dtype on the same inputs:

    ops      every op of `resnet_fast.ops` against `resnet_fast.reference`
    blocks   every module with every shortcut: output, gradients, running statistics, inference
    models   a training step of a whole network and inference with the statistics it leaves
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from .. import backend, options
from ..ops import NAMES
from ..options import DEVICES
from . import blocks, models, ops, report
from .check import DTYPES, LAYOUTS, Check, Setting, Trial

__all__ = ["Check", "add_arguments", "missing", "run", "trials", "verify"]

PARTS = ("ops", "blocks", "models")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast verify`; comma lists are checked item by item."""
    from ..models import list_models

    add = parser.add_argument
    add("--model", type=options.names(list_models), metavar="NAME,…",
        help=f"these whole models alone (default: ops, blocks and {models.SMALL})")  # fmt: skip
    add("--impl", type=options.names(backend.IMPLS), default=["auto"], metavar="IMPL,…",
        help=f"of {', '.join(backend.IMPLS)} (default: auto)")  # fmt: skip
    add("--dtype", type=options.names(DTYPES), metavar="DTYPE,…",
        help=f"of {', '.join(DTYPES)} (default: fp32,bf16; fp32 when --quick)")  # fmt: skip
    add("--device", type=options.names(DEVICES), metavar="cpu,cuda",
        help="default: cpu, and cuda where there is one")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write every check to this file")
    add("--quick", action="store_true", help="one case of every op and block, no model")


def run(args: argparse.Namespace) -> int:
    """Verify what was asked for; 0, 1 when a check failed, 2 when an `--impl` is not to be had."""
    dtypes = args.dtype or (["fp32"] if args.quick else ["fp32", "bf16"])
    devices = args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons = list(missing(args.impl, devices, dtypes))
    for why in reasons:
        print(f"resnet-fast verify: error: {why}", file=sys.stderr)
    if reasons:
        return 2
    # Cases have few channels, and those that CUTLASS does not take are to be verified too.
    os.environ.setdefault("RESNET_FAST_CUDA_CONV", "auto")
    parts = ("models",) if args.model else PARTS[:2] if args.quick else PARTS
    names = args.model or [models.SMALL]
    work = trials(args.impl, devices, dtypes, parts=parts, names=names, quick=args.quick)
    checks = verify(list(work))
    print(report.text(checks))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report.document(checks)) + "\n")
    return int(not all(check.ok for check in checks))


def missing(impls: Sequence[str], devices: Sequence[str], dtypes: Sequence[str]) -> Iterator[str]:
    """Reasons why what was asked for by name cannot run here: a device, or an implementation."""
    if "cuda" in devices and not torch.cuda.is_available():
        yield "--device cuda: torch.cuda.is_available() is False here"
        return
    for impl in impls:
        for device in devices:
            for dtype in dtypes:
                if impl == "auto":
                    continue
                for op in NAMES:
                    why = backend.refusal(impl, op, device, DTYPES[dtype])
                    if why is not None:
                        yield f"--impl {impl} cannot run {op} in {dtype} on {device}: {why}"
                        break


def trials(
    impls: Sequence[str] = ("auto",),
    devices: Sequence[str] = ("cpu",),
    dtypes: Sequence[str] = ("fp32",),
    *,
    parts: Sequence[str] = PARTS,
    names: Sequence[str] = (models.SMALL,),
    quick: bool = False,
) -> Iterator[Trial]:
    """The cases of `parts` in every setting, none of them run yet."""
    settings = [
        Setting(impl, device, dtype, layout)
        for impl in impls
        for device in devices
        for dtype in dtypes
        for layout in LAYOUTS
    ]
    for part in parts:
        for setting in settings:
            if part == "ops":
                yield from ops.trials(setting, quick)
            elif part == "blocks":
                yield from blocks.trials(setting, quick)
            else:
                for name in names:
                    yield from models.trials(setting, name)


def verify(work: Sequence[Trial]) -> list[Check]:
    """Run the cases, with a progress bar on stderr where that is a terminal."""
    checks = []
    bar = tqdm(work, desc="verify", unit="case", leave=False, disable=None)
    # Cases are drawn on the CPU, whatever torch.set_default_device says.
    with bar, torch.device("cpu"), _without_tf32():
        for trial in bar:
            bar.set_postfix_str(str(trial), refresh=False)
            checks += trial.run()
    return checks


@contextmanager
def _without_tf32() -> Iterator[None]:
    """fp32 is fp32 on a GPU: how two libraries round to tf32 differs by more than it does."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
