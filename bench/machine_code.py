"""What a compiled kernel's machine code says: registers, spills, tensor-core instructions, loads.

Read by the tools that Triton carries, which need no GPU; for Triton's kernels (`bench.compile`)
and for those of csrc/cuda (`bench.cuda`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TENSOR_CORES = ("HGMMA", "UTCHMMA", "HMMA", "DMMA", "FFMA")
LOADS = {"UTMALDG": "TMA", "LDGSTS": "cp.async"}


@dataclass
class Code:
    """What became of one kernel. local: bytes of spills and stack a thread."""

    kernel: str
    arch: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    tensor_cores: str = ""
    loads: str = ""
    seconds: float = 0.0
    failure: str = ""

    def read(self, usage: str, code: str) -> None:
        """Fill in what one kernel's resource usage and disassembly show."""
        used = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
        self.registers, self.shared = int(used["REG"]), int(used["SHARED"])
        if re.search(r"\bSTL\b", code):  # a subroutine's frame alone is no spill
            self.local = int(used["STACK"]) + int(used["LOCAL"])
        found = [name for name in TENSOR_CORES if re.search(rf"\b{name}\b", code)]
        self.tensor_cores = found[0] if found else ""
        loaded = re.findall(r"\bLDG\.E(?:\.[A-Z]\w*)*(?:\.(64|128))?", code)
        widths = [int(bits or 32) for bits in loaded]
        loads = [short for name, short in LOADS.items() if re.search(rf"\b{name}\b", code)]
        self.loads = "+".join(loads + ([f"ld{max(widths)}"] if widths else []))


def tool(name: str, *arguments: Any) -> str:
    """What one of the CUDA tools that Triton carries prints."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [os.fspath(part) for part in (folder / name, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout


def write(path: Path | None, rows: Sequence[Code]) -> None:
    """The rows as JSON, where a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
