"""Training: data, recipe, loop, checkpoints, metrics. `import resnet_fast` does not import it."""

from .data import load_data
from .evaluation import Evaluation, evaluate
from .history import History
from .loop import Interrupted, fit
from .recipe import Recipe
from .weights import Loaded, load_weights

__all__ = [
    "Evaluation",
    "History",
    "Interrupted",
    "Loaded",
    "Recipe",
    "evaluate",
    "fit",
    "load_data",
    "load_weights",
]
