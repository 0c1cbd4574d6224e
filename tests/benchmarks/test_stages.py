"""Stages: order, limits, what a failure leaves, and going on in a second call."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from bench import rows, stages
from bench.stages import FAILED, LATE, OK, WAITING, Context, OutOfTime, Stage, run_stages

ROW = dict.fromkeys(rows.FIELDS)


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """A stage starts at once: what the server imports is not in its time."""
    stages.preload(["bench.stages"])
    assert run(tmp_path_factory.mktemp("first"), ("fine", 60, fine))["fine"].status == OK


def fine(context):
    print(f"printed by {context.name}")
    context.append([ROW | {"ms_p50": 1.0, "ms_p80": float("nan")}])
    return f"{len(context.rows())} rows\nand more"


def raises(context):
    context.append([ROW])
    raise RuntimeError("first line\nsecond line")


def exits(context):
    sys.exit("a bad argument")


def late(context):
    context.need(0.0, "nothing")
    context.need(1e6, "the rest")


def dies(context):
    print("its last words")
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(context):
    os._exit(3)


def hangs(context, forever=True):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (context.out / "child").write_text(str(child.pid))
    if forever:
        time.sleep(600)


def quiet(*_):
    pass


def run(out, *todo, budget=60.0, **options):
    table = [Stage(name, seconds, function, 0.0) for name, seconds, function in todo]
    found = run_stages(table, out, budget, say=options.pop("say", quiet), **options)
    return {outcome.name: outcome for outcome in found}


def recorded(out):
    return {one["name"]: one for one in json.loads((out / stages.RECORD).read_text())["stages"]}


def ended(pid):
    """Whether the process is gone, or a zombie, within a few seconds: a signal takes a moment."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


def test_a_stage_that_fails_stops_no_other(tmp_path):
    """Each ends its own way; rows, log and record have what each left."""
    said = []
    todo = [
        ("fine", 20, fine), ("raises", 20, raises), ("exits", 20, exits), ("late", 20, late),
        ("dies", 20, dies), ("leaves", 20, leaves), ("again", 20, fine),
    ]  # fmt: skip
    found = run(tmp_path, *todo, say=said.append)
    assert [(name, one.status) for name, one in found.items()] == [
        ("fine", OK), ("raises", FAILED), ("exits", FAILED), ("late", LATE), ("dies", FAILED),
        ("leaves", FAILED), ("again", OK),
    ]  # fmt: skip
    assert found["fine"].why == "1 rows" and found["again"].why == "3 rows"
    assert found["raises"].why == "first line"
    assert found["exits"].why == "SystemExit: a bad argument"
    assert found["late"].why == "skipped the rest and everything after it"
    assert "SIGSEGV" in found["dies"].why and "status 3" in found["leaves"].why
    own = stages.read_rows(tmp_path)
    assert [row["stage"] for row in own] == ["fine", "raises", "again"]
    assert own[0]["ms_p50"] == 1.0 and own[0]["ms_p80"] is None
    assert {name: one["status"] for name, one in recorded(tmp_path).items()} == {
        name: one.status for name, one in found.items()
    }
    log = (tmp_path / stages.LOG).read_text()
    places = [log.index(f"=== {name}") for name, _, _ in todo]
    assert places == sorted(places) and "printed by again" in log and "second line" in log
    assert "its last words" in log and "Fatal Python error: Segmentation fault" in log
    assert sum("at most" in one for one in said) == len(todo)


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended(tmp_path):
    """With its children, at its limit; the log says where it was."""
    began = time.monotonic()
    found = run(tmp_path, ("hangs", 3.0, hangs), ("fine", 20, fine))
    assert found["hangs"].status == LATE and "its limit" in found["hangs"].why
    assert found["fine"].status == OK and 3 <= time.monotonic() - began < 30
    log = (tmp_path / stages.LOG).read_text()
    assert "Timeout" in log and "in hangs" in log
    assert ended(int((tmp_path / "child").read_text()))


def test_children_do_not_outlive_their_stage(tmp_path):
    assert run(tmp_path, ("leaves", 20, partial(hangs, forever=False)))["leaves"].status == OK
    assert ended(int((tmp_path / "child").read_text()))


class Clock:
    """Seconds that pass only where a stage says so."""

    def __init__(self):
        self.now = 100.0
        self.contexts = []

    def __call__(self):
        return self.now

    def start(self, run, context):
        self.contexts.append(context)
        return run(context)

    def takes(self, seconds, status=OK, why=""):
        def run(context):
            self.now += seconds
            return status, why

        return run


def test_limits_and_budget(tmp_path):
    """Its own limit, or what is left; what cannot start is named, and shorter ones still run."""
    clock = Clock()
    todo = [
        Stage("one", 50, clock.takes(30)),
        Stage("two", 50, clock.takes(55, LATE), least=20),
        Stage("long", 50, clock.takes(1), least=16),
        Stage("short", 50, clock.takes(9, FAILED, "no"), least=10),
        Stage("none", 50, clock.takes(1), least=10),
    ]
    found = run_stages(todo, tmp_path, 100, start=clock.start, clock=clock, say=quiet)
    assert [(one.name, one.status, one.seconds, one.limit) for one in found] == [
        ("one", OK, 30, 50), ("two", LATE, 55, 50), ("long", WAITING, 0, 50),
        ("short", FAILED, 9, 15), ("none", WAITING, 0, 50),
    ]  # fmt: skip
    assert found[2].why == "15 s left, needs 16 s" and found[3].why == "no"
    assert [context.ok for context in clock.contexts] == [set(), {"one"}, {"one"}]
    for context, limit in zip(clock.contexts, (50, 50, 15), strict=True):
        assert limit - 5 < context.left() <= limit - 3 and context.end - context.deadline == 3


def test_a_second_call_goes_on(tmp_path):
    """What ended well is not run again, what did not is; `only` leaves the rest as it was."""
    clock, ran = Clock(), []

    def stage(name, *results):
        left = list(results)

        def run(context):
            ran.append(name)
            return left.pop(0), ""

        return Stage(name, 10, run)

    todo = [stage("a", OK), stage("b", FAILED, OK), stage("c", LATE, LATE), stage("d", OK)]
    options = {"start": clock.start, "clock": clock, "say": quiet}
    first = run_stages(todo, tmp_path, 100, only=["a", "b", "c"], **options)
    assert [one.status for one in first] == [OK, FAILED, LATE, WAITING]
    second = run_stages(todo, tmp_path, 100, **options)
    assert [one.status for one in second] == [OK, OK, LATE, OK]
    assert ran == ["a", "b", "c", "b", "c", "d"]
    assert stages.recorded(tmp_path) == second
    assert clock.contexts[-1].ok == {"a", "b"}


def test_files_are_there_while_a_stage_runs(tmp_path):
    """A machine that is taken away leaves the record and the summary of what was done."""
    clock, seen = Clock(), []

    def look(context):
        seen.append({name: one["status"] for name, one in recorded(tmp_path).items()})
        seen.append((tmp_path / stages.SUMMARY).read_text())
        return OK, ""

    todo = [Stage("one", 10, clock.takes(1)), Stage("two", 10, look)]
    run_stages(
        todo, tmp_path, 100, start=clock.start, clock=clock, say=quiet,
        summarize=lambda found: " ".join(one.status for one in found),
    )  # fmt: skip
    assert seen == [{"one": OK, "two": stages.RUNNING}, "ok running\n"]
    assert (tmp_path / stages.SUMMARY).read_text() == "ok ok\n"


@pytest.mark.parametrize("text, line", [("", ""), ("\n a\nb", "a"), ("x" * 400, "x" * 299 + "…")])
def test_one_line(text, line):
    assert stages.one_line(text) == line


def test_a_deadline_that_is_near(tmp_path):
    context = Context("name", tmp_path, time.monotonic() + 5, time.monotonic() + 8)
    context.need(1, "this")
    with pytest.raises(OutOfTime, match="skipped this and everything after it"):
        context.need(6, "this")
