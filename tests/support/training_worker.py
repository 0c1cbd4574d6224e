"""Processes of the tests: one that trains until something ends it, and ranks of `torchrun`.

training_worker.py train OUT    says "step N" after every step; further words: LAST "step",
                                die of SIGKILL in that step; LAST "write", die of it while the
                                checkpoint after LAST epochs is written; LAST "wait", go no
                                further until SIGTERM comes
training_worker.py ranks OUT    under torchrun: leaves what it did in OUT/rank-N.pt
training_worker.py synchronized OUT    the same, of the case with synchronized statistics
"""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training_cases import RECIPE, STEPS, data, model, without_norms

from resnet_fast.training import Interrupted, fit, signals
from resnet_fast.training.distributed import processes, world
from resnet_fast.training.loop import _Run

SAVED = replace(RECIPE, ema=0.9)


def die():
    """As `kill -9` does, at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def told():
    """Whether the handler of `fit` has seen a signal."""
    return signal.getsignal(signal.SIGTERM).number


def train(out, last=None, kind=None):
    """A run of SAVED into `out`, from where it is."""
    torch.set_num_threads(1)
    step, write = _Run.step, torch.save

    def spoken(run, x, y):
        done = step(run, x, y)
        number = len(run.state.history.losses) + run.state.step + 1
        print(f"step {number}", flush=True)
        if kind == "step" and number == int(last):
            die()
        while kind == "wait" and number == int(last) and not told():
            time.sleep(0.01)
        return done

    def torn(content, file):
        if kind == "write" and content["training"]["epoch"] == int(last):
            file.write(b"half of a checkpoint")
            file.flush()
            die()
        write(content, file)

    _Run.step, torch.save = spoken, torn
    fit(model(dropout=0.2), data(), SAVED, out=out, resume=True)


def ranks(out, names=("without norms", "norms")):
    """The cases `names` of `cases`, each with its weights, metrics and images."""
    torch.set_num_threads(1)
    found = {}
    with processes("cpu"):
        for name in names:
            net, recipe = cases()[name]
            indices, step = [], _Run.step

            def watched(run, x, y, indices=indices, step=step):
                indices.append(x.double().sum((1, 2, 3)))
                return step(run, x, y)

            _Run.step = watched
            try:
                history = fit(net, data(), recipe, out=Path(out, name))
            finally:
                _Run.step = step
            found[name] = {
                "weights": net.state_dict(), "losses": history.losses, "epochs": history.epochs,
                "seen": indices,
            }  # fmt: skip
        if "norms" in names:
            found["interrupted"] = interrupted(Path(out, "interrupted"))
            found["loader"] = loaded()
        torch.save(found, Path(out, f"rank-{world().rank}.pt"))


def interrupted(out):
    """The case "norms" once more; SIGTERM comes to the second process alone, in step 5."""
    signals.AGREE_EVERY = 3
    step = _Run.step

    def signalled(run, x, y):
        if world().rank == 1 and run.state.epoch * STEPS + run.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, x, y)

    net, recipe = cases()["norms"]
    _Run.step = signalled
    try:
        fit(net, data(), recipe, out=out)
    except Interrupted as stopped:
        path = str(stopped.path)
    finally:
        _Run.step = step
    net, recipe = cases()["norms"]
    history = fit(net, data(), recipe, out=out, resume=True)
    return {"weights": net.state_dict(), "losses": history.losses, "path": path}


def loaded():
    """A loader of the caller: each process has its share by DistributedSampler."""
    images = data()
    pairs = TensorDataset(images.preprocessing.normalize(images.train_x), images.train_y)
    sampler = DistributedSampler(pairs, seed=RECIPE.seed)
    loader = DataLoader(pairs, RECIPE.batch_size // 2, sampler=sampler, drop_last=True)
    net = without_norms()
    history = fit(net, loader, replace(RECIPE, augment="auto"))
    try:
        fit(net, list(loader)[world().rank :], replace(RECIPE, augment="auto"))
    except ValueError as error:
        unequal = str(error)
    return {"weights": net.state_dict(), "losses": history.losses, "unequal": unequal}


def synchronized(out):
    """`ranks` of the case with synchronized statistics."""
    ranks(out, ["synchronized"])


def cases():
    """Name → (net, recipe), the same in every process; the nets are in double."""
    double = torch.float64
    return {
        "without norms": (without_norms(), replace(RECIPE, accumulate=2)),
        "norms": (model(dtype=double), replace(RECIPE, ema=0.9)),
        "synchronized": (model(dtype=double), replace(RECIPE, sync_bn=True)),
    }


if __name__ == "__main__":
    {"train": train, "ranks": ranks, "synchronized": synchronized}[sys.argv[1]](*sys.argv[2:])
