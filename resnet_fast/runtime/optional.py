"""Imports of optional packages, at first use."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackage(RuntimeError):
    """An optional package is missing; the message says how to install it."""


def imported(module: str, what: str, package: str) -> ModuleType:
    """The module; MissingPackage, with `what` as its subject, if `package` is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{what} need {package} (pip install {package}): {error}") from None
