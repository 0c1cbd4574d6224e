"""Tuning tables: measurements on a GPU in JSON; the user's come before the shipped ones.

A table has one kind and one GPU: {section: {key: entry}}. Kind "tiles" says which tile a Triton
kernel runs with (`kernels.config_select`), kind "impls" which implementation an op runs on
(`dispatch.auto_impl`). The user's tables are `<cache>/<kind>/<gpu>.json`, where <cache> is
RESNET_FAST_CACHE or ~/.cache/resnet_fast (XDG_CACHE_HOME is honoured); shipped tables are
`measured/<kind>/<gpu>.json`. RESNET_FAST_AUTOTUNE=1 measures what is in no table and adds it to the
user's.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import settings
from .graph_timing import cold_ms

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

SHIPPED = Path(__file__).parents[1] / "measured"
ROUNDS = 10  # of a measurement
_writing = threading.Lock()
_watches: list[Callable[[str, str, str, str], None]] = []


def slug(gpu: str) -> str:
    """The name of a GPU as a file's: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_table(kind: str, gpu: str) -> Path:
    """The user's table of a kind for a GPU."""
    base = settings.CACHE.read()
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = Path(home) / "resnet_fast"
    return base / kind / f"{slug(gpu)}.json"


def shipped_table(kind: str, gpu: str) -> Path:
    """The table of a kind that is shipped for a GPU, there or not."""
    return SHIPPED / kind / f"{slug(gpu)}.json"


def sections(kind: str, gpu: str, section: str) -> Iterator[dict[str, Any]]:
    """The section of the user's table, then of the shipped one; empty where there is none."""
    for path in (user_table(kind, gpu), shipped_table(kind, gpu)):
        yield read(path).get(section, {})


def read(path: Path) -> dict[str, Any]:
    """The table at `path`; empty where none can be read. RuntimeError names a damaged file."""
    try:
        text = path.read_text()
    except OSError:  # none there, or a home that is no folder or not ours
        return {}
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{path} is not a valid tuning table ({error}); delete it") from None
    return table


def write(path: Path, section: str, key: str, entry: dict[str, Any]) -> None:
    """Add or replace one entry of the table at `path`; the file is whole at every moment.

    Processes and threads that write at once wait for each other, so no entry is lost.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        table = read(path)
        table.setdefault(section, {})[key] = entry
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".json", delete=False
        ) as file:
            json.dump(table, file, indent=1, sort_keys=True)
        os.replace(file.name, path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One thread of one process at a time, by a lock file beside the table."""
    with _writing, path.with_suffix(".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def searching() -> bool:
    """Whether what is in no table is to be measured."""
    return settings.AUTOTUNE.read()


def capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def microseconds(run: Callable[[], Any]) -> float:
    """Median time of run() on the current GPU as in a model: without the host, with a cold L2
    cache (`graph_timing`). Not while a graph is captured.
    """
    return 1e3 * statistics.median(cold_ms(run, ROUNDS))


def unsettled() -> bool:
    """Whether a lookup may also tune or report a miss."""
    return bool(_watches) or searching()


def missed(kind: str, gpu: str, section: str, key: str) -> None:
    """Report to every `watching` caller that no table has this entry."""
    for watch in _watches:
        watch(kind, gpu, section, key)


@contextmanager
def watching(watch: Callable[[str, str, str, str], None]) -> Iterator[None]:
    """Within it watch(kind, gpu, section, key) is called for every entry that no table has."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
