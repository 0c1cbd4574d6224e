"""Read a compiled kernel's machine code: registers, spills, tensor-core instructions, loads.

The tools come with Triton and need no GPU. Used for the Triton kernels (`bench.compile`) and those
of csrc/cuda (`bench.cuda`).
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
    """The compiled code of one kernel. local: bytes of spills and stack per thread."""

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
        """Fill in the fields from one kernel's resource usage and disassembly."""
        used = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
        self.registers, self.shared = int(used["REG"]), int(used["SHARED"])
        if re.search(r"\bSTL\b", code):  # a subroutine's stack frame alone is not a spill
            self.local = int(used["STACK"]) + int(used["LOCAL"])
        found = [name for name in TENSOR_CORES if re.search(rf"\b{name}\b", code)]
        self.tensor_cores = found[0] if found else ""
        loaded = re.findall(r"\bLDG\.E(?:\.[A-Z]\w*)*(?:\.(64|128))?", code)
        widths = [int(bits or 32) for bits in loaded]
        loads = [short for name, short in LOADS.items() if re.search(rf"\b{name}\b", code)]
        self.loads = "+".join(loads + ([f"ld{max(widths)}"] if widths else []))


def tool(name: str, *arguments: Any) -> str:
    """The output of a CUDA tool that comes with Triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [os.fspath(part) for part in (folder / name, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout


def write(path: Path | None, rows: Sequence[Code]) -> None:
    """Write the rows to `path` as JSON, unless it is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
