"""`python tests/support/shards.py --out DIR NAME [pytest options]`: tests in N processes at once.

Most of the time of a GPU test is the compilation of its kernels. A shard that fails, crashes or is
out of time hides no other: DIR/NAME.log has every shard's output when it is done, DIR/NAME.txt a
line a shard and every test that did not pass. Exit status 1 when a shard failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

NO_TESTS = 5  # pytest's status where a shard has none


def main(argv: Sequence[str]) -> int:
    """Run the shards; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=8, metavar="N")
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of them (540)")
    parser.add_argument("name", help="of the two files")
    args, options = parser.parse_known_args(argv)
    if args.jobs < 1:
        parser.error("--jobs: expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    return run(args.out, args.name, args.jobs, args.seconds, options)


def run(out: Path, name: str, jobs: int, seconds: float, options: Sequence[str]) -> int:
    """The shards at once, each ended after `seconds`."""
    end, failed, said = time.monotonic() + seconds, False, []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(jobs)]
        started = [start(log, i, jobs, options) for i, log in enumerate(logs)]
        with open(out / f"{name}.log", "w") as log:
            for i, (process, path) in enumerate(zip(started, logs, strict=True)):
                status = wait(process, end)
                text = path.read_text(errors="replace")
                log.write(f"=== shard {i}/{jobs}: {status}\n{text}\n")
                log.flush()
                failed = failed or status not in ("status 0", f"status {NO_TESTS}")
                last = (text.strip().splitlines() or ["no output"])[-1]
                said.append(f"shard {i}/{jobs}: {status}: {last.strip('= ')}")
                said += re.findall(r"^(?:FAILED|ERROR) .*$", text, re.MULTILINE)
                (out / f"{name}.txt").write_text("\n".join(said) + "\n")
    print("\n".join(said))
    return int(failed)


def start(log: Path, i: int, jobs: int, options: Sequence[str]) -> subprocess.Popen:
    """Shard i, in a process group of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--shard", f"{i}/{jobs}", *options]
    with open(log, "w") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def wait(process: subprocess.Popen, end: float) -> str:
    """How the shard ended; what it started ends with it."""
    try:
        process.wait(max(0.0, end - time.monotonic()))
        status = f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        status = "out of time"
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
