"""Stages: one after another within a budget, each in a process of its own and with its own limit.

A fault on a GPU poisons the process that it happens in, a kernel may hang, a compiler may take
minutes. So a stage ends alone: what goes wrong is written down and the next one starts. A folder
holds all of it, kept up to date while the stages run, so that a machine which is taken away leaves
what it measured:

    stages.json   name, status, seconds, limit and a line of each stage (`Outcome`)
    rows.jsonl    the rows, as they come (`Context.append`)
    log.txt       what the stages print, and where Python was when one ended badly
    summary.txt   one table

Processes come from a fork server that has imported torch and the benchmarks and has not touched
CUDA: a stage starts in milliseconds.
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
GRACE = 3.0  # seconds between a stage's deadline and the end of its process, a quarter at most


class OutOfTime(Exception):
    """Raised by a stage that ends because its deadline is near; says what it left out."""


@dataclass(frozen=True)
class Context:
    """What a stage is given: where its results go and when it has to end (`time.monotonic`).

    By its deadline it should have ended, at `end` its process is ended. ok: the names of the stages
    that have ended well.
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
            raise OutOfTime(f"left out {what} and what follows")

    def append(self, found: Iterable[rows.Row]) -> None:
        """Append rows to the folder's file at once, with the stage's name; NaN becomes None."""
        rows.append(self.out / ROWS, [{**finite(row), "stage": self.name} for row in found])

    def rows(self) -> list[rows.Row]:
        """All rows of the folder."""
        return read_rows(self.out)


Run = Callable[[Context], "str | None"]


@dataclass(frozen=True)
class Stage:
    """A part of a run: `run(context)` gives a line to show, and raises where it fails.

    seconds: its limit. least: with fewer left of the budget it does not start.
    """

    name: str
    seconds: float
    run: Run
    least: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: OK, FAILED, LATE, WAITING (RUNNING in the file meanwhile), and a line."""

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
    """Run `stages` in order, as many as `budget` seconds allow; their outcomes, also in `out`.

    What `out` says has ended well is not run again. `only`: names of the stages to run, () for all.
    summarize: gives the text of SUMMARY, which is written after each stage. start: runs a stage and
    gives its status and line (`in_process`). No exception of a stage gets out.
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
            except (ValueError, KeyError) as error:  # a row that was cut: no reason to stop
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
    """Status, seconds and why in one line."""
    text = f"{outcome.status} after {outcome.seconds:.1f} s"
    return f"{text}: {outcome.why}" if outcome.why else text


def recorded(out: Path) -> list[Outcome]:
    """The outcomes in the folder; [] where it has none."""
    try:
        return [Outcome(**one) for one in json.loads((out / RECORD).read_text())["stages"]]
    except FileNotFoundError:
        return []


def read_rows(out: Path) -> list[rows.Row]:
    """The rows in the folder; [] where it has none."""
    path = out / ROWS
    return rows.read([path]) if path.exists() else []


_modules: tuple[str, ...] = ()


def preload(modules: Sequence[str]) -> None:
    """Import `modules` once in the server that stages are forked from; before the first stage.

    A stage imports them too, which takes no time then and is where one that does not import shows.
    """
    global _modules
    _modules = tuple(modules)
    multiprocessing.set_forkserver_preload(list(modules))


def in_process(run: Run, context: Context) -> tuple[str, str]:
    """Status and line of `run(context)` in a new process.

    What the process prints is appended to the folder's log, and so are the stacks of its threads
    where it is ended or crashes.
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
    finally:  # its own children too, and all of it when this process is interrupted
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join(timeout=10)
    with suppress(EOFError, OSError):
        if receive.poll():
            return receive.recv()
    if not ended or time.monotonic() >= context.end:
        return LATE, f"ended at its limit; where it was stands in {log.name}"
    return FAILED, f"{_how(process.exitcode)}; its last lines stand in {log.name}"


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
        os._exit(0)  # a library that hangs while it is unloaded is not worth the wait


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
    """The first line of `text` that has words, `width` characters of it at most."""
    first = next((part.strip() for part in text.splitlines() if part.strip()), "")
    return first if len(first) <= width else first[: width - 1] + "…"


def _how(status: int | None) -> str:
    if status is None:
        return "its process did not end"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def finite(value: Any) -> Any:
    """`value` of JSON's kinds with None in place of NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def replace_file(path: Path, text: str) -> None:
    """Write the file as a whole: a reader, or a machine that stops, finds the old or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
