"""Metrics as files: `metrics.csv`, `metrics.jsonl`, TensorBoard if installed, and curves."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from ..runtime.files import replacing
from ..runtime.optional import imported
from .history import COLUMNS, History


class Log:
    """Writes the metrics of a run to `folder`; None writes nothing.

    Each epoch rewrites the files from the whole history, so a resumed run leaves the same files as
    an uninterrupted one.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.board = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error) -> None:
        if self.board is not None:
            self.board.close()

    def start(self, history: History) -> None:
        """Start, or continue after the epochs of `history`."""
        if self.folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            pass
        else:
            self.board = SummaryWriter(
                self.folder / "tensorboard", purge_step=len(history.epochs) + 1
            )
        if history.epochs:
            self._write(history)

    def epoch(self, history: History) -> None:
        """Write the last epoch of `history`."""
        if self.folder is None:
            return
        self._write(history)
        if self.board is not None:
            row = history.epochs[-1]
            for name in COLUMNS[1:]:
                self.board.add_scalar(name, row[name], row["epoch"])
            self.board.flush()

    def _write(self, history: History) -> None:
        with replacing(self.folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(history.epochs)
        with replacing(self.folder / "metrics.jsonl", "w") as file:
            for row in history.epochs:  # NaN and infinity become null in JSON
                known = {key: v if math.isfinite(v) else None for key, v in row.items()}
                file.write(json.dumps(known) + "\n")


def plot_curves(history: History, path: Path, title: str = "") -> None:
    """Loss, accuracy and learning rate by epoch, as a PNG. MissingPackage without matplotlib."""
    imported("matplotlib", "curves", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history.epochs]
    columns = {name: [row[name] for row in history.epochs] for name in COLUMNS}
    step = len(epochs) / max(len(history.losses), 1)
    places = [(i + 1) * step for i in range(len(history.losses))]
    loss.plot(places, history.losses, color="#e8590c", linewidth=0.5, alpha=0.35)
    for split, color in (("train", "#e8590c"), ("test", "#4dabf7")):
        style = {"color": color, "label": split, "marker": "o", "markersize": 3}
        loss.plot(epochs, columns[f"{split}_loss"], **style)
        accuracy.plot(epochs, [100 * v for v in columns[f"{split}_accuracy"]], **style)
    rate.plot(epochs, columns["lr"], color="#8b949e", marker="o", markersize=3)
    loss.set(title="loss", xlabel="epoch", yscale="log")
    accuracy.set(title="accuracy", xlabel="epoch")
    accuracy.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    rate.set(title="learning rate, last step", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.title.set_fontsize(10)
    for axes in (loss, accuracy):
        axes.legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160)
