"""`fit` with the augmentations of torchvision: RandAugment, random erasing, MixUp, CutMix."""

import sys
from dataclasses import replace

import pytest
import torch
import torchvision_ops
from training_cases import RECIPE, assert_same, data, metrics, model

from resnet_fast.runtime.optional import MissingPackage
from resnet_fast.training import Interrupted, fit
from resnet_fast.training.loop import _Run

MISSING = torchvision_ops.why_not("torchvision.transforms.v2")
KINDS = {
    "randaugment": {"randaugment": 9},
    "random_erasing": {"random_erasing": 0.9},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "all": {"randaugment": 5, "random_erasing": 0.2, "mixup": 0.2, "cutmix": 1.0},
}

needs_torchvision = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")


@pytest.fixture
def batches(monkeypatch):
    """Inputs and targets of every step."""
    seen, step = [], _Run.step

    def noted(run, x, y):
        seen.append((x.clone(), y.clone()))
        return step(run, x, y)

    monkeypatch.setattr(_Run, "step", noted)
    return seen


@needs_torchvision
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_change_and_repeat(kind, batches):
    """Every kind changes images, in another way in another epoch, and a run repeats bit by bit."""
    recipe = replace(RECIPE, epochs=2, augment="none", **KINDS[kind])
    first = fit(model(), data(), recipe)
    mine = list(batches)
    batches.clear()
    again = fit(model(), data(), recipe)
    assert first.losses == again.losses
    assert_same(mine, list(batches))
    batches.clear()
    fit(model(), data(), replace(RECIPE, epochs=2, augment="none"))
    changed, mixes = 0, kind in ("mixup", "cutmix", "all")
    for (x, y), (plain, labels) in zip(mine, batches, strict=True):
        changed += (x != plain).any().item()
        if mixes:
            assert y.shape == (24, 4)
            torch.testing.assert_close(y.sum(1), torch.ones(24))
            both = y.gather(1, labels[:, None]) + y.gather(1, labels.roll(1)[:, None])
            same = labels == labels.roll(1)  # the label of an image and of the one before it
            torch.testing.assert_close(both[~same], torch.ones_like(both[~same]))
        else:
            assert torch.equal(y, labels)
    assert changed > len(mine) / 2  # a rectangle of CutMix may be empty
    assert all(0 <= row["train_accuracy"] <= 1 for row in first.epochs)


@needs_torchvision
def test_they_resume_bit_by_bit(tmp_path, stop_at):
    recipe = replace(RECIPE, **KINDS["all"])
    net = model()
    whole = fit(net, data(), recipe)
    stop_at(6)
    with pytest.raises(Interrupted):
        fit(model(), data(), recipe, out=tmp_path)
    again = model()
    history = fit(again, data(), recipe, out=tmp_path, resume=True)
    assert metrics(history) == metrics(whole)
    assert_same(again.state_dict(), net.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_without_torchvision_it_is_named(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    with pytest.raises(MissingPackage, match="need a torchvision that matches torch"):
        fit(model(), data(size=16), replace(RECIPE, **KINDS[kind]))
