"""CPU features, and a workaround for CPUs that report AMX but cannot run it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
ISAS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16",
    "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
TILE_LEAF = 0x1D  # CPUID leaf with the shapes of AMX tiles
WITHOUT_AMX = "AVX512_CORE_FP16"


def name() -> str:
    """The CPU's model name as the system reports it."""
    return _field("model name", "cpu model") or platform.processor() or platform.machine()


def isas() -> list[str]:
    """The CPU's instruction sets among ISAS; empty on other systems than Linux."""
    flags = (_field("flags", "features") or "").split()
    return [isa for isa in ISAS if isa in flags]


def has_unusable_amx() -> bool:
    """Whether the CPU reports AMX but has no CPUID leaf with the shapes of tiles.

    This is so in virtual machines that hide the leaf. No tile is valid there, and the first AMX
    instruction is illegal.
    """
    return "amx_tile" in isas() and int(_field("cpuid level") or TILE_LEAF) < TILE_LEAF


def keep_onednn_from_unusable_amx() -> bool:
    """Limit PyTorch's oneDNN to AVX-512 if AMX is unusable; return whether it is.

    oneDNN up to 3.12 (torch 2.13) checks only the reported flag, and its first bf16 matrix product
    kills the process (uxlfoundation/oneDNN#5689). oneDNN reads ONEDNN_MAX_CPU_ISA at its first
    computation; a value set by the user is kept.
    """
    unusable = has_unusable_amx()
    if unusable:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", WITHOUT_AMX)
    return unusable


def _field(*keys: str) -> str | None:
    """Value of the first processor for one of `keys` (lower case)."""
    try:
        with CPUINFO.open() as file:
            text = file.read(16384)  # the first processor; the others are equal
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in keys:
            return value.strip()
    return None
