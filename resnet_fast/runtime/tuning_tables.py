"""Tuning tables: GPU measurements as JSON. The user's tables have priority over shipped ones.

A table is for one kind and one GPU: {section: {key: entry}}. Kind "tiles" selects the tile of a
Triton kernel (`kernels.config_select`), kind "impls" the implementation of an op
(`dispatch.auto_impl`). The user's tables are `<cache>/<kind>/<gpu>.json`, where <cache> is
RESNET_FAST_CACHE, or resnet_fast in XDG_CACHE_HOME or ~/.cache. Shipped tables are
`measured/<kind>/<gpu>.json`. With RESNET_FAST_AUTOTUNE=1, resnet_fast measures missing entries and
adds them to the user's table. A table that is not valid is ignored whole, with a warning.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import settings
from .files import locked, opened, reason, replacing
from .graph_timing import cold_ms

SHIPPED = Path(__file__).parents[1] / "measured"
ROUNDS = 10  # of a measurement
LARGEST = 16 << 20  # bytes of a table; shipped ones have about 10 KiB
_writing = threading.Lock()
_read: dict[Path, tuple[Any, dict[str, Any]]] = {}
"""Path → state of the file, and the table; empty for a damaged file."""
_unsaved: set[Path] = set()
"""Tables that could not be written, which a warning has said."""
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
    """The table at `path`, in a folder named after its kind; the caller must not change it.

    Empty if the file is missing or damaged. A damaged file gives one warning until it changes.
    """
    try:
        found = os.stat(path)
    except OSError:  # missing, or the home folder is missing or not readable
        return {}
    state = found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
    known = _read.get(path)
    if known is None or known[0] != state:
        table, wrong = _load(path)
        known = _read[path] = state, table
        if wrong:
            _warn(f"{wrong}; resnet_fast ignores it")
    return known[1]


def write(path: Path, section: str, key: str, entry: dict[str, Any]) -> None:
    """Add or replace one entry of the table at `path`, atomically.

    Concurrent writers (processes and threads) wait for each other, so no entry is lost. A damaged
    table is moved to `<name>.damaged`. If the table cannot be written, one warning says so.
    """
    try:
        with _writing, locked(path.with_suffix(".lock")):
            table, wrong = _load(path)
            if wrong:
                damaged = path.with_name(f"{path.name}.damaged")
                os.replace(path, damaged)
                _warn(f"{wrong}; resnet_fast moved it to {damaged}")
            table.setdefault(section, {})[key] = entry
            with replacing(path, "w") as file:
                json.dump(table, file, indent=1, sort_keys=True)
            _read.pop(path, None)
    except OSError as error:
        if path not in _unsaved:
            _unsaved.add(path)
            _warn(f"{path}: measurements not saved ({reason(error)}); only this process uses them")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _load(path: Path) -> tuple[dict[str, Any], str]:
    """The table at `path`, and a message if it is damaged; a damaged or missing one is empty."""
    try:
        with opened(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST:
                raise ValueError(f"larger than {LARGEST >> 20} MiB")
            table = json.loads(file.read().decode())
        _check(table, path.parent.name)
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{path}: not a valid tuning table ({reason(error)})"
    return table, ""


def _check(table: Any, kind: str) -> None:
    """ValueError says what is wrong with a table of a kind."""
    fields = FIELDS[kind]
    required = next(iter(fields))
    for section, entries in _object(table, "table").items():
        for key, entry in _object(entries, f"{section!r:.40}").items():
            where = f"{section!r:.40}, {key!r:.80}"
            if required not in _object(entry, where):
                raise ValueError(f"{where}: {required} is missing")
            for field, value in entry.items():
                if not fields.get(field, _is_scalar)(value):
                    raise ValueError(f"{where}: {field!r:.40} is not valid")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object")
    return value


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, dict | list)


def _is_config(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_time(value: Any) -> bool:
    """Whether it is microseconds, as written: at least 0.001, and no more than 12 days."""
    return type(value) in (int, float) and 1e-3 <= value <= 1e12


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_time, value.values()))


FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "tiles": {"config": _is_config, "us": _is_time},
    "impls": {"impl": _is_name, "us": _are_times, "bytes": _is_count, "flop": _is_count},
}
"""Kind → field of an entry → whether a value of it is valid. The first field is required."""


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
