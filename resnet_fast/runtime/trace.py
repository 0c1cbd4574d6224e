"""RESNET_FAST_TRACE=1: who runs each op, and why: one line on stderr for each kind of call.

    op, tensors: implementation (reason); kernel or plan, tile (reason); …

Ops open a line (`op`), and what decides inside them adds to it (`note`). With the trace on, CPU
inference runs op by op, not in one native call, so that every op has its line.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import settings

_said: set[str] = set()


class _Lines(threading.local):
    notes: list[str] | None = None


_lines = _Lines()


def on() -> bool:
    """Whether decisions are printed."""
    return settings.TRACE.read()


@contextmanager
def op(head: str) -> Iterator[None]:
    """Within it notes are gathered; then the line is printed, once a process."""
    before, _lines.notes = _lines.notes, []
    try:
        yield
    finally:
        line = "; ".join([head, *_lines.notes])
        _lines.notes = before
        if line not in _said:
            _said.add(line)
            print(f"resnet_fast: {line}", file=sys.stderr)


def note(what: str, why: str) -> None:
    """Add a decision and its reason to the line of the op that runs; nothing outside one."""
    if _lines.notes is not None:
        _lines.notes.append(f"{what} ({why})")
