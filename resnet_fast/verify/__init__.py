"""Compares ops, blocks and whole models with plain PyTorch in fp64.

`spec.tolerance` sets the allowed error of each result, from the error of plain PyTorch in the same
dtype on the same inputs:

    ops      every op of `dispatch.ops` against `spec.reference`
    blocks   every module with every shortcut: output, gradients, running statistics, inference
    models   a training step of a whole network, then inference with the updated statistics
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
    """The cases of `parts` in every setting, not yet run.

    Args:
        impls: Implementations: "auto", "reference", "native" or "triton".
        devices: "cpu" or "cuda".
        dtypes: Names of `spec.dtypes.BY_NAME`, such as "fp32" or "bf16".
        parts: Any of "ops", "blocks" and "models".
        names: Models to check, as `list_models` names them.
        quick: If True, take only the first case of each op and block.

    Returns:
        An iterator over the cases, for `verify`.
    """
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
    """Run the cases, with a progress bar if stderr is a terminal.

    Args:
        work: Cases from `trials`.

    Returns:
        One check for each compared tensor.
    """
    checks = []
    bar = tqdm(work, desc="verify", unit="case", leave=False, disable=None)
    # Inputs are drawn on the CPU, also under torch.set_default_device.
    with bar, torch.device("cpu"), _without_tf32():
        for trial in bar:
            bar.set_postfix_str(str(trial), refresh=False)
            checks += trial.run()
    return checks


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Switch cuDNN's TF32 off: TF32 rounding differs between libraries by more than fp32 does."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
