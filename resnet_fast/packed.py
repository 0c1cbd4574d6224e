"""What the native CPU kernels keep of filters, packed for inference, and the modules they are of.

The kernels follow changes of filters themselves (csrc/cpu/witness.h). What they cannot see they are
told here: a change of a whole module, after which all values are compared, and the end of a filter,
with which what is packed of it goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from . import backend

_watched: set[tuple[int, int]] = set()  # identity and address


class Rechecked:
    """Mixin for an `nn.Module` that runs fused: a change of all of it is looked for whole."""

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
    """Have every packed filter compared with its source as a whole at its next use."""
    module, _ = backend.native_module()
    if module is not None:
        module.recheck()


def drop_with(tensors: Iterable[Tensor | None]) -> None:
    """Have what is packed of the filters among `tensors` dropped when they are."""
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
    module, _ = backend.native_module()
    module.drop_packed(key[1])
