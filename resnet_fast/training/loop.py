"""`fit`: the training loop."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm import tqdm

from ..runtime.files import InUse, locked, remove_parts
from ..spec.values import check_flag, given, integer, is_number
from . import checkpoint, distributed
from .checkpoint import CheckpointError, Keeper, ModelSpec
from .checks import MOST, check_device, check_logits, check_model, check_path, is_data
from .distributed import world
from .evaluation import Loss, at_least_fp32, autocast, hard, mean_loss
from .feeds import DataFeed, LoaderFeed
from .forms import equal
from .freezing import frozen, train_mode
from .history import History
from .optimizers import optimizer_of
from .recipe import Recipe, lr_factor
from .recompute import checkpointing
from .report import Log
from .signals import Interrupted, stop_signals
from .state import State

EVENTS = ("step", "epoch")
EXTENDED = ("epochs", "warmup")  # attributes of the recipe that a resumed run may change
MOST_STEPS = 10**9
Callback = Callable[[Mapping[str, Any]], None]
LOCK = ".lock"


def fit(
    model: nn.Module,
    data: Any,
    recipe: Recipe,
    *,
    test: Iterable[Any] | None = None,
    steps: int | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    callbacks: Mapping[str, Callback | Sequence[Callback]] | None = None,
    device: str | torch.device = "cpu",
    out: str | Path | None = None,
    resume: bool | str | Path = False,
    spec: ModelSpec | None = None,
    workers: int = 0,
    progress: bool = False,
) -> History:
    """Train `model` on `data` by `recipe`, and test it after every epoch.

    Under `torchrun` (`distributed.processes`) every process calls it, with equal models.

    Args:
        model: maps images [N, C, H, W] to logits [N, classes]. It is moved to `device`, trained in
            place and left in training mode.
        data: from `load_data`; or a `DataLoader`, or any iterable that yields the batches of an
            epoch each time it is iterated: pairs (images, targets) of
            - images [N, C, H, W] in floating point, augmented and normalized,
            - targets [N], integers from 0, or [N, classes], probabilities.
            Then `recipe.batch_size` has no effect, and the augmentations of the recipe must have
            their defaults. With several processes, each has its own loader, of equally many
            batches; `set_epoch` of a loader, its sampler or its data set is called.
        recipe: the hyperparameters.
        test: with a loader, the same for the test; None leaves `test_loss` and `test_accuracy` NaN.
        steps: with a loader, the batches of an epoch; needed if it has no length.
        loss: maps logits (at least fp32) and targets to the mean loss of the batch; None is
            cross-entropy with `recipe.label_smoothing`. It is the loss of the test too, without
            label smoothing.
        optimizer: an optimizer of parameters of `model`, or a function that makes one from the list
            of parameters that are trained. None is that of the recipe. The recipe's schedule
            multiplies its learning rates, and leaves them as after the last step.
        callbacks: functions by event, one or several each, called on the first process with a dict:
            - "step", after every optimizer step: `epoch` (from 1), `step` (from 1), `steps` (of an
              epoch), `images` (of this process), `loss` (of this process, a tensor: reading it
              waits for the device), `lr` (of this step),
            - "epoch", after every test: the row of `History.epochs`.
        device: device to train on.
        out: folder for checkpoints, metrics and the final `model.pt`; None writes nothing.
            `checkpoints` has the last two, and that of the highest test accuracy.
        resume: True continues from the last checkpoint under `out`, or starts if there is none; a
            path continues from that checkpoint. The result is bitwise that of an uninterrupted
            run, given an equal machine and equal numbers of threads and processes. A GPU also
            needs `recipe.deterministic`. A loader must depend only on its epoch and on PyTorch's
            CPU generator, and may not have persistent workers that draw random numbers. `epochs`
            and `warmup` of the recipe may differ from those of the checkpoint: the rest of the run
            follows the new schedule.
        spec: how to create the model; stored in the files, so that `resnet-fast eval` and
            `predict` need no model name.
        workers: processes that read the images of an imagefolder; 0 reads them in this one.
        progress: show progress bars if stderr is a terminal.

    Returns:
        The metrics of every epoch and the loss of every step, those before a resume included.

    Raises:
        ValueError: an argument, an attribute of the recipe, a batch or a file is invalid; the
            message names it.
        Interrupted: SIGTERM or SIGINT came, and `out` is given; a checkpoint has every step so far.
    """
    check_model(model)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: expected a Recipe, got {given(recipe)}")
    device = check_device(device)
    if not (loss is None or callable(loss)):
        raise ValueError(f"loss: expected a function of logits and targets, got {given(loss)}")
    calls = _callbacks(callbacks)
    if out is not None:
        check_path(out, "out")
    if not isinstance(resume, bool):
        check_path(resume, "resume")
    if not (spec is None or isinstance(spec, ModelSpec)):
        raise ValueError(f"spec: expected a ModelSpec or None, got {given(spec)}")
    if steps is not None:
        integer(steps, "steps", "an integer of at least 1", 1, MOST_STEPS)
    integer(workers, "workers", "an integer of at least 0", 0, MOST)
    check_flag(progress, "progress")
    folder = None if out is None else Path(out)
    _check(data, test, steps, recipe, folder, resume)
    with ExitStack() as stack:
        if folder is not None and world().first:
            stack.enter_context(_run_lock(folder))
        fmt = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model.to(device, memory_format=fmt).train()
        frozen_modules = stack.enter_context(frozen(model, recipe.freeze))
        if is_data(data):
            feed = stack.enter_context(closing(DataFeed(data, recipe, device, workers)))
        else:
            feed = LoaderFeed(data, test, steps, recipe, device)
        run = _Run(model, feed, recipe, device, progress, loss, optimizer, frozen_modules)
        about = _about(spec, data, recipe)
        keeper = None
        if folder is not None:
            resumed = _resume(run.state, about, folder, resume) if resume else None
            keeper = Keeper(folder / "checkpoints", resumed, run.state.epoch)
            if resumed is not None and not run.state.step and _is_best(run.state.history):
                if run.here.first:  # it may have been stopped before it was marked
                    keeper.mark_best(resumed, run.state.epoch)

        def save(row: Mapping[str, Any] | None = None) -> Path:
            content = run.state.state_dict()  # a collective call
            if not run.here.first:
                return keeper.folder
            weights = run.state.best.state_dict()
            path = keeper.write(
                run.state.epoch, run.state.step, {**about, "weights": weights, "training": content}
            )
            if row is not None and _is_best(run.state.history):
                keeper.mark_best(path, run.state.epoch)
            return path

        stack.enter_context(_deterministic(recipe.deterministic))
        stack.enter_context(checkpointing(model, recipe.checkpointing))
        stack.enter_context(warnings.catch_warnings())
        # The schedule also advances when the scaler skips a step; PyTorch warns if that is the
        # first one.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        stop = stack.enter_context(stop_signals(keeper is not None))
        log = stack.enter_context(Log(folder if run.here.first else None))
        history = run.state.history
        log.start(history)
        while run.state.epoch < recipe.epochs:
            for event in run.steps():
                if run.here.first:
                    calls("step", event)
                done = run.state.epoch * feed.steps + run.state.step
                if keeper is not None and stop.asked(done, device):
                    raise Interrupted(stop.number, save())
            row = run.end_epoch()
            if keeper is not None:
                save(row)
            log.epoch(history)
            if run.here.first:
                calls("epoch", dict(row))
        if folder is not None and run.here.first:
            weights = run.state.best.state_dict()
            checkpoint.write(folder / "model.pt", {**about, "weights": weights})
    return history


class _Run:
    """A training run: model, batches, recipe and progress (`state`)."""

    def __init__(
        self, model: nn.Module, feed: DataFeed | LoaderFeed, recipe: Recipe, device: torch.device,
        progress: bool, loss: Loss | None, optimizer: Any, frozen_modules: list[nn.Module],
    ) -> None:  # fmt: skip
        self.feed, self.recipe, self.device, self.loss = feed, recipe, device, loss
        self.here = world()
        self.progress = progress and self.here.first
        self.frozen = frozen_modules
        made = _optimizer(optimizer, model) or optimizer_of(model, recipe)
        self.state = State(model, recipe, feed.steps, device, made, optimizer is None)
        self.trained = [p for group in made.param_groups for p in group["params"]]
        model.zero_grad(set_to_none=True)  # gradients of before do not count
        self.runner = torch.compile(model) if recipe.compile else model
        if self.here.size > 1:
            devices = [device] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, devices)
        if recipe.sync_bn:  # in place, after DDP: on a CPU DDP rejects a converted model
            nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def steps(self) -> Iterator[dict[str, Any]]:
        """Train the rest of the current epoch; yields the event of every step."""
        state, steps = self.state, self.feed.steps
        train_mode(state.model, self.frozen)
        self.start, self.first = time.perf_counter(), state.step
        with tqdm(
            desc=f"epoch {state.epoch + 1}/{self.recipe.epochs}", unit=" images", leave=False,
            total=self.feed.batch and steps * self.feed.batch,
            initial=state.step * (self.feed.batch or 0),
            disable=None if self.progress else True,
        ) as bar:  # fmt: skip
            for x, y in self.feed.batches(state):
                lr = state.optimizer.param_groups[0]["lr"]
                figures = self.step(x, y)
                state.tally[state.step] = figures
                state.step += 1
                bar.update(self.feed.batch or len(x))
                yield {
                    "epoch": state.epoch + 1, "step": state.step, "steps": steps,
                    "images": len(x), "loss": figures[0] / len(x), "lr": lr,
                }  # fmt: skip

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on this process's x, y; returns [sum of losses, correct, images]."""
        state, recipe = self.state, self.recipe
        figures = torch.tensor([0.0, 0.0, len(x)], device=self.device)
        parts = list(zip(x.chunk(recipe.accumulate), y.chunk(recipe.accumulate), strict=True))
        for part, (xs, ys) in enumerate(parts):
            together = self.here.size == 1 or part == len(parts) - 1
            with nullcontext() if together else self.runner.no_sync():
                with autocast(self.device, recipe.precision):
                    logits = self.runner(xs)
                if self.feed.classes is None and isinstance(logits, Tensor) and logits.dim() == 2:
                    self.feed.classes = logits.size(1)
                check_logits(logits, self.feed.classes or 0, ys)
                logits = at_least_fp32(logits)
                loss = mean_loss(self.loss, logits, ys, recipe.label_smoothing)
                if not loss.requires_grad:
                    raise ValueError("loss: expected one that depends on parameters that are "
                                     "trained")  # fmt: skip
                state.scaler.scale(loss * (len(xs) / len(x))).backward()
            right = (logits.detach().argmax(1) == hard(ys)).sum()
            figures[:2] += torch.stack([loss.detach() * len(xs), right])
        if recipe.clip is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(self.trained, recipe.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.model.zero_grad(set_to_none=True)
        state.schedule.step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        return figures

    def end_epoch(self) -> dict[str, Any]:
        """Test the model and add the epoch's row to the history; returns the row."""
        state, steps = self.state, self.feed.steps
        tally = state.reduced_tally()  # waits for the device
        trained = time.perf_counter() - self.start
        distributed.same_buffers(state.model)
        if state.averaged is not None:
            distributed.same_buffers(state.averaged)
        test = self.feed.test(state.best, self.loss)
        losses, correct, images = tally.unbind(1)
        last = (state.epoch + 1) * steps - 1
        seen = images[self.first :].sum().item()
        row = {
            "epoch": state.epoch + 1,
            "lr": state.schedule.base_lrs[0] * lr_factor(self.recipe, last, steps),
            "train_loss": (losses.sum() / images.sum()).item(),
            "train_accuracy": (correct.sum() / images.sum()).item(),
            "test_loss": math.nan if test is None else test.loss,
            "test_accuracy": math.nan if test is None else test.accuracy,
            "images_per_second": seen / trained if trained > 0 else 0.0,
            "seconds": time.perf_counter() - self.start,
        }
        state.history.epochs.append(row)
        state.history.losses += (losses / images).tolist()
        state.epoch, state.step = state.epoch + 1, 0
        state.tally.zero_()
        return row


def _callbacks(asked: Any) -> Callable[[str, Mapping[str, Any]], None]:
    """A function that calls the callbacks of an event."""
    if not (asked is None or isinstance(asked, Mapping)):
        raise ValueError(f"callbacks: expected functions by event, got {given(asked)}")
    found: dict[str, list[Callback]] = {}
    for event, functions in (asked or {}).items():
        if event not in EVENTS:
            raise ValueError(f"callbacks: expected events {', '.join(EVENTS)}, got {given(event)}")
        found[event] = [functions] if callable(functions) else functions
        listed = isinstance(found[event], (list, tuple))
        if not listed or not all(map(callable, found[event])):
            raise ValueError(
                f"callbacks: {event}: expected a function or a list, got {given(functions)}"
            )

    def call(event: str, content: Mapping[str, Any]) -> None:
        for function in found.get(event, ()):
            function(content)

    return call


def _optimizer(asked: Any, model: nn.Module) -> Optimizer | None:
    """The optimizer that the caller of `fit` gave, or that its function makes."""
    if asked is None:
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = asked if isinstance(asked, Optimizer) or not callable(asked) else asked(parameters)
    if not isinstance(made, Optimizer):
        raise ValueError(
            "optimizer: expected a torch.optim.Optimizer or a function that makes one from a list "
            f"of parameters, got {given(made)}"
        )
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("optimizer: expected one that needs no closure, got LBFGS")
    for group in made.param_groups:
        if not is_number(group["lr"]):
            raise ValueError(f"optimizer: expected a number as lr, got {given(group['lr'])}")
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in made.param_groups for p in group["params"]):
        raise ValueError("optimizer: expected only parameters of model")
    return made


def _is_best(history: History) -> bool:
    """Whether the last epoch has the highest test accuracy, and is the first that has it."""
    if not history.epochs:
        return False
    *before, last = (row["test_accuracy"] for row in history.epochs)
    return all(last > accuracy for accuracy in before if accuracy == accuracy) and last == last


def _check(
    data: Any, test: Any, steps: int | None, recipe: Recipe, out: Path | None,
    resume: bool | str | Path,
) -> None:  # fmt: skip
    if is_data(data):
        _check_data(data, recipe)
        for name, value in (("test", test), ("steps", steps)):
            if value is not None:
                raise ValueError(f"{name}: expected None with a data set of load_data")
    if resume and out is None:
        raise ValueError("resume: expected out too, the folder of the run to continue")
    if out is not None and not resume:
        if (out / "model.pt").exists() or checkpoint.checkpoints(out / "checkpoints"):
            raise ValueError(f"out: {out} has files of another run; resume it or change out")


def _check_data(data: Any, recipe: Recipe) -> None:
    images, here = data.count("train"), world()
    if not images or not data.count("test"):
        raise ValueError(
            f"data: expected images to train on and to test on, got {images} and "
            f"{data.count('test')}; an image folder needs train and val, or a class of at least 5 "
            "images"
        )
    if recipe.batch_size > images:
        raise ValueError(
            f"batch_size: expected at most the {images} training images, got {recipe.batch_size}; "
            "choose a smaller one (--batch-size)"
        )
    parts = here.size * recipe.accumulate
    if recipe.batch_size % parts:
        raise ValueError(
            f"batch_size: expected a multiple of {parts} ({here.size} processes × "
            f"{recipe.accumulate} parts), got {recipe.batch_size}"
        )


@contextmanager
def _run_lock(folder: Path) -> Iterator[None]:
    """Context in which no other run writes to `folder`; files of a killed run are removed."""
    try:
        with locked(folder / LOCK, wait=False):
            remove_parts(folder)
            yield
    except InUse as error:
        raise ValueError(f"out: {folder} is {error}; choose another folder (--out)") from None


def _about(spec: ModelSpec | None, data: Any, recipe: Recipe) -> dict[str, Any]:
    """What every file of the run stores besides tensors."""
    own = is_data(data)
    return {
        "spec": None if spec is None else {"name": spec.name, "options": dict(spec.options)},
        "data": data.name if own else LoaderFeed.name,
        "classes": list(data.classes) if own else None,
        "preprocessing": asdict(data.preprocessing) if own else None,
        "recipe": recipe.as_dict(),
    }


def _resume(state: State, about: dict[str, Any], out: Path, resume: bool | str | Path):
    """Load a checkpoint into `state`; returns its path, or None if there is none yet."""
    if resume is True:
        found = checkpoint.read_last(out / "checkpoints")
        if found is None:
            return None
        path, content = found
    else:
        path = Path(resume)
        content = checkpoint.read(path)
    if "training" not in content:
        raise ValueError(f"resume: {path} has only a model; expected a checkpoint")
    folder = out / "checkpoints"
    if path.resolve().parent != folder.resolve() and checkpoint.checkpoints(folder):
        raise ValueError(f"out: {out} has files of another run; resume it or change out")
    if not isinstance(content.get("recipe"), dict):
        raise CheckpointError(f"{path}: recipe: expected a dict")
    there_is, here_is = (
        {**one, **(one["spec"] or {}), **one["recipe"]} for one in (content, about)
    )
    for name, here in here_is.items():
        there = there_is.get(name)
        inner = name == "recipe" or (name == "spec" and there and here)
        if not inner and name not in EXTENDED and not equal(there, here):
            raise ValueError(
                f"resume: {path} has {name} {given(there)}, this run has {given(here)}"
            )
    try:
        state.load_state_dict(content["training"])
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    return path


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Within it, nondeterministic operations raise an error."""
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
