"""The row format: one JSON object per measurement, with versions, machine, commit and date."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FIELDS = (
    "benchmark", "model", "mode", "batch", "dtype", "layout", "device", "provider",
    "images_per_s", "ms_p20", "ms_p50", "ms_p80", "peak_mb", "speedup_vs_eager",
    "torch", "triton", "cuda", "cpu_or_gpu", "threads", "git_sha", "date",
)  # fmt: skip
EXTRA_FIELDS = ("image_size", "rounds", "isa", "impl", "optimizer", "graph", "resnet_fast")

LAYER_FIELDS = ("layer", "launches", "gb_per_s", "tflop_per_s", "percent_of_floor", "launch_us")

Row = dict[str, Any]


def row(facts: Mapping[str, Any], **values: Any) -> Row:
    """A row in the order of FIELDS, then EXTRA_FIELDS; floats to 4 significant digits or more.

    Raises ValueError for a field that is missing or unknown.
    """
    given = {**facts, **values}
    missing = [name for name in (*FIELDS, *EXTRA_FIELDS) if name not in given]
    unknown = [name for name in given if name not in (*FIELDS, *EXTRA_FIELDS)]
    if missing or unknown:
        raise ValueError(f"row: missing fields {missing}, unknown fields {unknown}")
    return {name: _rounded(given[name]) for name in (*FIELDS, *EXTRA_FIELDS)}


def layer_row(facts: Mapping[str, Any], **values: Any) -> Row:
    """A row of one layer or machine limit: as `row`, with LAYER_FIELDS.

    Fields that are not given are None. Raises ValueError for an unknown field.
    """
    given = {**facts, **values}
    fields = (*FIELDS, *EXTRA_FIELDS, *LAYER_FIELDS)
    unknown = [field for field in given if field not in fields]
    if unknown:
        raise ValueError(f"layer_row: unknown fields {unknown}")
    return {field: _rounded(given.get(field)) for field in fields}


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def facts(device: torch.device) -> Row:
    """Fields shared by all rows of one run: versions, machine, commit, time (UTC)."""
    return {
        "device": device.type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cpu_or_gpu": device_name(device),
        "threads": torch.get_num_threads(),
        "git_sha": git_sha(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "isa": instruction_set(device),
        "resnet_fast": _resnet_fast_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU model that the system reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_set(device: torch.device) -> str:
    """`sm_90` and the like on CUDA; on a CPU the widest vector instructions that PyTorch uses."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def git_sha() -> str | None:
    """The commit of the working tree, `-dirty` if a tracked file differs; None without git."""
    sha = _git("rev-parse", "--short=12", "HEAD")
    if not sha:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{sha}-dirty" if changed else sha


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _resnet_fast_version() -> str | None:
    import resnet_fast

    return getattr(resnet_fast, "__version__", None)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append `rows` to the JSON-lines file `path`; creates it and its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for one in rows:
            file.write(json.dumps(one) + "\n")


class Collection:
    """The rows of a run. They are appended to `out` immediately, so a later error loses none."""

    def __init__(self, command: str, out: Path | None) -> None:
        self.command, self.out = command, out
        self.found: list[Row] = []
        self.failed: list[str] = []

    def add(self, more: list[Row]) -> None:
        """Add the rows of a finished part."""
        if self.out is not None:
            append(self.out, more)
        self.found += more

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it an error ends only this part, and is recorded."""
        try:
            yield
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {error}")

    def status(self) -> int:
        """Print the failures to stderr; 1 if there are any, else 0."""
        for line in self.failed:
            print(f"{self.command}: {line}", file=sys.stderr)
        return int(bool(self.failed))


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of JSON-lines files, in order. Raises ValueError with the file and line of a bad row."""
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                one = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: expected a JSON object: {error}") from None
            missing = [name for name in FIELDS if name not in one]
            if missing:
                raise ValueError(f"{path}:{number}: the row has no {', '.join(missing)}")
            rows.append(one)
    return rows
