"""`resnet-fast verify`: compare ops, blocks and whole models with plain PyTorch in fp64."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from ..models import list_models
from ..runtime import options, settings
from ..runtime.files import replacing
from ..runtime.options import DEVICES
from ..spec.chain import IMPLS
from ..spec.dtypes import BY_NAME
from ..verify import PARTS, report, trials, verify
from ..verify.models import SMALL
from . import env
from .shared import missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast verify`; every item of a list is checked."""
    add = parser.add_argument
    add("--model", type=options.names(list_models), metavar="NAME,…",
        help=f"verify only these whole models (default: ops, blocks and {SMALL})")  # fmt: skip
    add("--impl", type=options.names(IMPLS), default=["auto"], metavar="IMPL,…",
        help=f"of {', '.join(IMPLS)} (default: auto)")  # fmt: skip
    add("--dtype", type=options.names(BY_NAME), metavar="DTYPE,…",
        help=f"of {', '.join(BY_NAME)} (default: fp32,bf16; fp32 when --quick)")  # fmt: skip
    add("--device", type=options.names(DEVICES), metavar="cpu,cuda",
        help="devices (default: cpu, and cuda if available)")  # fmt: skip
    add("--json", type=options.output_file, metavar="FILE", help="write every check to FILE")
    add("--quick", action="store_true", help="one case per op and block, no model")


def run(args: argparse.Namespace) -> int:
    """Run the checks; returns 0, 1 if one fails, or 2 if an `--impl` or `--device` cannot run."""
    # The cases have few channels: with "auto", cuDNN runs those that CUTLASS cannot.
    settings.CUDA_CONV.prefer("auto")
    dtypes = args.dtype or (["fp32"] if args.quick else ["fp32", "bf16"])
    devices = args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    reasons = list(missing(args.impl, devices, dtypes))
    for why in reasons:
        print(f"resnet-fast verify: error: {why}", file=sys.stderr)
    if reasons:
        return 2
    parts = ("models",) if args.model else PARTS[:2] if args.quick else PARTS
    names = args.model or [SMALL]
    work = trials(args.impl, devices, dtypes, parts=parts, names=names, quick=args.quick)
    checks = verify(list(work))
    print(report.text(checks))
    if args.json is not None:
        with replacing(args.json, "w") as file:
            file.write(json.dumps(report.document(checks, env.collect())) + "\n")
    return int(not all(check.ok for check in checks))
