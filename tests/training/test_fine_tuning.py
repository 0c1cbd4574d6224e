"""Fine-tuning from a file of `fit` needs fewer epochs than training from random weights."""

from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast.training import Recipe, fit, load_data, load_weights
from resnet_fast.training.checkpoint import ModelSpec

NAME, WANTED, IMAGES = "cifar_resnet20", 0.9, 300
RECIPE = Recipe(epochs=5, batch_size=20, lr=0.02, warmup=1.0, nesterov=True)


def even_or_odd():
    """The digits as two classes, with 300 training images."""
    data = load_data("digits")
    return replace(
        data, classes=("even", "odd"), train_x=data.train_x[:IMAGES],
        train_y=data.train_y[:IMAGES] % 2, test_y=data.test_y % 2,
    )  # fmt: skip


def epochs_to(history):
    """Epochs until the test accuracy is WANTED; one more than there are if it never is."""
    rows = (row["epoch"] for row in history.epochs if row["test_accuracy"] >= WANTED)
    return next(rows, RECIPE.epochs + 1)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A net of the ten digits."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    net, spec = resnet_fast.create_model(NAME), ModelSpec(NAME, {"num_classes": 10})
    fit(net, load_data("digits"), replace(RECIPE, batch_size=32, lr=0.05), out=out, spec=spec)
    return out / "model.pt"


@pytest.fixture(scope="module")
def scratch():
    """Epochs from random weights, at the better of two learning rates."""
    found = []
    for lr in (0.05, 0.02):
        torch.manual_seed(1)
        net = resnet_fast.create_model(NAME, num_classes=2)
        found.append(epochs_to(fit(net, even_or_odd(), replace(RECIPE, lr=lr))))
    return min(found)


@pytest.mark.parametrize("freeze", [(), ("stem", "layer1")], ids=["all", "frozen"])
def test_fewer_epochs_than_from_scratch(pretrained, scratch, freeze):
    data = even_or_odd()
    torch.manual_seed(1)  # of the new head
    loaded = load_weights(pretrained, classes=data.classes)
    assert any("a new head of 2 classes" in note for note in loaded.notes)
    tuned = epochs_to(fit(loaded.model, data, replace(RECIPE, freeze=freeze)))
    print(f"{WANTED:.0%} after {tuned} epochs, from scratch after {scratch}")
    assert tuned < scratch
