"""`fit` on a DataLoader or any iterable of batches; its loss, optimizer and callbacks."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training_cases import RECIPE, assert_same, data, metrics, model

import resnet_fast
from resnet_fast.training import Interrupted, evaluate, fit
from resnet_fast.training.checkpoint import ModelSpec, read
from resnet_fast.training.distributed import batches, world
from resnet_fast.training.weights import load_weights

PLAIN = replace(RECIPE, augment="auto", warmup=0.0)


def tensors(split="train"):
    """Normalized images and labels."""
    bands = data()
    x, y = bands._split(split)
    return bands.preprocessing.normalize(x), y


def loader(split="train", **options):
    return DataLoader(TensorDataset(*tensors(split)), batch_size=24, **options)


def test_a_loader_equals_the_data_set():
    """The batches of the data set without augmentation, in its order, give its run bit by bit."""
    recipe, bands = replace(PLAIN, augment="none"), data()
    whole = fit(model(), bands, recipe)
    x, y = tensors()

    class Same:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            for indices in batches(len(y), 24, recipe.seed, self.epoch, world()):
                yield x[indices], y[indices]

    net = model()
    history = fit(net, Same(), PLAIN, test=loader("test"), steps=4)
    assert history.losses == whole.losses
    for row, wanted in zip(metrics(history), metrics(whole), strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)
    assert evaluate(net, loader("test")).accuracy == evaluate(net, bands).accuracy
    assert torch.equal(evaluate(net, loader("test")).confusion, evaluate(net, bands).confusion)


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*tensors(), strict=True)


class Labelled(Dataset):
    """Soft labels, one-hot."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        x, y = tensors()
        return x[i], F.one_hot(y[i], 4).float()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (loader(), None),
        lambda: (loader(drop_last=True, num_workers=1, persistent_workers=True), None),
        lambda: (DataLoader(Stream(), batch_size=24), 4),
        lambda: ([(x, y.int()) for x, y in loader(drop_last=True)], None),
        lambda: (loader(), 3),
    ],
    ids=["last-batch-of-4", "worker", "stream", "list-of-int32", "three-steps"],
)
def test_kinds_of_loaders(make):
    """Every batch is one step; figures are over images, and the last batch may be smaller."""
    batches, steps = make()
    seen = []
    recipe = replace(PLAIN, epochs=2, batch_size=1, accumulate=1)
    history = fit(
        model(), batches, recipe, test=loader("test"), steps=steps,
        callbacks={"step": [lambda event: seen.append(event)]},
    )  # fmt: skip
    count = steps or len(batches)
    assert len(seen) == len(history.losses) == 2 * count
    assert [event["step"] for event in seen] == [*range(1, count + 1)] * 2
    for event, loss in zip(seen, history.losses, strict=True):
        assert event["loss"].item() == pytest.approx(loss)
    images = sum(event["images"] for event in seen[:count])
    mean = sum(e["images"] * e["loss"].item() for e in seen[:count]) / images
    assert history.epochs[0]["train_loss"] == pytest.approx(mean)
    assert history.epochs[0]["test_loss"] > 0


def test_one_hot_targets_are_labels():
    hard = fit(model(), loader(), replace(PLAIN, epochs=1), test=loader("test"))
    soft = fit(model(), DataLoader(Labelled(), 24), replace(PLAIN, epochs=1), test=loader("test"))
    assert soft.losses == pytest.approx(hard.losses, rel=1e-5)
    assert soft.epochs[0]["train_accuracy"] == hard.epochs[0]["train_accuracy"]
    assert evaluate(model(), DataLoader(Labelled(), 24)).loss > 0


def test_without_a_test_its_figures_are_nan(tmp_path):
    history = fit(model(), loader(), replace(PLAIN, epochs=1), out=tmp_path)
    assert math.isnan(history.epochs[0]["test_accuracy"])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["epoch-0001.pt"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffling_loader_resumes_bit_by_bit(tmp_path, stop_at, workers):
    """In the middle of an epoch too: the order depends on the recipe's seed and the epoch."""
    make = {"shuffle": True, "num_workers": workers}
    net = model(dropout=0.5)
    whole = fit(net, loader(**make), PLAIN, test=loader("test"))
    other = fit(model(dropout=0.5), loader(**make), replace(PLAIN, seed=1), test=loader("test"))
    assert other.losses != whole.losses
    stop_at(7)
    with pytest.raises(Interrupted):
        fit(model(dropout=0.5), loader(**make), PLAIN, test=loader("test"), out=tmp_path)
    again = model(dropout=0.5)
    history = fit(again, loader(**make), PLAIN, test=loader("test"), out=tmp_path, resume=True)
    assert history.losses == whole.losses
    assert_same(again.state_dict(), net.state_dict())


def test_a_model_of_a_loader_is_read_by_its_name(tmp_path):
    """Its file has neither class names nor a preprocessing, and load_weights says so."""
    fit(model(), loader(), replace(PLAIN, epochs=1), out=tmp_path)
    content = read(tmp_path / "model.pt")
    assert (content["data"], content["classes"], content["preprocessing"]) == ("loader", None, None)
    net = resnet_fast.create_model("cifar_resnet20", num_classes=4)
    spec = ModelSpec("cifar_resnet20", {"num_classes": 4})
    fit(net, loader(), replace(PLAIN, epochs=1), out=tmp_path / "named", spec=spec)
    loaded = load_weights(tmp_path / "named" / "model.pt")
    assert loaded.name == "cifar_resnet20"
    assert loaded.classes is None
    assert any("no preprocessing" in line for line in loaded.notes)
    assert_same(loaded.model.state_dict(), net.state_dict())


def test_a_loss_of_ones_own():
    """The training minimizes it, and the test reports it."""

    def brier(logits, y):
        return (logits.softmax(1) - F.one_hot(y, 4)).square().sum(1).mean()

    net = model()
    history = fit(net, data(), RECIPE, loss=brier)
    assert max(history.losses) <= 2
    assert history.losses[0] != fit(model(), data(), RECIPE).losses[0]
    found = evaluate(net, data(), loss=brier)
    assert history.epochs[-1]["test_loss"] == found.loss
    x, y = tensors("test")
    with torch.no_grad():
        assert found.loss == pytest.approx(brier(net.eval()(x), y).item(), rel=1e-5)


@pytest.mark.parametrize("given", ["object", "function"])
def test_an_optimizer_of_ones_own(given, tmp_path):
    """RMSprop with two rates; the schedule multiplies both, and a checkpoint has its state."""
    net, rates = model(), []

    def make(parameters):
        first, *rest = parameters
        groups = [{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 1e-3}]
        optimizer = torch.optim.RMSprop(groups)
        made.append(optimizer)
        return optimizer

    def note(event):
        rates.append([group["lr"] for group in made[-1].param_groups])

    made = []
    asked = make if given == "function" else make(list(net.parameters()))
    history = fit(net, data(), RECIPE, optimizer=asked, out=tmp_path, callbacks={"step": note})
    assert all(one == pytest.approx(other / 10) for one, other in rates)
    assert rates[3] == pytest.approx([1e-4, 1e-3])  # the end of the warm-up
    assert rates[-1] == [0.0, 0.0]  # of the step after the last
    assert history.epochs[0]["lr"] == pytest.approx(1e-4)
    again = model()
    path = tmp_path / "checkpoints" / "epoch-0002.pt"
    asked = make if given == "function" else make(list(again.parameters()))
    resumed = fit(again, data(), RECIPE, optimizer=asked, out=tmp_path, resume=path)
    assert resumed.losses == history.losses
    assert_same(again.state_dict(), net.state_dict())


def test_callbacks_by_event():
    seen = []
    row = lambda event: seen.append(("epoch", event["epoch"], event["test_accuracy"]))  # noqa: E731
    step = lambda event: seen.append(("step", event["epoch"], event["step"]))  # noqa: E731
    rates = []
    history = fit(
        model(), data(), replace(RECIPE, epochs=2),
        callbacks={"epoch": row, "step": [step, lambda event: rates.append(event["lr"])]},
    )  # fmt: skip
    wanted = [
        line for row in history.epochs for line in
        [*(("step", row["epoch"], i + 1) for i in range(4)),
         ("epoch", row["epoch"], row["test_accuracy"])]
    ]  # fmt: skip
    assert seen == wanted
    assert rates[:4] == pytest.approx([RECIPE.lr * i / 4 for i in (1, 2, 3, 4)])
    assert rates[3] == history.epochs[0]["lr"]


X, Y = tensors()
PAIR = [(X[:8], Y[:8])]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": iter(PAIR)}, "data: expected an iterable that starts again in every epoch, got"),
        ({"data": 5}, "data: expected a data set of load_data, or an iterable of batches"),
        ({"data": []}, "data: expected batches to train on, got none"),
        ({"data": [X]}, r"data: expected batches \(images, targets\)"),
        ({"data": [(X[:8], Y[:7])]}, "got targets .* for 8 images"),
        ({"data": [(X[:8].byte(), Y[:8])]}, r"got images \[8, 3, 8, 8\] in torch.uint8"),
        ({"data": [(X[:8], Y[:8].float())]}, r"got targets \[8\] in torch.float32"),
        ({"data": [(X[:8], Y[:8, None])]}, r"got targets \[8, 1\] in torch.int64"),
        ({"data": [(X[:8], Y[:8] + 4)]}, "data: expected targets from 0 to 3"),
        ({"data": [(X[:8], torch.rand(8, 5))]}, "data: expected targets of 4 classes, got 5"),
        ({"data": [(X[:0], Y[:0])]}, r"got images \[0, 3, 8, 8\]"),
        ({"data": DataLoader(Stream(), 24)}, "steps: expected the batches of an epoch"),
        ({"data": DataLoader(Stream(), 24), "steps": 9}, "data: ended after 5 of 9 batches"),
        ({"data": PAIR, "steps": 2}, "steps: expected at most the 1 batches of data, got 2"),
        ({"data": PAIR, "steps": 0}, "steps: expected an integer of at least 1, got 0"),
        ({"data": PAIR, "test": 5}, "test: expected a data set of load_data, or an iterable"),
        ({"data": PAIR, "test": []}, "test: expected batches to test on, got none"),
        ({"data": PAIR, "test": [X]}, r"test: expected batches \(images, targets\)"),
        ({"data": data(), "test": PAIR}, "test: expected None with a data set of load_data"),
        ({"data": PAIR, "recipe": replace(PLAIN, mixup=0.2)}, "mixup: a loader augments its"),
        ({"data": PAIR, "recipe": RECIPE}, "augment: a loader augments its images itself"),
        ({"optimizer": lambda p: torch.optim.SGD(p, torch.tensor(0.1))}, "a number as lr, got ten"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer: expected one that needs no closure"),
        ({"loss": lambda x, y: x.detach().mean()}, "loss: expected one that depends on parameters"),
        ({"loss": 3}, "loss: expected a function of logits and targets, got 3"),
        ({"loss": lambda x, y: x}, r"loss: expected the mean over the batch, .* got \[8, 4\]"),
        ({"loss": lambda x, y: 1.0}, "loss: expected the mean over the batch, .* got 1.0"),
        ({"optimizer": 3}, "optimizer: expected a torch.optim.Optimizer or a function"),
        ({"optimizer": lambda p: p}, "optimizer: expected a torch.optim.Optimizer or a function"),
        ({"optimizer": torch.optim.SGD(model().parameters())}, "optimizer: expected only param"),
        ({"callbacks": {"batch": print}}, "callbacks: expected events step, epoch, got 'batch'"),
        ({"callbacks": {"step": 5}}, "callbacks: step: expected a function or a list, got 5"),
        ({"callbacks": {"step": [5]}}, "callbacks: step: expected a function or a list"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_named(options, says):
    given = {"model": model(), "data": PAIR, "recipe": replace(PLAIN, epochs=1), **options}
    with pytest.raises(ValueError, match=says):
        fit(**given)


def test_logits_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"model: expected logits .* got \[8, 4, 8, 8\]"):
        fit(nn.Conv2d(3, 4, 1), PAIR, replace(PLAIN, epochs=1))


def test_gradients_of_before_do_not_count():
    """Neither those that are there when it starts, nor those of parameters that are not trained."""
    net, twin = model(), model()
    x, y = tensors()
    F.cross_entropy(net.eval()(x), y).backward()
    fit(net, data(), replace(RECIPE, epochs=1))
    fit(twin, data(), replace(RECIPE, epochs=1))
    assert_same(net.state_dict(), twin.state_dict())
    assert all(p.grad is None for p in net.parameters())


def test_clipping_is_of_what_the_optimizer_has(monkeypatch):
    seen, net = [], model()
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, _: seen.append(parameters))
    fit(net, data(), replace(RECIPE, clip=1.0, epochs=1),
        optimizer=torch.optim.SGD(net.fc.parameters(), 0.1))  # fmt: skip
    assert len(seen) == 4
    assert all(set(found) == set(net.fc.parameters()) for found in seen)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True), lambda p: torch.optim.Adafactor(p, 1e-2)],
    ids=["amsgrad", "adafactor"],
)
def test_other_optimizers_resume_bit_by_bit(make, tmp_path):
    net, again = model(), model()
    history = fit(net, data(), RECIPE, optimizer=make, out=tmp_path)
    path = tmp_path / "checkpoints" / "epoch-0002.pt"
    assert fit(again, data(), RECIPE, optimizer=make, out=tmp_path, resume=path).losses == (
        history.losses
    )
    assert_same(again.state_dict(), net.state_dict())


class Noisy(Dataset):
    """Images with noise from PyTorch's generator."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return X[i] + torch.randn(()), Y[i]


def test_random_transforms_resume_bit_by_bit(tmp_path, stop_at):
    """In the process that trains, whose generator a resumed run has as it was."""
    net = model(dropout=0.5)
    whole = fit(net, DataLoader(Noisy(), 24), PLAIN)
    stop_at(7)
    with pytest.raises(Interrupted):
        fit(model(dropout=0.5), DataLoader(Noisy(), 24), PLAIN, out=tmp_path)
    again = model(dropout=0.5)
    history = fit(again, DataLoader(Noisy(), 24), PLAIN, out=tmp_path, resume=True)
    assert history.losses == whole.losses
    assert_same(again.state_dict(), net.state_dict())


def test_a_callback_cannot_change_the_history():
    rows = []
    history = fit(model(), data(), replace(RECIPE, epochs=2),
                  callbacks={"epoch": [lambda row: row.clear(), rows.append]})  # fmt: skip
    assert [row["epoch"] for row in history.epochs] == [1, 2]


def test_batch_size_of_the_recipe_has_no_effect():
    fit(model(), PAIR, replace(PLAIN, epochs=1, batch_size=128, accumulate=5))


def test_an_iterator_is_enough_to_evaluate():
    assert evaluate(model(), iter(PAIR)).confusion.sum() == 8
