"""Modules that are not trained: `Recipe.freeze`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..spec.values import given

STEM = ("conv1", "bn1")


@contextmanager
def frozen(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Module]]:
    """Context in which the parameters of modules `names` require no gradient; yields the modules.

    After it they require one again, and the modules are in training mode.

    Raises:
        ValueError: there is no such module, or nothing is left to train.
    """
    modules = [module for name in names for module in _named(model, name)]
    parameters = {p for module in modules for p in module.parameters() if p.requires_grad}
    if parameters and not any(p.requires_grad for p in model.parameters() if p not in parameters):
        raise ValueError(f"freeze: {', '.join(names)} leave no parameter to train")
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield modules
    finally:
        for p in parameters:
            p.requires_grad_(True)
        for module in modules:
            module.train()


def train_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """`model` in training mode, its `frozen` modules in eval mode."""
    model.train()
    for module in frozen:
        module.eval()


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    modules = dict(model.named_modules())
    del modules[""]
    if name in modules:
        return [modules[name]]
    if name == "stem" and all(part in modules for part in STEM):
        return [modules[part] for part in STEM]
    children = [child for child, _ in model.named_children()]
    stem = ["stem"] if all(part in modules for part in STEM) else []
    raise ValueError(
        f"freeze: expected names of modules, such as {', '.join([*stem, *children][:12])}; got "
        f"{given(name)}"
    )
