"""The autograd Functions: the order of the ops, and what is saved or recomputed for backward."""

from .chain import ChainFunction, Layout
from .gated_join import GateFunction, PoolFunction

__all__ = ["ChainFunction", "GateFunction", "Layout", "PoolFunction"]
