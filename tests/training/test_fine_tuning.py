"""Fine-tuning from a file of `fit` needs fewer epochs than training from random weights."""

from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast.training import Recipe, fit, load_data, load_weights
from resnet_fast.training.checkpoint import ModelSpec

NAME = "cifar_resnet20"
EPOCHS, WANTED = 6, 0.95
RECIPE = Recipe(epochs=EPOCHS, batch_size=32, lr=0.05, warmup=1.0, nesterov=True)


def digits(low, high):
    """The scans of the digits from `low` to before `high`."""
    data = load_data("digits")
    parts = {}
    for split in ("train", "test"):
        x, y = data._split(split)
        chosen = (y >= low) & (y < high)
        parts |= {f"{split}_x": x[chosen], f"{split}_y": y[chosen] - low}
    return replace(data, classes=data.classes[low:high], **parts)


def epochs_to(history):
    """Epochs until the test accuracy is WANTED; EPOCHS + 1 if it never is."""
    rows = (row["epoch"] for row in history.epochs if row["test_accuracy"] >= WANTED)
    return next(rows, EPOCHS + 1)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A net of the digits 0 to 4."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    net = resnet_fast.create_model(NAME, num_classes=5)
    spec = ModelSpec(NAME, {"num_classes": 5})
    fit(net, digits(0, 5), replace(RECIPE, epochs=8), out=out, spec=spec)
    return out / "model.pt"


@pytest.fixture(scope="module")
def scratch():
    """Epochs from random weights, at the better of two learning rates."""
    found = []
    for lr in (0.05, 0.02):
        torch.manual_seed(1)
        net = resnet_fast.create_model(NAME, num_classes=5)
        found.append(epochs_to(fit(net, digits(5, 10), replace(RECIPE, lr=lr))))
    return min(found)


@pytest.mark.parametrize("freeze", [(), ("stem", "layer1")], ids=["all", "frozen"])
def test_fewer_epochs_than_from_scratch(pretrained, scratch, freeze):
    """On the digits 5 to 9, which the file has not seen."""
    others = digits(5, 10)
    loaded = load_weights(pretrained, classes=others.classes)
    assert any("a new head of 5 classes" in note for note in loaded.notes)
    tuned = epochs_to(fit(loaded.model, others, replace(RECIPE, lr=0.02, freeze=freeze)))
    print(f"{WANTED:.0%} after {tuned} epochs, from scratch after {scratch}")
    assert tuned < scratch
