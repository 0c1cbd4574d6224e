"""Ops, blocks and whole models against plain PyTorch in fp64.

Each result is judged under the one rule of `spec.tolerance`, from the error that plain
PyTorch makes in the same dtype on the same inputs:

    ops      every op of `dispatch.ops` against `spec.reference`
    blocks   every module with every shortcut: output, gradients, running statistics, inference
    models   a training step of a whole network and inference with the statistics it leaves
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from . import blocks, models, ops
from .check import LAYOUTS, Check, Setting, Trial

__all__ = ["PARTS", "Check", "trials", "verify"]

PARTS = ("ops", "blocks", "models")


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
