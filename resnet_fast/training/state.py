"""All that changes during training, in one place: the content of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .distributed import gathered, total, world
from .history import History
from .recipe import Recipe, optimizer_of, schedule_of

PARTS = ("model", "optimizer", "schedule", "scaler", "averaged")


class State:
    """Model, optimizer, schedule, gradient scaler, average, generators, progress and metrics.

    Attributes:
        epoch: complete epochs.
        step: optimizer steps in the current epoch.
        tally: [steps, 2], loss and correct images per step of the current epoch, this process's
            part.
        generator: of the augmentation, on the device; the same numbers in every process.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, steps: int, device: torch.device
    ) -> None:
        self.model = model
        self.optimizer = optimizer_of(model, recipe)
        self.schedule = schedule_of(self.optimizer, recipe, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.averaged = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.epoch = self.step = 0
        self.tally = torch.zeros(steps, 2, device=device)
        self.history = History()

    @property
    def best(self) -> nn.Module:
        """The model to test and save: the average if there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def reduced_tally(self) -> Tensor:
        """`tally` summed over all processes, fp64, on the CPU."""
        return total(self.tally).double().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; a collective call, made by every process."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
            "epoch": self.epoch,
            "step": self.step,
            "tally": self.reduced_tally(),
            "history": asdict(self.history),
            "generator": self.generator.get_state(),
            "random": gathered(_random_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: the state is from another number of processes.
        """
        here = world()
        if len(state["random"]) != here.size:
            raise ValueError(
                f"resume: expected {len(state['random'])} processes, as in the checkpoint, got "
                f"{here.size}"
            )
        for name in PARTS:
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(state[name])
        self.epoch, self.step = state["epoch"], state["step"]
        if here.first:  # it is the sum over all processes
            self.tally.copy_(state["tally"])
        self.history = History(**state["history"])
        self.generator.set_state(state["generator"])
        _set_random_state(state["random"][here.rank])


def _random_state() -> list[Tensor]:
    """PyTorch's default generators: the CPU's, and this process's GPU's if it has one."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def _set_random_state(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
