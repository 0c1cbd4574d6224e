"""Every environment variable of resnet_fast: type, default, range and error.

`resnet-fast env` prints them. Variables marked "at load" are read once, when the native kernels
load (`native`); the others are read at each use. RESNET_FAST_BUILD belongs to setup.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_MIB = (2**63 - 1) >> 20


class BadSetting(ValueError):
    """An environment variable has an invalid value; the message names both."""


@dataclass(frozen=True)
class Setting:
    """One environment variable; an empty one counts as unset."""

    variable: str
    default: Any
    expected: str
    parse: Callable[[str], Any]
    what: str

    def read(self) -> Any:
        """The value, or the default. BadSetting names the variable and the valid values."""
        text = os.environ.get(self.variable)
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError:
            raise BadSetting(f"{self.variable}: expected {self.expected}, got {text!r}") from None

    def prefer(self, text: str) -> None:
        """Set the variable for this process and its children, unless it is set."""
        if not os.environ.get(self.variable):
            os.environ[self.variable] = text

    @contextmanager
    def set_to(self, text: str) -> Iterator[None]:
        """Context in which the variable is `text`; not for variables read at load."""
        before = os.environ.get(self.variable)
        os.environ[self.variable] = text
        try:
            yield
        finally:
            del os.environ[self.variable]
            if before is not None:
                os.environ[self.variable] = before


def _word(variable: str, words: tuple[str, ...], what: str, default: str | None = None) -> Setting:
    """A setting that is one of `words`; the first is the default, or `default`."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    expected = f"{', '.join(words[:-1])} or {words[-1]}"
    return Setting(variable, default if default is not None else words[0], expected, parse, what)


def _flag(variable: str, what: str) -> Setting:
    return Setting(variable, False, "0 or 1", lambda text: bool(("0", "1").index(text)), what)


def _mebibytes(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MOST_MIB:
        raise ValueError
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError
    return int(text)


TRACE = _flag("RESNET_FAST_TRACE", "print once per kind of call which implementation runs an op")
AUTOTUNE = _flag("RESNET_FAST_AUTOTUNE", "measure on a GPU what no tuning table has, and save it")
CACHE = Setting(
    "RESNET_FAST_CACHE", None, "a folder", Path, "folder of the user's tuning tables "
    "(default: resnet_fast in XDG_CACHE_HOME or ~/.cache)",
)  # fmt: skip
TRITON_CONV = _word(
    "RESNET_FAST_TRITON_CONV", ("auto", "fused", "library"),
    "convolutions of the Triton implementation: fused kernels, cuDNN, or the faster one",
)  # fmt: skip
CUDA_CONV = _word(
    "RESNET_FAST_CUDA_CONV", ("cutlass", "auto", "cudnn"),
    "inference convolutions of the native CUDA kernels, at load: cutlass raises an error for "
    "channels_last 16-bit convolutions that CUTLASS does not support, auto gives them to cuDNN",
)  # fmt: skip
CPU_CONV = _word(
    "RESNET_FAST_CPU_CONV", ("auto", "tiles", "winograd", "onednn"),
    "convolutions of the native CPU kernels, at load",
)  # fmt: skip
CPU_ISA = _word(
    "RESNET_FAST_CPU_ISA", ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"),
    "instruction set of the native CPU kernels, at load (default: the highest of the CPU)", "",
)  # fmt: skip
CPU_CACHE_MB = Setting(
    "RESNET_FAST_CPU_CACHE_MB", None, f"a number of MiB from 0 to {MOST_MIB}", _mebibytes,
    "limit of the CPU kernels' cache, at load (default: 1/8 of the memory)",
)  # fmt: skip
BENCH_BATCH = Setting(
    "RESNET_FAST_BENCH_BATCH", 16, "a positive integer", _positive, "batch size of bench/ops.py"
)
BENCH_DEVICE = _word("RESNET_FAST_BENCH_DEVICE", ("cpu", "cuda"), "device of bench/ops.py")
BENCH_IMPL = _word(
    "RESNET_FAST_BENCH_IMPL", ("auto", "reference", "native", "triton"), "impl of bench/ops.py"
)
ALL = (
    TRACE, AUTOTUNE, CACHE, TRITON_CONV, CUDA_CONV, CPU_CONV, CPU_ISA, CPU_CACHE_MB,
    BENCH_BATCH, BENCH_DEVICE, BENCH_IMPL,
)  # fmt: skip


def native() -> dict[str, Any]:
    """Settings of the native kernels at load: arguments of `resnet_fast._C.configure`."""
    return {
        "cpu_isa": CPU_ISA.read(),
        "cpu_conv": CPU_CONV.read(),
        "cpu_cache_mb": CPU_CACHE_MB.read(),
        "cuda_conv": CUDA_CONV.read(),
    }
