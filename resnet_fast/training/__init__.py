"""Training: data, recipe, loop, checkpoints, figures. Nothing here is imported by the package."""

from .data import load_data
from .evaluation import Evaluation, evaluate
from .history import History
from .loop import Interrupted, fit
from .recipe import Recipe

__all__ = ["Evaluation", "History", "Interrupted", "Recipe", "evaluate", "fit", "load_data"]
