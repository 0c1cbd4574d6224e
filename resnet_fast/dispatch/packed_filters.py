"""The cache of packed filters follows the modules that own the filters.

The kernels detect changed filters (csrc/cpu/witness.h). Two events come from Python: a change of a
whole module, after which the kernels compare all values, and the end of a parameter, after which
they drop its packed filters.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from . import backends

_watched: set[tuple[int, int]] = set()  # identity and address


class Rechecked(nn.Module):
    """Mixin for a fused `nn.Module`: after train, to or load_state_dict all values are compared."""

    def train(self, mode: bool = True):
        """As `nn.Module.train`."""
        recheck()
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # to(), float(), ...
        recheck()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        recheck()
        super()._load_from_state_dict(*args, **kwargs)


def recheck() -> None:
    """Make the kernels compare every packed filter completely with its source at the next use."""
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
            return  # and so were those beside it
        _watched.add(key)
        weakref.finalize(t, _drop, key).atexit = False


def _drop(key: tuple[int, int]) -> None:
    _watched.discard(key)
    module, _ = backends.native_module()
    module.drop_packed(key[1])
