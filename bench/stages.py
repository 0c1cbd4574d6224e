"""Run stages in order within a time budget, each in a separate process with its own limit.

After a CUDA error a process cannot use the GPU again, a kernel may hang, a compiler may take
minutes. Separate processes isolate this: a failure is recorded and the next stage starts. All
results are in one folder, which is updated while the stages run, so that a machine that disappears
leaves its measurements:

    stages.json   name, status, seconds, limit and a message of each stage (`Outcome`)
    rows.jsonl    the rows, as they are measured (`Context.append`)
    log.txt       output of the stages, and stack traces of stages that crashed or timed out
    summary.txt   the tables

A fork server starts the processes in milliseconds. It has imported torch and the benchmarks, and
has not initialized CUDA.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench import rows

OK, FAILED, LATE, WAITING, RUNNING = "ok", "failed", "out of time", "not started", "running"
RECORD, ROWS, LOG, SUMMARY = "stages.json", "rows.jsonl", "log.txt", "summary.txt"
GRACE = 3.0  # seconds from a stage's deadline until its process is killed; at most 1/4 of its limit


class OutOfTime(Exception):
    """Raised by a stage that stops because its deadline is near; says what it skipped."""


@dataclass(frozen=True)
class Context:
    """Input of a stage: its folder `out` and its time limits (`time.monotonic`).

    It should finish by `deadline`; its process is killed at `end`. ok: names of the stages that
    succeeded.
    """

    name: str
    out: Path
    deadline: float
    end: float
    ok: frozenset[str] = frozenset()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Raise OutOfTime unless `seconds` are left for `what`."""
        if self.left() < seconds:
            raise OutOfTime(f"skipped {what} and everything after it")

    def append(self, found: Iterable[rows.Row]) -> None:
        """Append rows to the folder's file immediately, with the stage's name; NaN becomes None."""
        rows.append(self.out / ROWS, [{**finite(row), "stage": self.name} for row in found])

    def rows(self) -> list[rows.Row]:
        """All rows of the folder."""
        return read_rows(self.out)


Run = Callable[[Context], "str | None"]


@dataclass(frozen=True)
class Stage:
    """A part of a run: `run(context)` returns a message, and raises on failure.

    seconds: its time limit. least: if less of the budget remains, the stage does not start.
    """

    name: str
    seconds: float
    run: Run
    least: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """Status of a stage: OK, FAILED, LATE, WAITING (in the file also RUNNING), and a message."""

    name: str
    status: str = WAITING
    seconds: float = 0.0
    limit: float = 0.0
    why: str = ""


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    budget: float,
    *,
    only: Sequence[str] = (),
    summarize: Callable[[Sequence[Outcome]], str] | None = None,
    start: Callable[[Run, Context], tuple[str, str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run `stages` in order within `budget` seconds; return their outcomes and write them to `out`.

    Stages that succeeded according to `out` do not run again. only: names of the stages to run, ()
    for all. summarize: returns the text of SUMMARY, written after each stage. start: runs a stage
    and returns its status and message (default `in_process`). Stages cannot raise through it.
    """
    begin = clock()
    out.mkdir(parents=True, exist_ok=True)
    before = {outcome.name: outcome for outcome in recorded(out)}
    found = {stage.name: before.get(stage.name, Outcome(stage.name)) for stage in stages}

    def note(outcome: Outcome) -> None:
        found[outcome.name] = outcome
        text = json.dumps({"stages": [asdict(one) for one in found.values()]}, indent=1)
        replace_file(out / RECORD, text + "\n")
        if summarize is not None:
            try:
                text = summarize(list(found.values()))
            except (ValueError, KeyError) as error:  # a truncated row must not stop the run
                text = f"no summary: {error}"
            replace_file(out / SUMMARY, text + "\n")

    for stage in stages:
        if found[stage.name].status == OK or (only and stage.name not in only):
            continue
        left = budget - (clock() - begin)
        limit = min(stage.seconds, left)
        outcome = Outcome(stage.name, RUNNING, limit=round(limit, 1))
        if limit < stage.least:
            why = f"{max(left, 0):.0f} s left, needs {stage.least:.0f} s"
            note(replace(outcome, status=WAITING, limit=stage.seconds, why=why))
            continue
        note(outcome)
        say(f"{stage.name}: {limit:.0f} s at most")
        began = clock()
        ok = frozenset(name for name, one in found.items() if one.status == OK)
        end = time.monotonic() + limit
        context = Context(stage.name, out, end - min(GRACE, limit / 4), end, ok)
        status, why = (start or in_process)(stage.run, context)
        outcome = replace(outcome, status=status, why=why, seconds=round(clock() - began, 1))
        note(outcome)
        say(f"{stage.name}: {line(outcome)}")
    return list(found.values())


def line(outcome: Outcome) -> str:
    """Status, seconds and message in one line."""
    text = f"{outcome.status} after {outcome.seconds:.1f} s"
    return f"{text}: {outcome.why}" if outcome.why else text


def recorded(out: Path) -> list[Outcome]:
    """The outcomes in the folder; [] if there are none."""
    try:
        return [Outcome(**one) for one in json.loads((out / RECORD).read_text())["stages"]]
    except FileNotFoundError:
        return []


def read_rows(out: Path) -> list[rows.Row]:
    """The rows in the folder; [] if there are none."""
    path = out / ROWS
    return rows.read([path]) if path.exists() else []


_modules: tuple[str, ...] = ()


def preload(modules: Sequence[str]) -> None:
    """Import `modules` once in the fork server; call it before the first stage.

    A stage also imports them, at no cost then; an import error appears there.
    """
    global _modules
    _modules = tuple(modules)
    multiprocessing.set_forkserver_preload(list(modules))


def in_process(run: Run, context: Context) -> tuple[str, str]:
    """Status and message of `run(context)` in a new process.

    The folder's log receives the process's output, and the stacks of its threads if it crashes or
    exceeds its limit.
    """
    log = context.out / LOG
    fork = multiprocessing.get_context("forkserver")
    receive, send = fork.Pipe(duplex=False)
    arguments = run, context, send, _modules
    process = fork.Process(target=_child, args=arguments, name=context.name)
    process.start()
    send.close()
    try:
        ended = wait([process.sentinel], timeout=max(0.0, context.end - time.monotonic()) + 1)
    finally:  # also ends its children, and runs when this process is interrupted
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join(timeout=10)
    with suppress(EOFError, OSError):
        if receive.poll():
            return receive.recv()
    if not ended or time.monotonic() >= context.end:
        return LATE, f"stopped at its limit; {log.name} has its stack trace"
    return FAILED, f"{_how(process.exitcode)}; see the end of {log.name}"


def _child(run: Run, context: Context, send: Connection, modules: Sequence[str]) -> None:
    os.setsid()
    with open(context.out / LOG, "a", buffering=1) as log:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, closefd=False) for number in (1, 2)
        )
        faulthandler.enable(sys.stderr)
        seconds = max(0.1, context.end - time.monotonic())
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.stderr)
        print(f"\n=== {context.name}, {context.left():.0f} s")
        send.send(_result(run, context, modules))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)  # do not wait for libraries that hang while they unload


def _result(run: Run, context: Context, modules: Sequence[str]) -> tuple[str, str]:
    try:
        for name in modules:
            importlib.import_module(name)
        return OK, one_line(run(context) or "")
    except OutOfTime as error:
        return LATE, one_line(str(error))
    except BaseException as error:  # SystemExit among them
        traceback.print_exc()
        named = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        return FAILED, one_line(f"{named}{error}")


def one_line(text: str, width: int = 300) -> str:
    """The first non-blank line of `text`, at most `width` characters."""
    first = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return first if len(first) <= width else first[: width - 1] + "…"


def _how(status: int | None) -> str:
    if status is None:
        return "its process did not exit"
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return f"its process exited with status {status}"


def finite(value: Any) -> Any:
    """A JSON value with None instead of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def replace_file(path: Path, text: str) -> None:
    """Replace the file atomically: a reader, or a crash, sees the old or the new content."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
