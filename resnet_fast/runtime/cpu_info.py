"""What the processor says of itself, and the one claim of it that PyTorch must not believe."""

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
TILE_LEAF = 0x1D  # of CPUID: the shapes that AMX tiles may have
WITHOUT_AMX = "AVX512_CORE_FP16"


def name() -> str:
    """The processor's model as the system gives it."""
    return _field("model name", "cpu model") or platform.processor() or platform.machine()


def isas() -> list[str]:
    """The instruction sets of interest that the processor has; empty where Linux is not asked."""
    flags = (_field("flags", "features") or "").split()
    return [isa for isa in ISAS if isa in flags]


def has_unusable_amx() -> bool:
    """Whether the processor announces AMX tiles and has no CPUID leaf to tell their shapes.

    So do virtual machines that hide the leaf: there is no valid tile, and the first instruction
    on one is illegal.
    """
    return "amx_tile" in isas() and int(_field("cpuid level") or TILE_LEAF) < TILE_LEAF


def keep_onednn_from_unusable_amx() -> bool:
    """Tell PyTorch's oneDNN to do without AMX where it cannot be used; whether that is so here.

    oneDNN up to 3.12 (torch 2.13) looks at the announcement alone, and its first bf16 product of
    matrices kills the process (uxlfoundation/oneDNN#5689). ONEDNN_MAX_CPU_ISA, which it reads when
    it first computes, wins where the user has set it.
    """
    unusable = has_unusable_amx()
    if unusable:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", WITHOUT_AMX)
    return unusable


def _field(*keys: str) -> str | None:
    """The first processor's value of one of `keys` (lower case)."""
    try:
        with CPUINFO.open() as file:
            text = file.read(16384)  # of one processor; the rest say the same
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in keys:
            return value.strip()
    return None
