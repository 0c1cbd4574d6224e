"""`fit`: the training loop."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..runtime.files import InUse, locked, remove_parts
from ..spec.values import check_flag, given, integer
from . import checkpoint, distributed
from .augment import Draws, augment
from .checkpoint import CheckpointError, Keeper, ModelSpec
from .checks import MOST, check_data, check_device, check_logits, check_model, check_path
from .distributed import world
from .evaluation import as_input, at_least_fp32, autocast, evaluate
from .forms import equal
from .history import History
from .recipe import Recipe, lr_factor
from .recompute import checkpointing
from .report import Log
from .signals import Interrupted, stop_signals
from .state import State

LOCK = ".lock"


def fit(
    model: nn.Module,
    data: Any,
    recipe: Recipe,
    *,
    device: str | torch.device = "cpu",
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
    out: str | Path | None = None,
    resume: bool | str | Path = False,
    spec: ModelSpec | None = None,
    workers: int = 0,
    progress: bool = False,
) -> History:
    """Train `model` on `data` by `recipe`, and test it after every epoch.

    Under `torchrun` (`distributed.processes`) every process calls it, with equal models.

    Args:
        model: maps images [N, data.channels, data.size, data.size] to logits
            [N, data.num_classes]. It is moved to `device`, trained in place and left in training
            mode.
        data: from `load_data`.
        recipe: the hyperparameters.
        device: device to train on.
        on_epoch: called after every epoch, on the first process, with its row of
            `History.epochs`.
        out: folder for checkpoints, metrics and the final `model.pt`; None writes nothing.
        resume: True continues from the last checkpoint under `out`, or starts if there is none; a
            path continues from that checkpoint. The result is bitwise that of an uninterrupted
            run, given an equal machine and equal numbers of threads and processes. A GPU also
            needs `recipe.deterministic`.
        spec: how to create the model; stored in the files, so that `resnet-fast eval` and
            `predict` need no model name.
        workers: processes that read the images of an imagefolder; 0 reads them in this one.
        progress: show progress bars if stderr is a terminal.

    Returns:
        The metrics of every epoch and the loss of every step, those before a resume included.

    Raises:
        ValueError: an argument, an attribute of the recipe or a file is invalid; the message names
            it.
        Interrupted: SIGTERM or SIGINT came, and `out` is given; a checkpoint has every step so far.
    """
    check_model(model)
    check_data(data)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe: expected a Recipe, got {given(recipe)}")
    device = check_device(device)
    if not (on_epoch is None or callable(on_epoch)):
        raise ValueError(f"on_epoch: expected a function or None, got {given(on_epoch)}")
    if out is not None:
        check_path(out, "out")
    if not isinstance(resume, bool):
        check_path(resume, "resume")
    if not (spec is None or isinstance(spec, ModelSpec)):
        raise ValueError(f"spec: expected a ModelSpec or None, got {given(spec)}")
    integer(workers, "workers", "an integer of at least 0", 0, MOST)
    check_flag(progress, "progress")
    folder = None if out is None else Path(out)
    _check(data, recipe, folder, resume)
    with ExitStack() as stack:
        if folder is not None and world().first:
            stack.enter_context(_run_lock(folder))
        fmt = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model.to(device, memory_format=fmt).train()
        run = _Run(model, data, recipe, device, workers, progress)
        about = _about(spec, data, recipe)
        keeper = None
        if folder is not None:
            resumed = _resume(run.state, about, folder, resume) if resume else None
            keeper = Keeper(folder / "checkpoints", resumed)

        def save() -> Path:
            content = run.state.state_dict()  # a collective call
            if not run.here.first:
                return keeper.folder
            weights = run.state.best.state_dict()
            return keeper.write(
                run.state.epoch, run.state.step, {**about, "weights": weights, "training": content}
            )

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
            for step in run.steps():
                if keeper is not None and stop.asked(step, device):
                    raise Interrupted(stop.number, save())
            row = run.end_epoch()
            if keeper is not None:
                save()
            log.epoch(history)
            if on_epoch is not None and run.here.first:
                on_epoch(row)
        if folder is not None and run.here.first:
            weights = run.state.best.state_dict()
            checkpoint.write(folder / "model.pt", {**about, "weights": weights})
    return history


class _Run:
    """A training run: model, data, recipe and progress (`state`)."""

    def __init__(self, model, data, recipe: Recipe, device, workers: int, progress: bool) -> None:
        self.data, self.recipe, self.device, self.workers = data, recipe, device, workers
        self.here = world()
        self.progress = progress and self.here.first
        self.steps_an_epoch = data.count("train") // recipe.batch_size
        self.state = State(model, recipe, self.steps_an_epoch, device)
        self.augmentation = data.augmentation if recipe.augment == "auto" else recipe.augment
        self.share = recipe.batch_size // self.here.size
        self.before: tuple[Tensor, Tensor] | None = None
        share = slice(self.here.rank, None, self.here.size)
        self.draws = Draws(self.state.generator, recipe.batch_size, share)
        self.runner = torch.compile(model) if recipe.compile else model
        if self.here.size > 1:
            devices = [device] if device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, devices)
        if recipe.sync_bn:  # in place, after DDP: on a CPU DDP rejects a converted model
            nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def steps(self) -> Iterator[int]:
        """Train the rest of the current epoch; yields the number of steps so far after each."""
        state, images = self.state, self.recipe.batch_size
        order = distributed.batches(
            self.data.count("train"), images, self.recipe.seed, state.epoch, self.here
        )
        state.model.train()
        self.start, self.seen = time.perf_counter(), (len(order) - state.step) * images
        with tqdm(
            desc=f"epoch {state.epoch + 1}/{self.recipe.epochs}", unit=" images", leave=False,
            total=len(order) * images, initial=state.step * images,
            disable=None if self.progress else True,
        ) as bar:  # fmt: skip
            left = order[state.step :]
            for x, y in self.data.batches("train", left, self.device, self.workers):
                x, y = self.filled(x, y)
                x = augment(self.augmentation, x, self.data.size, self.draws)
                x = as_input(x, self.data.preprocessing, state.model)
                state.tally[state.step] = self.step(x, y)
                state.step += 1
                bar.update(images)
                yield state.epoch * len(order) + state.step

    def filled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
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

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimizer step on this process's x, y; returns its part of [loss, correct images]."""
        state, recipe, parts = self.state, self.recipe, self.recipe.accumulate
        figures = torch.zeros(2, device=self.device)
        for part, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            together = self.here.size == 1 or part == parts - 1
            with nullcontext() if together else self.runner.no_sync():
                with autocast(self.device, recipe.precision):
                    logits = self.runner(xs)
                check_logits(logits, self.data.num_classes)
                logits = at_least_fp32(logits)
                loss = F.cross_entropy(logits, ys, label_smoothing=recipe.label_smoothing) / parts
                state.scaler.scale(loss).backward()
            right = (logits.detach().argmax(1) == ys).sum()
            figures += torch.stack([loss.detach() / self.here.size, right])
        if recipe.clip is not None:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.schedule.step()
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        return figures

    def end_epoch(self) -> dict[str, Any]:
        """Test the model and add the epoch's row to the history; returns the row."""
        state, recipe, steps = self.state, self.recipe, self.steps_an_epoch
        tally = state.reduced_tally()  # waits for the device
        trained = time.perf_counter() - self.start
        distributed.same_buffers(state.model)
        if state.averaged is not None:
            distributed.same_buffers(state.averaged)
        test = evaluate(
            state.best, self.data, device=self.device, precision=recipe.precision,
            workers=self.workers,
        )  # fmt: skip
        losses, correct = tally.unbind(1)
        last = (state.epoch + 1) * steps - 1
        row = {
            "epoch": state.epoch + 1,
            "lr": recipe.lr * lr_factor(recipe, last, steps),
            "train_loss": losses.mean().item(),
            "train_accuracy": correct.sum().item() / (steps * recipe.batch_size),
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "images_per_second": self.seen / trained if trained > 0 else 0.0,
            "seconds": time.perf_counter() - self.start,
        }
        state.history.epochs.append(row)
        state.history.losses += losses.tolist()
        state.epoch, state.step = state.epoch + 1, 0
        state.tally.zero_()
        return row


def _check(data: Any, recipe: Recipe, out: Path | None, resume: bool | str | Path) -> None:
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
    if resume and out is None:
        raise ValueError("resume: expected out too, the folder of the run to continue")
    if out is not None and not resume and checkpoint.checkpoints(out / "checkpoints"):
        raise ValueError(f"out: {out} has checkpoints of another run; resume it or change out")


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
    return {
        "spec": None if spec is None else {"name": spec.name, "options": dict(spec.options)},
        "data": data.name,
        "classes": list(data.classes),
        "preprocessing": asdict(data.preprocessing),
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
    if not isinstance(content.get("recipe"), dict):
        raise CheckpointError(f"{path}: recipe: expected a dict")
    for name, here in {**about, **about["recipe"]}.items():
        there = {**content, **content["recipe"]}.get(name)
        if name != "recipe" and not equal(there, here):
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
