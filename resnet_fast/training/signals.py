"""SIGTERM and SIGINT as a wish that the loop asks for between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .distributed import any_of, world

SIGNALS = (signal.SIGTERM, signal.SIGINT)
AGREE_EVERY = 8  # steps between two times that processes ask each other


class Interrupted(Exception):
    """A signal ended `fit` after a step; `path` is the checkpoint it wrote, `number` the signal."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {path} has every step so far")
        self.number, self.path = number, path


class Stop:
    """Whether to stop, and which signal said so (of another process: SIGTERM)."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame) -> None:
        """The handler; Ctrl-C for the second time does not wait for a step."""
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
    """A `Stop` that the process's signals set, within; handlers belong to the main thread alone."""
    stop = Stop()
    before = {}
    if enabled and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
