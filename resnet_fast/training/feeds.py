"""Where `fit` takes its batches from: a data set of `load_data`, or a loader of the caller.

A feed has `name`, `classes`, `steps` (optimizer steps per epoch), `batch` (images of a step over
all processes, None if it is not known), `batches` and `test`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .augment import Draws, augment
from .batches import check_loader, checked, length, set_epoch
from .checkpoint import LOADER
from .distributed import world
from .evaluation import Evaluation, Loss, as_input, evaluate
from .imagefolder import ImageFolder
from .recipe import Recipe
from .state import State
from .transforms import Transform, augmented, mixed, seed_of, seeded

OF_DATA = ("augment", "randaugment", "random_erasing", "mixup", "cutmix")


class DataFeed:
    """Batches of a data set, augmented and normalized; every process takes its share of each."""

    def __init__(self, data: Any, recipe: Recipe, device: torch.device, workers: int) -> None:
        self.data, self.recipe, self.device, self.workers = data, recipe, device, workers
        self.name = data.name
        self.classes: int | None = data.num_classes
        self.batch: int | None = recipe.batch_size
        self.steps = data.count("train") // recipe.batch_size
        augment = data.augmentation if recipe.augment == "auto" else recipe.augment
        self.transform = Transform(augment, recipe.randaugment, recipe.random_erasing)
        self.read_augmented = isinstance(data, ImageFolder) and self.transform.of_files
        self.share = recipe.batch_size // world().size
        self.before: tuple[Tensor, Tensor] | None = None

    def batches(self, state: State) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the model and targets for the rest of `state`'s epoch."""
        recipe, here = self.recipe, world()
        order = distributed.batches(
            self.data.count("train"), recipe.batch_size, recipe.seed, state.epoch, here
        )
        draws = Draws(state.generator, recipe.batch_size, slice(here.rank, None, here.size))
        batches = self.data.batches(
            "train", order[state.step :], self.device, self.workers, transform=self.transform,
            seed=recipe.seed, epoch=state.epoch,
        )  # fmt: skip
        for step, (x, y) in enumerate(batches, state.step):
            x, y = self._filled(x, y)
            if not self.read_augmented:
                x = augment(self.transform.augment, x, self.data.size, draws)
                seeds = [seed_of(recipe.seed, state.epoch, i) for i in order[step].tolist()]
                x = augmented(x, self.transform, self.data.preprocessing.mean, seeds)
            x = as_input(x, self.data.preprocessing, state.model)
            seed = seed_of(recipe.seed, state.epoch, step, here.rank)
            yield mixed(x, y, self.data.num_classes, recipe.mixup, recipe.cutmix, seed)

    def test(self, model: nn.Module, loss: Loss | None) -> Evaluation:
        """Figures of `model` on the test images."""
        return evaluate(
            model, self.data, device=self.device, precision=self.recipe.precision,
            workers=self.workers, loss=loss,
        )  # fmt: skip

    def close(self) -> None:
        """End the processes that read images."""
        getattr(self.data, "close", lambda: None)()

    def _filled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, y with the places of images that cannot be read taken by others: of the same batch,
        or of the one before if it has none.
        """
        if len(x) == self.share:
            self.before = x, y
            return x, y
        if not len(x) and self.before is None:
            why = next(iter(getattr(self.data, "unreadable", {}).values()), "")
            raise ValueError(f"data: no image of a batch of {self.share} can be read: {why}")
        x, y = (x, y) if len(x) else self.before
        index = torch.arange(self.share, device=x.device) % len(x)
        self.before = x[index], y[index]
        return self.before


class LoaderFeed:
    """Batches as a loader makes them; with several processes, every process has its own loader."""

    name = LOADER
    classes: int | None = None
    batch: int | None = None

    def __init__(
        self, data: Any, test: Any, steps: int | None, recipe: Recipe, device: torch.device
    ) -> None:
        check_loader(data, "data", again=True)
        if test is not None:
            check_loader(test, "test", again=recipe.epochs > 1)
        for name in OF_DATA:
            if getattr(recipe, name) != getattr(Recipe, name):
                raise ValueError(
                    f"{name}: a loader augments its images itself; expected "
                    f"{getattr(Recipe, name)!r}, got {getattr(recipe, name)!r}"
                )
        count = length(data)
        if count is None and steps is None:
            raise ValueError("steps: expected the batches of an epoch; data has no length")
        if count is not None and steps is not None and steps > count:
            raise ValueError(f"steps: expected at most the {count} batches of data, got {steps}")
        self.steps = count if steps is None else steps
        if not self.steps:
            raise ValueError("data: expected batches to train on, got none")
        size = world().size
        if distributed.total(torch.tensor(float(self.steps), device=device)) != self.steps * size:
            raise ValueError("data: expected equally many batches in every process")
        self.data, self.tests, self.recipe, self.device = data, test, recipe, device

    def batches(self, state: State) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of the model and targets for the rest of `state`'s epoch.

        What the loader draws before its first batch, such as the order of a shuffling DataLoader
        and the seed of its workers, depends only on the recipe's seed and the epoch.
        """
        set_epoch(self.data, state.epoch)
        with seeded(seed_of(self.recipe.seed, state.epoch)):
            batches = iter(self.data)
            first = list(itertools.islice(batches, 1))
        batches = itertools.islice(itertools.chain(first, batches), self.steps)
        with torch.random.fork_rng(devices=()):  # those before `step` have had their numbers
            count = sum(1 for _ in itertools.islice(batches, state.step))
        for batch in batches:
            count += 1
            x, y = checked(batch, "data", self.device)
            yield as_input(x, None, state.model), y
        if count < self.steps:
            raise ValueError(f"data: ended after {count} of {self.steps} batches")

    def test(self, model: nn.Module, loss: Loss | None) -> Evaluation | None:
        """Figures of `model` on the test batches, if there are any."""
        if self.tests is None:
            return None
        try:
            return evaluate(
                model, self.tests, device=self.device, precision=self.recipe.precision, loss=loss
            )
        except ValueError as error:
            raise ValueError(str(error).replace("data:", "test:", 1)) from None

