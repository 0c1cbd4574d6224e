"""What a run measured."""

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
    """Metrics of a run.

    Attributes:
        epochs: one dict an epoch, of COLUMNS; `epoch` counts from 1, `lr` is that of the last
            step, accuracies are shares, `seconds` are those of training and test together,
            `images_per_second` that of training alone.
        losses: the training loss of every step.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
