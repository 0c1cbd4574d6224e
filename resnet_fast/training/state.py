"""All that changes during training, in one place: the content of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..runtime.files import reason
from ..spec.values import given
from .checks import MOST
from .distributed import gathered, total, world
from .forms import check_keys, check_like, check_list, check_number, equal, is_dense
from .history import COLUMNS, History
from .optimizers import slots_of
from .recipe import Recipe, lr_factor, schedule_of
from .torch_file import CheckpointError

MOST_STEPS = 2**53
PARTS = ("model", "optimizer", "schedule", "scaler", "averaged")


class State:
    """Model, optimizer, schedule, gradient scaler, average, generators, progress and metrics.

    Attributes:
        known: whether the optimizer is that of the recipe, whose state has a known form.
        epoch: complete epochs.
        step: optimizer steps in the current epoch.
        tally: [steps, 3], sum of losses, correct images and images per step of the current epoch,
            this process's part.
        generator: of the augmentation, on the device; the same numbers in every process.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, steps: int, device: torch.device,
        optimizer: torch.optim.Optimizer, known: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.recipe, self.optimizer, self.known = model, recipe, optimizer, known
        self.schedule = schedule_of(self.optimizer, recipe, steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.averaged = None
        if recipe.ema is not None:
            average = get_ema_multi_avg_fn(recipe.ema)
            self.averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.epoch = self.step = 0
        self.tally = torch.zeros(steps, 3, device=device)
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
        """Continue from `state_dict()`; nothing is loaded unless all of it is valid.

        Raises:
            ValueError: the state is from another number of processes.
            CheckpointError: a part differs in form from what this run writes; the message names it.
        """
        here, fresh = world(), self.state_dict()
        check_keys(state, fresh, "training")
        if not isinstance(state["random"], list):
            got = given(state["random"])
            raise CheckpointError(f"training: random: expected a list, got {got}")
        if len(state["random"]) != here.size:
            raise ValueError(
                f"resume: expected {len(state['random'])} processes, as in the checkpoint, got "
                f"{here.size}"
            )
        state = self._checked(state, fresh)
        for name in PARTS:
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(state[name])
        self.epoch, self.step = state["epoch"], state["step"]
        self._follow_schedule()
        if here.first:  # it is the sum over all processes
            self.tally.copy_(state["tally"])
        self.history = History(**state["history"])
        self.generator.set_state(state["generator"])
        _set_random_state(state["random"][here.rank])

    def _checked(self, state: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
        """`state`, if it has the form of `fresh`; without entries of other PyTorch versions."""
        state = {**state, "schedule": _merged(state["schedule"], fresh["schedule"], "schedule")}
        for name in ("model", "schedule", "scaler", "averaged", "tally"):
            check_like(state[name], fresh[name], f"training: {name}")
        steps = len(self.tally)
        check_number(state["epoch"], "training: epoch", True, 0, MOST)
        if state["epoch"] > self.recipe.epochs:
            raise ValueError(
                f"epochs: expected at least the {state['epoch']} complete epochs of the "
                f"checkpoint, got {self.recipe.epochs}"
            )
        check_number(state["step"], "training: step", True, 0, steps)
        done = state["epoch"] * steps + state["step"]
        check_number(state["schedule"]["last_epoch"], "training: schedule", True, done, done)
        _check_equal(state["schedule"]["base_lrs"], fresh["schedule"]["base_lrs"], "lr")
        state["optimizer"] = self._checked_optimizer(state["optimizer"], fresh["optimizer"])
        row = dict.fromkeys(COLUMNS, 0.0)
        count = state["epoch"]
        like = asdict(History([row] * count, [0.0] * (count * steps)))
        check_like(state["history"], like, "training: history")
        _check_generator(state["generator"], self.generator.device, "generator")
        for own in state["random"]:  # of the CPU, and of a GPU
            if not isinstance(own, list) or not 1 <= len(own) <= 2:
                raise CheckpointError(f"training: random: expected states, got {given(own)}")
            _check_generator(own[0], torch.device("cpu"), "random")
            if len(own) > 1 and torch.cuda.is_available():
                _check_generator(own[1], torch.device("cuda"), "random")
        return state

    def _checked_optimizer(self, state: Any, fresh: dict[str, Any]) -> dict[str, Any]:
        where = "training: optimizer"
        check_keys(state, fresh, where)
        groups = fresh["param_groups"]
        check_list(state["param_groups"], len(groups), where)
        merged = [
            _merged(there, here, where)
            for there, here in zip(state["param_groups"], groups, strict=True)
        ]
        check_like(merged, groups, where)
        if [group["params"] for group in merged] != [group["params"] for group in groups]:
            raise CheckpointError(f"{where}: its parameters are not those of the model")
        for group, wanted in zip(merged, groups, strict=True):
            for name in wanted.keys() - {"params", "lr"}:
                _check_equal(group[name], wanted[name], name)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots = state["state"]
        check_keys(slots, slots if isinstance(slots, dict) else (), where)
        own = {}
        for number, slot in slots.items():
            check_number(number, where, True, 0, len(parameters) - 1)
            p = parameters[number]
            like = slots_of(self.optimizer, p) if self.known else None
            own[number] = _own_slot(slot, like, f"{where}: {number}")
        return {"state": own, "param_groups": merged}

    def _follow_schedule(self) -> None:
        """The learning rates of the next step: those of this recipe, which may have more epochs."""
        factor = lr_factor(self.recipe, self.schedule.last_epoch, len(self.tally))
        groups = self.optimizer.param_groups
        for group, base in zip(groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * factor


def _check_equal(there: Any, here: Any, name: str) -> None:
    """Whether a value of the optimizer in a file is that of this run."""
    if not equal(there, here):
        raise ValueError(
            f"resume: the optimizer of the checkpoint has {name} {given(there)}, this run has "
            f"{given(here)}"
        )


def _own_slot(slot: Any, like: Any, where: str) -> dict[str, Any]:
    """What an optimizer stores for a parameter, with tensors of its own: elements of a file may
    share memory.

    like: the expected tensors; None takes numbers and any dense tensors.
    """
    check_keys(slot, slot if like is None and isinstance(slot, dict) else like or (), where)
    own = {}
    for name, value in slot.items():
        at = f"{where}: {given(name)}"
        if isinstance(value, Tensor):
            if like is not None:
                check_like(value, like[name], at)
            elif not is_dense(value):
                raise CheckpointError(f"{at}: expected a dense tensor")
            steps = value.double().max().item() if name == "step" and value.numel() else 0
            if not 0 <= steps < MOST_STEPS:
                raise CheckpointError(f"{at}: expected a number of steps, got {steps}")
            own[name] = value.clone()
        elif like is None and (value is None or type(value) in (bool, int, float)):
            own[name] = value
        else:
            raise CheckpointError(f"{at}: expected a tensor, got {given(value)}")
    return own


def _check_generator(state: Any, device: torch.device, where: str) -> None:
    """Whether `state` is one of a generator on `device`."""
    generator = torch.Generator(device)
    check_like(state, generator.get_state(), f"training: {where}")
    try:
        generator.set_state(state)
    except RuntimeError as error:
        raise CheckpointError(f"training: {where}: {reason(error)}") from None


def _merged(there: Any, here: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of `here`, with the values of `there` where it has them."""
    check_keys(there, there if isinstance(there, dict) else (), f"training: {where}")
    return {key: there.get(key, value) for key, value in here.items()}


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
