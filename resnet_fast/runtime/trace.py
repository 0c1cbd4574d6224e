"""RESNET_FAST_TRACE=1: print which implementation runs each op, one line per kind of call.

    op, tensors: implementation (reason); kernel or plan, tile (reason); …

An op starts a line (`op`), and decisions inside it add to it (`note`). Lines go to stderr. With the
trace on, CPU inference runs op by op instead of in one native call, so every op has a line.
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
    """Context that collects notes, then prints the line, once per process."""
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
    """Add a decision and its reason to the line of the running op, if any."""
    if _lines.notes is not None:
        _lines.notes.append(f"{what} ({why})")
