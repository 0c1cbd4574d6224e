"""The report of the checks: the table, the summary line, and the JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .check import Check, Setting

HEADER = ("what", "impl", "dtype", "layout", "checks", "error", "allowed", "verdict")


@dataclass(frozen=True)
class Row:
    """All checks of one op, block or model part in one setting; the row shows the worst of them."""

    part: str
    what: str
    setting: Setting
    checks: tuple[Check, ...]

    @property
    def worst(self) -> Check:
        return max(self.checks, key=lambda check: (not check.ok, check.severity))

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def cells(self) -> tuple[str, ...]:
        """The cells of the row, in the order of HEADER."""
        verdict, setting = self.worst.verdict, self.setting
        impl = setting.impl if setting.device == "cpu" else f"{setting.impl} {setting.device}"
        return (
            self.what, impl, setting.dtype, setting.layout, str(len(self.checks)),
            figure(verdict.error), figure(verdict.allowed), "ok" if self.ok else "FAIL",
        )  # fmt: skip


def rows(checks: Iterable[Check]) -> list[Row]:
    """One row for every part, `what` and setting, in the order of the checks."""
    groups: dict[tuple[str, str, Setting], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.part, check.what, check.setting), []).append(check)
    return [Row(*key, tuple(group)) for key, group in groups.items()]


def text(checks: Sequence[Check]) -> str:
    """The table, one line for each failed tensor, and the summary line."""
    lines = [HEADER, *(row.cells() for row in rows(checks))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    numbers = ("checks", "error", "allowed")
    table = [
        "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(HEADER, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    table.insert(1, "  ".join("-" * width for width in widths))
    failed = [failure(check) for check in checks if not check.ok]
    return "\n".join([*table, *([""] if failed else []), *failed, "", summary(checks)])


def failure(check: Check) -> str:
    """A line with the tensor and the case that failed, and the reason."""
    s = check.setting
    where = f"{s.impl} {s.device} {s.dtype} {s.layout}"
    return f"FAIL {check.what} [{check.case}] {where}, {check.tensor}: {check.verdict}"


def summary(checks: Sequence[Check]) -> str:
    """The last line: ok or FAILED, the number of checks, and the largest error."""
    failed = sum(not check.ok for check in checks)
    if not checks:
        return "verify: FAILED, nothing was checked"
    if failed:
        return f"verify: FAILED, {failed} of {len(checks)} checks"
    worst = max(checks, key=lambda check: check.severity)
    return (
        f"verify: ok, {len(checks)} checks; largest error: {worst.severity:.0%} of the allowed "
        f"error ({worst.what}, {worst.tensor}, {worst.setting.dtype} {worst.setting.layout})"
    )


def document(checks: Sequence[Check], environment: dict[str, Any]) -> dict[str, Any]:
    """The checks, their count and the environment (`commands.env.collect`), for JSON."""
    return {
        "ok": bool(checks) and all(check.ok for check in checks),
        "failed": sum(not check.ok for check in checks),
        "environment": environment,
        "checks": [check.row() for check in checks],
    }


def figure(value: float) -> str:
    """`value` with three digits; a dash if it is not finite."""
    return f"{value:.2e}" if math.isfinite(value) else "–"
