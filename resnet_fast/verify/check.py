"""A check: several runs of one case, compared tensor by tensor by `spec.tolerance`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import tolerance
from ..spec.dtypes import BY_NAME

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
GRADIENT = "grad "
ACTIVATIONS = ("y", "z", "dx")

Values = dict[str, Tensor]
"""Results by name; names that start with `GRADIENT` have the tolerance of gradients."""


@dataclass(frozen=True)
class Setting:
    """Implementation, device, dtype and layout."""

    impl: str
    device: str
    dtype: str
    layout: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return BY_NAME[self.dtype]

    @property
    def narrow(self) -> bool:
        """Whether the activations have 16 bits."""
        return self.torch_dtype.itemsize == 2

    @property
    def exact_dtype(self) -> torch.dtype:
        """The narrowest dtype of all runs; inputs are rounded to it, so all runs get the same."""
        return self.torch_dtype if self.narrow else torch.float32

    @property
    def other_layout(self) -> Setting:
        """The same setting with the other layout of LAYOUTS."""
        (other,) = set(LAYOUTS) - {self.layout}
        return replace(self, layout=other)

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]


@dataclass(frozen=True)
class Check:
    """The verdict on one tensor of one case."""

    part: str
    what: str
    case: str
    setting: Setting
    tensor: str
    verdict: tolerance.Verdict

    @property
    def ok(self) -> bool:
        return self.verdict.ok

    @property
    def severity(self) -> float:
        """error / allowed; infinite if the check failed for another reason than its error."""
        error, allowed = self.verdict.error, self.verdict.allowed
        if not self.ok and error <= allowed:
            return math.inf
        return error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)

    def row(self) -> dict[str, object]:
        """The check for JSON; an error that is not finite is null."""
        verdict, setting = self.verdict, self.setting
        return {
            "part": self.part, "what": self.what, "case": self.case, "impl": setting.impl,
            "device": setting.device, "dtype": setting.dtype, "layout": setting.layout,
            "tensor": self.tensor, "error": _number(verdict.error),
            "allowed": _number(verdict.allowed), "ok": self.ok, "why": verdict.why,
        }  # fmt: skip


class Runs(NamedTuple):
    """The runs of a case.

    `actual` is the tested run and `wide` is plain PyTorch in fp64. `same` is plain PyTorch in the
    tested dtype, one or more runs; if that dtype is fp64, `same` includes fp32. `kinks` and `rms`
    are options of `tolerance.compare`.
    """

    actual: Callable[[], Values]
    same: Callable[[], Sequence[Values]]
    wide: Callable[[], Values]
    kinks: Mapping[str, Tensor] = {}
    rms: bool = False


@dataclass(frozen=True)
class Trial:
    """One case, not yet run. `prepare` creates its runs; `group` names a result's table row."""

    part: str
    what: str
    case: str
    setting: Setting
    prepare: Callable[[], Runs]
    group: Callable[[str], str] = lambda name: ""

    def __str__(self) -> str:
        setting = self.setting
        return f"{self.what} [{self.case}] {setting.impl} {setting.dtype} {setting.layout}"

    def run(self) -> list[Check]:
        """One check per tensor; a single failed check if a run raises or tensors are missing."""
        who = "plain PyTorch"
        try:
            runs = self.prepare()
            same, wide = runs.same(), runs.wide()
            who = self.setting.impl
            actual = runs.actual()
        except Exception as error:
            return [self._failed("result", f"{who} raised {type(error).__name__}: {error}")]
        if actual.keys() != wide.keys():
            differ = ", ".join(sorted(actual.keys() ^ wide.keys()))
            return [self._failed("result", f"missing or unexpected results: {differ}")]
        others = functools.cache(lambda: list(itertools.chain(*tolerance.plain_runs(runs.same))))
        checks = []
        for name, expected in wide.items():
            references = [values[name] for values in same]
            options = {
                "kink": runs.kinks.get(name), "rms": runs.rms,
                "more": lambda name=name: [values[name] for values in others()],
            }  # fmt: skip
            checks.append(self._judge(name, actual[name], references, expected, **options))
        return checks

    def _judge(
        self, name: str, actual: Tensor, same: Sequence[Tensor], wide: Tensor, **options: Any
    ) -> Check:
        gradient = name.startswith(GRADIENT)
        verdict = tolerance.compare(actual, same, wide, gradient=gradient, **options)
        if verdict.ok and name.removeprefix(GRADIENT) in ACTIVATIONS:
            fmt = self.setting.memory_format
            if actual.dim() == 4 and not actual.is_contiguous(memory_format=fmt):
                expected = f"expected memory format {self.setting.layout}"
                return self._failed(name, f"{expected}, got strides {actual.stride()}")
        return self._check(name, verdict)

    def _check(self, name: str, verdict: tolerance.Verdict) -> Check:
        what = " ".join(filter(None, (self.what, self.group(name))))
        return Check(self.part, what, self.case, self.setting, name, verdict)

    def _failed(self, name: str, why: str) -> Check:
        return self._check(name, tolerance.Verdict(math.inf, 0.0, False, why))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
