"""The autograd Function: the order of the ops, and what is saved or recomputed for backward."""

from .chain import ChainFunction, Layout

__all__ = ["ChainFunction", "Layout"]
