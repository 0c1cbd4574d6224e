"""Packages that only a part of the training needs, imported when it does."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackage(RuntimeError):
    """The message says what needs which package, and how to install it."""


def imported(module: str, what: str, package: str) -> ModuleType:
    """The module; MissingPackage, with `what` as its subject, where `package` is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{what} need {package} (pip install {package}): {error}") from None
