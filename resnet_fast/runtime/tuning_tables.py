"""Tuning tables: GPU measurements as JSON. The user's tables have priority over shipped ones.

A table is for one kind and one GPU: {section: {key: entry}}. Kind "tiles" selects the tile of a
Triton kernel (`kernels.config_select`), kind "impls" the implementation of an op
(`dispatch.auto_impl`). The user's tables are `<cache>/<kind>/<gpu>.json`, where <cache> is
RESNET_FAST_CACHE, or resnet_fast in XDG_CACHE_HOME or ~/.cache. Shipped tables are
`measured/<kind>/<gpu>.json`. With RESNET_FAST_AUTOTUNE=1, resnet_fast measures missing entries and
adds them to the user's table.
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
    """File name for a GPU: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_table(kind: str, gpu: str) -> Path:
    """Path of the user's table of a kind for a GPU."""
    base = settings.CACHE.read()
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        base = Path(home) / "resnet_fast"
    return base / kind / f"{slug(gpu)}.json"


def shipped_table(kind: str, gpu: str) -> Path:
    """Path of the shipped table of a kind for a GPU; it need not exist."""
    return SHIPPED / kind / f"{slug(gpu)}.json"


def sections(kind: str, gpu: str, section: str) -> Iterator[dict[str, Any]]:
    """The section of the user's table, then of the shipped one; empty if missing."""
    for path in (user_table(kind, gpu), shipped_table(kind, gpu)):
        yield read(path).get(section, {})


def read(path: Path) -> dict[str, Any]:
    """The table at `path`, empty if it cannot be read. RuntimeError names a damaged file."""
    try:
        text = path.read_text()
    except OSError:  # missing, or the home folder is missing or not readable
        return {}
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{path} is not a valid tuning table ({error}); delete it") from None
    return table


def write(path: Path, section: str, key: str, entry: dict[str, Any]) -> None:
    """Add or replace one entry of the table at `path`, atomically.

    Concurrent writers (processes and threads) wait for each other, so no entry is lost.
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
    """Lock for one thread of one process, by a lock file in the folder of the table."""
    with _writing, path.with_suffix(".lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def searching() -> bool:
    """Whether to measure entries that no table has."""
    return settings.AUTOTUNE.read()


def capturing() -> bool:
    """Whether a CUDA graph is being captured; nothing can be measured then."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def microseconds(run: Callable[[], Any]) -> float:
    """Median time of run() on the current GPU in µs, without host time and with a cold L2 cache.

    See `graph_timing`. Not during graph capture.
    """
    return 1e3 * statistics.median(cold_ms(run, ROUNDS))


def watched() -> bool:
    """Whether a caller of `watching` must hear of every lookup that misses."""
    return bool(_watches)


def missed(kind: str, gpu: str, section: str, key: str) -> None:
    """Tell every `watching` caller that no table has this entry."""
    for watch in _watches:
        watch(kind, gpu, section, key)


@contextmanager
def watching(watch: Callable[[str, str, str, str], None]) -> Iterator[None]:
    """Context in which watch(kind, gpu, section, key) is called for every missing entry."""
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
