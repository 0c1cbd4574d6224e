"""Keeps the cache of packed filters consistent with the modules that own the filters.

The kernels detect changed filters (csrc/cpu/witness.h). Python reports two events to them. After a
change of a whole module, the kernels compare all values. After a parameter is freed, they drop its
packed filters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from . import backends

_watched: set[tuple[int, int]] = set()  # identity and address


class Rechecked(nn.Module):
    """Mixin for a fused `nn.Module` that calls `recheck` in train, to and load_state_dict."""

    def train(self, mode: bool = True):
        """Set the mode as `nn.Module.train` does, and recheck the packed filters."""
        recheck()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # to(), float(), ...
        recheck()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        recheck()
        super()._load_from_state_dict(*args, **kwargs)


def recheck() -> None:
    """Make the kernels compare every packed filter with all values of its source at next use."""
    module, _ = backends.native_module()
    if module is not None:
        module.recheck()


def drop_with(tensors: Iterable[Tensor | None]) -> None:
    """Drop the packed copies of the filters among `tensors` as soon as the filters are freed."""
    for t in tensors:
        if t is None or t.dim() != 4:
            continue
        key = id(t), t.data_ptr()
        if key in _watched:
            return  # the other tensors of the module are watched too
        _watched.add(key)
        weakref.finalize(t, _drop, key).atexit = False


def _drop(key: tuple[int, int]) -> None:
    _watched.discard(key)
    module, _ = backends.native_module()
    module.drop_packed(key[1])
