"""SIGTERM and SIGINT set a flag that the training loop reads after each step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .distributed import any_of, world

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_EVERY = 8  # steps between two checks over all processes


class Interrupted(Exception):
    """A signal stopped `fit` after a step, and `fit` wrote a checkpoint.

    Attributes:
        number: the signal.
        path: the checkpoint file; on processes other than the first, its folder.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; checkpoint: {path}")
        self.number, self.path = number, path


class Stop:
    """Whether to stop, and the signal number (SIGTERM if another process received it)."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame) -> None:
        """The signal handler; a second Ctrl-C stops at once."""
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def asked(self, step: int, device: torch.device) -> bool:
        """Whether to stop after this step; the same answer in every process."""
        if world().size == 1:
            return bool(self.number)
        if step % AGREE_EVERY:
            return False
        if any_of(bool(self.number), device):
            self.number = self.number or signal.SIGTERM
            return True
        return False


@contextmanager
def stop_signals(enabled: bool) -> Iterator[Stop]:
    """Within it, signals set the yielded `Stop`; only in the main thread."""
    stop = Stop()
    before = {}
    if enabled and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
