"""`resnet-fast env`: the environment, for the start of a bug report.

Versions, hardware, which implementations are live and why the others are not, and which one
`impl="auto"` takes for every op, device and dtype. Works with nothing built and without Triton.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..dispatch import backends, ops
from ..runtime import cpu_info, settings
from ..spec.dtypes import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `resnet-fast env`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the environment; returns 0."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def collect() -> dict[str, Any]:
    """The environment as plain values: versions, build, cpu, gpus, settings,
    implementations, auto.
    """
    return {
        "versions": {
            "resnet_fast": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "triton": _package("triton"),
            "compiler": _first_line(os.environ.get("CXX", "c++"), "--version"),
            "nvcc": _first_line("nvcc", "--version"),
        },
        "build": backends.build_info(),
        "cpu": {
            "name": cpu_info.name(),
            "isas": cpu_info.isas(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
            "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
            "unusable_amx": cpu_info.has_unusable_amx(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "kept": backends.kept(),
        },
        "gpus": _gpus(),
        "settings": _settings(),
        "implementations": [vars(row) for row in backends.status()],
        "auto": _auto(),
    }


def _settings() -> dict[str, Any]:
    """The value of every environment variable; paths as text."""
    values = {setting.variable: setting.read() for setting in settings.ALL}
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = round(p.total_memory / 2**30, 1)
        gpus.append({"name": p.name, "sm": f"{p.major}.{p.minor}", "memory_gib": memory})
    return gpus


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(command: str, *arguments: str) -> str | None:
    """The version line that a program prints; None if the program is missing or fails."""
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line for line in done.stdout.splitlines() if any(c.isdigit() for c in line)]
    releases = [line for line in lines if "release" in line]  # nvcc prints its copyright first
    return (releases or lines or [None])[0]


def _auto() -> list[dict[str, Any]]:
    """What "auto" takes per op, device and dtype, and why it refuses those it prefers."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device in devices:
        for dtype in DTYPES:
            for op in ops.NAMES:
                takes = backends.chosen(op, "auto", device, dtype)
                order = backends.preference(device)
                before = order[: order.index(takes)]
                refused = {impl: backends.refusal(impl, op, device, dtype) for impl in before}
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    {"device": device, "dtype": name, "op": op, "takes": takes, "not": refused}
                )
    return rows


def text(found: dict[str, Any]) -> str:
    """`collect()` formatted for the terminal."""
    versions, host, build = found["versions"], found["cpu"], found["build"]
    cuda = f"CUDA {versions['torch_cuda']}" if versions["torch_cuda"] else "without CUDA"
    lines = [
        ("resnet_fast", versions["resnet_fast"]),
        ("python", f"{versions['python']}, {versions['platform']}"),
        ("torch", f"{versions['torch']}, {cuda}"),
        ("triton", versions["triton"] or "not installed"),
        ("compiler", versions["compiler"] or "none found"),
        *([("nvcc", versions["nvcc"])] if versions["nvcc"] else []),
        ("CPU", f"{host['name']}, {host['cores']} cores, {host['threads']} threads"),
        ("ISAs", ", ".join(host["isas"]) or host["torch_isa"]),
        *_kept_lines(host),
        *_onednn_lines(host),
        *[
            (f"GPU {i}", f"{gpu['name']}, sm {gpu['sm']}, {gpu['memory_gib']} GiB")
            for i, gpu in enumerate(found["gpus"])
        ],
        *([] if found["gpus"] else [("GPU", "none that torch.cuda can use")]),
    ]
    parts = [_columns(lines)]
    parts.append("native extension\n" + _columns(_indented(_build_lines(build))))
    values = [
        (name, "default" if value in (None, "") else str(value))
        for name, value in found["settings"].items()
    ]
    parts.append("settings\n" + _columns(_indented(values)))
    rows = [
        (row["impl"], row["device"], "live" if row["live"] else "not live", row["why"])
        for row in found["implementations"]
    ]
    parts.append("implementations\n" + _columns(_indented(rows)))
    parts.append('impl="auto" takes\n' + _columns(_indented(auto_lines(found["auto"]))))
    return "\n\n".join(parts)


def _kept_lines(host: dict[str, Any]) -> list[tuple[str, str]]:
    if host["kept"] is None:
        return []
    mib = {key: round(value / 2**20) for key, value in host["kept"].items()}
    used = mib["packed_filters"] + mib["free_blocks"]
    return [("CPU cache", f"{used} MiB of at most {mib['budget']} MiB (packed filters, blocks)")]


def _onednn_lines(host: dict[str, Any]) -> list[tuple[str, str]]:
    if host["onednn_max_isa"] is None:
        return []
    why = " (this machine reports AMX but cannot use it)" if host["unusable_amx"] else ""
    return [("oneDNN", f"limited to {host['onednn_max_isa']}{why}")]


def _build_lines(build: dict[str, Any] | None) -> list[tuple[str, str]]:
    if build is None:
        return [("none", backends.native_module()[1])]
    lines = []
    for key, value in build.items():
        if isinstance(value, (list, tuple)):
            value = ", ".join(map(str, value))
        if value not in (None, ""):
            lines.append((key.replace("_", " "), str(value)))
    return lines


def auto_lines(auto: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """`collect()["auto"]` as rows: device, dtype, impl, and all ops with that choice."""
    groups: dict[tuple[str, str, str, tuple], list[str]] = {}
    count: dict[tuple[str, str], int] = {}
    for row in auto:
        place = row["device"], row["dtype"]
        key = (*place, row["takes"], tuple(row["not"].items()))
        groups.setdefault(key, []).append(row["op"])
        count[place] = count.get(place, 0) + 1
    lines = []
    for (device, dtype, takes, refused), names in groups.items():
        which = "every op" if len(names) == count[device, dtype] else ", ".join(names)
        reasons = "; ".join(f"not {impl}: {why}" for impl, why in refused)
        lines.append((device, dtype, takes, f"{which} ({reasons})" if reasons else which))
    return lines


def _indented(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [("  " + str(first), *rest) for first, *rest in rows]


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
