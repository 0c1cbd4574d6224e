"""`python -m bench first`: from `import` to the first inference, in a process of its own each.

Every provider runs twice with caches in a folder made for it: empty ones (RESNET_FAST_CACHE,
TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR and CUDA's own, CUDA_CACHE_PATH), then those that the
first process left. The process (`bench.first_process`) times its imports, the making of the model
and the first logits; `import torch`, which is nobody's doing here, is said apart and in no total.
The logits are judged as `bench.models` judges them; wrong ones leave no row. Files that the
system has not read yet make the first process slower: `import torch` shows it. On an H200 ResNet-50
should need at most 30 s with empty caches and no table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import models, rows, table
from resnet_fast.runtime.options import device, names, positive
from resnet_fast.spec.dtypes import PRECISIONS

PROVIDERS = ("eager", "compile", "resnet_fast")
CACHES = {
    "RESNET_FAST_CACHE": "resnet_fast",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "CUDA_CACHE_PATH": "cuda",
}
RUNS = ("empty", "warm")


def measure(options: Mapping[str, Any], folder: Path, timeout: float) -> dict[str, float]:
    """Seconds that a new process says its parts took, its caches under `folder`.

    Raises RuntimeError with the last line of what it said where it failed or lasted too long.
    """
    environment = {**os.environ, **{name: str(folder / at) for name, at in CACHES.items()}}
    command = [sys.executable, "-m", "bench.first_process", json.dumps(options)]
    try:
        done = subprocess.run(
            command, cwd=rows.ROOT, env=environment, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {timeout:.0f} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def text(found: list[rows.Row]) -> str:
    """A line a row: the parts in seconds, their sum and what `import torch` took before."""
    parts = ("import_torch_s", "import_s", "build_s", "first_s", "total_s")
    heads = ("import torch", "import resnet_fast", "model", "first logits", "sum without torch")
    lines = [("provider", "caches", *heads)]
    lines += [
        (table.LABELS[row["provider"]], row["caches"], *(f"{row[part]:.2f}" for part in parts))
        for row in found
    ]
    return table.columns(lines, left=2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench first`."""
    add = parser.add_argument
    add("--model", type=names(models.model_names), default=["resnet50"], metavar="NAME,…")
    add("--batch", type=positive(int), default=1, metavar="N")
    add("--image-size", type=positive(int), default=224, metavar="N")
    add("--dtype", choices=list(PRECISIONS), help="fp32 on a CPU, bf16 on a GPU")
    add("--device", type=device, default=torch.device("cpu"), metavar="cpu|cuda")
    add("--providers", type=names(lambda: PROVIDERS), default=list(PROVIDERS), metavar="NAME,…",
        help=f"of {', '.join(PROVIDERS)} (all)")  # fmt: skip
    add("--impl", choices=models.IMPLS, default="auto", help="implementation that resnet_fast runs")
    add("--timeout", type=positive(float), default=300.0, metavar="S", help="of a process (300)")
    add("--out", type=Path, metavar="FILE.jsonl", help="append the rows to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when a process failed or its logits were wrong."""
    facts = rows.facts(args.device)
    dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    found, failed = [], False
    for model in args.model:
        case = {"model": model, "batch": args.batch, "dtype": dtype,
                "image_size": args.image_size, "impl": args.impl}  # fmt: skip
        for provider in args.providers:
            options = {**case, "device": args.device.type, "provider": provider}
            with tempfile.TemporaryDirectory() as folder:
                for caches in RUNS:
                    models.say(f"{model}: first inference of {provider}, {caches} caches")
                    try:
                        took = measure(options, Path(folder), args.timeout)
                    except RuntimeError as error:
                        models.say(f"{model}: {provider}: {error}")
                        failed = True
                        break
                    found.append(rows.first_row(
                        facts, **case, **took, benchmark="first", mode="infer", caches=caches,
                        layout="channels_last", provider=provider,
                    ))  # fmt: skip
    if found:
        print(text(found))
    if args.out is not None and found:
        rows.append(args.out, found)
    return int(failed)
