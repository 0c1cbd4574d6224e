"""Fixtures of the tests of training."""

import itertools
import os
import signal

import pytest

from resnet_fast.training.loop import _Run


@pytest.fixture
def stop_at(monkeypatch):
    """A function: send this process a signal in a step, counted over all runs of the test."""
    step = _Run.step

    def stop(number, which=signal.SIGTERM):
        counter = itertools.count(1)

        def counted(run, x, y):
            if next(counter) == number:
                os.kill(os.getpid(), which)
            return step(run, x, y)

        monkeypatch.setattr(_Run, "step", counted)

    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield stop
    signal.signal(signal.SIGINT, before)
