"""The autograd Functions: which op runs when, what is saved, what is recomputed."""

from .chain import ChainFunction

__all__ = ["ChainFunction"]
