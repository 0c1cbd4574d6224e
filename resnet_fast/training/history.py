"""Metrics of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "images_per_second", "seconds",
)  # fmt: skip
TIMES = COLUMNS[-2:]


@dataclass
class History:
    """Metrics of a training run.

    Attributes:
        epochs: one dict per epoch with the keys `epoch` (from 1), `lr` (of the last step),
            `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy` (accuracies from 0 to 1),
            `images_per_second` (training alone) and `seconds` (training and test).
        losses: training loss of every step.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
