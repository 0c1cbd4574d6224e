"""`fit` does what its recipe says, each part compared with the same by hand."""

import functools
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_cases import RECIPE, STEPS, assert_same, data, metrics, model, without_norms

import resnet_fast
from resnet_fast.dispatch import backends
from resnet_fast.training import Recipe, evaluate, fit, load_data
from resnet_fast.training.loop import _Run
from resnet_fast.training.optimizers import optimizer_of
from resnet_fast.training.recipe import PRESETS, lr_factor, recipe_for

PLAIN = Recipe(epochs=1, batch_size=24, lr=0.05, warmup=0, momentum=0, weight_decay=0,
               augment="none", schedule="constant")  # fmt: skip


OTHER = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # three classes


@pytest.fixture
def seen(monkeypatch):
    """What every step was given, and the parameters after it."""
    steps, step = [], _Run.step

    def watched(run, x, y):
        done = step(run, x, y)
        after = {k: v.detach().clone() for k, v in run.state.model.state_dict().items()}
        steps.append((x, y, after))
        return done

    monkeypatch.setattr(_Run, "step", watched)
    return steps


def test_a_step_by_hand(seen):
    """Order, normalization, cross-entropy, SGD: one epoch in double, written out."""
    bands, net, ours = data(), without_norms(), without_norms()
    recipe = replace(PLAIN, momentum=0.9, weight_decay=1e-2, label_smoothing=0.1, nesterov=True)
    history = fit(ours, bands, recipe)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(recipe.seed))
    mean, std = (
        torch.tensor(v, dtype=torch.float32).view(1, 3, 1, 1)
        for v in (bands.preprocessing.mean, bands.preprocessing.std)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, 0, 1e-2, nesterov=True)
    losses, right = [], 0
    for chosen in order[: STEPS * 24].split(24):
        x = ((bands.train_x[chosen].float() / 255 - mean) / std).double()
        y = bands.train_y[chosen]
        logits = net(x)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        right += (logits.argmax(1) == y).sum().item()
    assert len(seen) == STEPS == len(history.losses)
    assert history.losses == pytest.approx(losses, rel=1e-6)  # kept in fp32
    for ours_p, net_p in zip(ours.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours_p, net_p, rtol=1e-12, atol=1e-14)
    (row,) = history.epochs
    assert row["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-6)
    assert row["train_accuracy"] == right / (STEPS * 24)
    with torch.no_grad():
        logits = net(((bands.test_x.float() / 255 - mean) / std).double())
    assert row["test_loss"] == pytest.approx(F.cross_entropy(logits, bands.test_y).item())
    assert row["test_accuracy"] == (logits.argmax(1) == bands.test_y).double().mean().item()
    assert row["images_per_second"] > 0
    assert row["seconds"] > 0


def test_a_run_repeats_and_a_seed_changes_it():
    first, again = model(), model()
    a, b = fit(first, data(), RECIPE), fit(again, data(), RECIPE)
    assert_same(first.state_dict(), again.state_dict())
    assert a.losses == b.losses
    assert metrics(a) == metrics(b)
    other = fit(model(), data(), replace(RECIPE, seed=4))
    assert other.losses[0] != a.losses[0]


def test_the_small_net_learns():
    history = fit(model(), data(), replace(RECIPE, epochs=12))
    assert history.epochs[-1]["test_accuracy"] == 1.0
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"] / 2


def test_learning_rates_by_hand():
    recipe = Recipe(epochs=4, warmup=1.0, schedule="cosine", lr=0.4)
    found = [lr_factor(recipe, i, 2) for i in range(8)]
    cosine = [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert found == pytest.approx([0.5, 1.0, *cosine])
    step = replace(recipe, schedule="step", warmup=0.5)
    assert [lr_factor(step, i, 2) for i in range(8)] == pytest.approx(
        [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    constant = replace(recipe, schedule="constant", warmup=0)
    assert {lr_factor(constant, i, 2) for i in range(8)} == {1.0}


def test_the_optimizer_follows_the_schedule(monkeypatch):
    """The rates that the steps were made with are those of `lr_factor`."""
    used, step = [], torch.optim.SGD.step

    def watched(self, *args, **options):
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    history = fit(model(), data(), RECIPE)
    wanted = [{RECIPE.lr * lr_factor(RECIPE, i, STEPS)} for i in range(3 * STEPS)]
    assert used == wanted
    assert [{row["lr"]} for row in history.epochs] == wanted[STEPS - 1 :: STEPS]


def test_decay_without_norms_and_biases():
    net = model()
    first, rest = optimizer_of(net, replace(RECIPE, decay_norms=False)).param_groups
    assert (first["weight_decay"], rest["weight_decay"]) == (RECIPE.weight_decay, 0)
    names = {id(p): name for name, p in net.named_parameters()}
    bare = {names[id(p)] for p in rest["params"]}
    assert bare == {n for n in names.values() if "bn" in n or "downsample.1" in n or "bias" in n}
    assert len(first["params"]) + len(rest["params"]) == len(names)
    (every,) = optimizer_of(net, RECIPE).param_groups
    assert len(every["params"]) == len(names)


def test_the_average_by_hand(seen, tmp_path):
    bands, net = data(), model()
    recipe = replace(RECIPE, ema=0.8)
    history = fit(net, bands, recipe, out=tmp_path)
    average = seen[0][2]
    for _, _, after in seen[1:]:
        for key, value in after.items():
            old = average[key]
            average[key] = (
                torch.lerp(old, value, 1 - 0.8) if value.is_floating_point()
                else (old * 0.8 + value * (1 - 0.8)).to(old.dtype)
            )  # fmt: skip
    kept = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
    assert list(kept) == list(average)
    for key, value in average.items():
        torch.testing.assert_close(kept[key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(kept["fc.weight"], net.fc.weight)
    net.load_state_dict(kept)  # what is tested is what is kept
    found = evaluate(net, bands)
    assert history.epochs[-1]["test_loss"] == pytest.approx(found.loss)


def test_clipping_bounds_the_step(seen):
    before = model(dtype=torch.float64)
    net = model(dtype=torch.float64)
    fit(net, data(), replace(PLAIN, lr=1.0, clip=1e-3))
    old = dict(before.named_parameters())
    for _, _, after in seen:
        moved = [(after[key] - value).square().sum() for key, value in old.items()]
        norm = torch.stack(moved).sum().sqrt().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)
        old = {key: after[key] for key in old}


def test_accumulation_equals_a_large_batch_where_images_do_not_meet():
    whole, parts = without_norms(), without_norms()
    a = fit(whole, data(), RECIPE)
    b = fit(parts, data(), replace(RECIPE, accumulate=4))
    assert a.losses == pytest.approx(b.losses, rel=1e-6)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_accumulation_normalizes_every_part_by_itself(seen):
    """With batch normalization the gradient is the mean of those of the parts."""
    net, by_hand = model(dtype=torch.float64), model(dtype=torch.float64)
    fit(net, data(), replace(PLAIN, accumulate=3))
    by_hand.to(memory_format=torch.channels_last)
    for x, y, after in seen:
        by_hand.zero_grad()
        for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
            (F.cross_entropy(by_hand(xs), ys) / 3).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.05 * p.grad
        for key, value in by_hand.state_dict().items():
            torch.testing.assert_close(after[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_checkpointing_changes_nothing_but_memory(monkeypatch, fused):
    """Weights, running statistics and their counters; every block runs twice a step."""
    cls = type(model(fused=fused).layer1[0])
    calls, forward = [0], cls.forward

    def counted(self, *args):
        calls[0] += self.training
        return forward(self, *args)

    monkeypatch.setattr(cls, "forward", counted)
    kept, recomputed = model(fused=fused), model(fused=fused)
    a = fit(kept, data(), RECIPE)
    once, calls[0] = calls[0], 0
    b = fit(recomputed, data(), replace(RECIPE, checkpointing=True))
    assert (once, calls[0]) == (2 * 3 * STEPS, 4 * 3 * STEPS)
    assert a.losses == b.losses
    assert_same(kept.state_dict(), recomputed.state_dict())
    assert recomputed.layer1[0].bn1.num_batches_tracked == 3 * STEPS
    assert "forward" not in vars(recomputed.layer1[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "apart"),
    [
        ({"precision": "bf16"}, 0.03),
        ({"precision": "fp16"}, 0.03),
        ({"channels_last": False}, 1e-4),
        ({"compile": True}, 1e-4),
        ({"deterministic": True}, 0),
    ],
    ids=["bf16", "fp16", "NCHW", "compile", "deterministic"],
)
def test_ways_to_compute_follow_one_curve(monkeypatch, changes, apart):
    # Without a C++ compiler's minute; what is compiled is the same graph.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    way = replace(RECIPE, **changes)
    wanted, found = fit(model(), data(), RECIPE), fit(model(), data(), way)
    assert found.losses[:3] == pytest.approx(wanted.losses[:3], rel=apart)
    assert found.epochs[-1]["train_loss"] < found.epochs[0]["train_loss"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_scaler_leaves_out_a_step_that_overflows(monkeypatch, tmp_path):
    """fp16: a loss of infinity changes no weight, halves the scale, and no warning is seen."""
    net, before = model(), model().state_dict()
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y, **_: logits.sum() * float("inf"))
    monkeypatch.setattr("resnet_fast.training.feeds.evaluate", _untested)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(net, data(), replace(PLAIN, precision="fp16"), out=tmp_path)
    for key, value in net.named_parameters():
        assert torch.equal(value, before[key])
    content = torch.load(tmp_path / "checkpoints" / "epoch-0001.pt", weights_only=True)
    assert content["training"]["scaler"]["scale"] == 2.0**16 / 2**STEPS


def _untested(*_, **__):
    from resnet_fast.training import Evaluation

    return Evaluation(0.0, 0.0, 0.0, torch.zeros(4, 4))


def test_evaluation_by_hand():
    bands = data()
    net = model().eval()
    with torch.no_grad():
        logits = net(bands.preprocessing.normalize(bands.test_x))
    found = evaluate(net.train(), bands, batch_size=10)
    assert net.training
    y, first = bands.test_y, logits.argmax(1)
    assert found.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert found.accuracy == (first == y).double().mean().item()
    assert found.top5 == 1.0  # of four classes
    wanted = torch.zeros(4, 4, dtype=torch.int64)
    for label, prediction in zip(y.tolist(), first.tolist(), strict=True):
        wanted[label, prediction] += 1
    assert torch.equal(found.confusion, wanted)
    rows = [row.tolist() for row in wanted]
    assert found.recall() == pytest.approx([r[i] / sum(r) for i, r in enumerate(rows)])
    columns = [[r[i] for r in rows] for i in range(4)]
    wanted = [c[i] / sum(c) if sum(c) else math.nan for i, c in enumerate(columns)]
    assert found.precision() == pytest.approx(wanted, nan_ok=True)


def test_the_top_five_of_ten(monkeypatch):
    """Labels at every place of a fixed order: half of them among the first five."""
    bands = replace(data(), classes=tuple("abcdefghij"), test_y=torch.arange(31) % 10)
    logits = torch.arange(10, 0, -1).float()

    class Fixed(nn.Module):
        def forward(self, x):
            return logits.expand(len(x), -1)

    found = evaluate(Fixed(), bands, batch_size=7)
    assert (found.accuracy, found.top5) == (4 / 31, 16 / 31)
    assert torch.equal(found.confusion[:, 0], torch.bincount(bands.test_y))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_net_follows_the_plain_one(impl):
    """Real digits, ResNet-20, in double: the losses of the first steps are the same."""
    pytest.importorskip("sklearn")
    digits = load_data("digits", size=8)
    digits = replace(digits, train_x=digits.train_x[:192], train_y=digits.train_y[:192])
    recipe = recipe_for("digits", epochs=1)
    curves = {}
    for name, options in {"plain": {"fused": False}, impl: {"impl": impl}}.items():
        torch.manual_seed(0)
        net = resnet_fast.create_model("cifar_resnet20", **options).double()
        curves[name] = fit(net, digits, recipe).losses
    assert len(curves["plain"]) == 6
    assert curves[impl] == pytest.approx(curves["plain"], rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epochs": 0}, "epochs: expected an integer of at least 1, got 0"),
        ({"epochs": True}, "epochs: expected an integer of at least 1, got True"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
        ({"batch_size": "24"}, "batch_size: expected an integer of at least 1, got '24'"),
        ({"accumulate": 1.5}, "accumulate: expected an integer of at least 1"),
        ({"seed": 2**63}, "seed: expected a signed 64-bit integer"),
        ({"lr": "0.1"}, "lr: expected a number of at least 0, got '0.1'"),
        ({"momentum": True}, "momentum: expected a number from 0 to less than 1, got True"),
        ({"momentum": 2}, "momentum: expected a number from 0 to less than 1, got 2"),
        ({"epochs": 10**30}, "epochs: expected at most 1000000, got 1000000"),
        ({"batch_size": 10**30}, "batch_size: expected at most 1000000, got 1000000"),
        ({"seed": 2**64}, "seed: expected a signed 64-bit integer, got 18446744073709551616"),
        ({"label_smoothing": None}, "label_smoothing: expected a number from 0"),
        ({"precision": torch.bfloat16}, "precision: expected one of fp32, bf16, fp16, got torch"),
        ({"nesterov": "no"}, "nesterov: expected True or False, got 'no'"),
        ({"lr": -1.0}, "lr: expected a number of at least 0"),
        ({"lr": math.nan}, "lr: expected a number of at least 0"),
        ({"warmup": 4.0}, "warmup: expected at most epochs"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number from 0 to less than 1"),
        ({"ema": 1.0}, "ema: expected a number from 0 to less than 1"),
        ({"clip": 0.0}, "clip: expected a number above 0"),
        ({"schedule": "linear"}, "schedule: expected one of cosine, step, constant"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16"),
        ({"augment": "mixup"}, "augment: expected one of auto, none"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov: expected a momentum"),
        ({"compile": True, "checkpointing": True}, "checkpointing: torch.compile recomputes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_recipe_names_what_is_wrong(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(RECIPE, **wrong)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"recipe": replace(RECIPE, batch_size=200)}, "batch_size: expected at most the 100"),
        ({"recipe": replace(RECIPE, accumulate=5)}, r"batch_size: expected a multiple of 5 \(1 pr"),
        ({"resume": True}, "resume: expected out too"),
        ({"model": without_norms(), "recipe": replace(RECIPE, checkpointing=True)},
         "checkpointing: expected a model with residual blocks"),
        ({"model": torch.relu}, "model: expected an nn.Module"),
        ({"model": model().to("meta")}, "model: conv1.weight is on the meta device"),
        ({"model": OTHER}, r"model: expected logits \[N, 4\], .* got \[24, 3\]"),
        ({"data": torch.zeros(2)}, "data: expected a data set of load_data"),
        ({"recipe": {"epochs": 1}}, "recipe: expected a Recipe, got {'epochs': 1}"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here"),
        ({"device": "gpu"}, "device: 'gpu' cannot be used here"),
        ({"device": "meta"}, "device: expected one that stores values"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"out": 5}, "out: expected a path, got 5"),
        ({"resume": 5}, "resume: expected a path, got 5"),
        ({"spec": "resnet18"}, "spec: expected a ModelSpec or None"),
        ({"callbacks": 1}, "callbacks: expected functions by event"),
        ({"progress": 1}, "progress: expected True or False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_fit_names_what_is_wrong(options, says):
    with pytest.raises(ValueError, match=says):
        fit(**{"model": model(), "data": data(), "recipe": RECIPE, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": OTHER}, r"model: expected logits \[N, 4\], .* got \[31, 3\]"),
        ({"model": nn.Identity()}, r"model: expected logits \[N, 4\], .* got \[31, 3, 8, 8\]"),
        ({"model": model().to("meta")}, "model: conv1.weight is on the meta device"),
        ({"model": "resnet18"}, "model: expected an nn.Module, got 'resnet18'"),
        ({"data": [1, 2]}, r"data: expected batches \(images, targets\)"),
        ({"data": 5}, "data: expected a data set of load_data, or an iterable"),
        ({"precision": "fp8"}, "precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"precision": torch.bfloat16}, "precision: expected one of fp32, bf16, fp16, got torch"),
        ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here"),
        ({"device": 1.5}, "device: 1.5 cannot be used here"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": True}, "batch_size: expected an integer of at least 1, got True"),
        ({"batch_size": 2.0}, "batch_size: expected an integer of at least 1, got 2.0"),
        ({"split": "val"}, "split: expected one of train, test, all, got 'val'"),
        ({"workers": None}, "workers: expected an integer of at least 0, got None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_evaluate_names_what_is_wrong(options, says):
    with pytest.raises(ValueError, match="^" + says):
        evaluate(**{"model": model(), "data": data(), **options})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.gpu
def test_a_model_on_another_device_is_named():
    with pytest.raises(ValueError, match="model: expected parameters on cuda:0, got cpu"):
        evaluate(model(), data(), device="cuda")


def test_a_folder_has_the_reference_recipe_of_imagenet():
    """PyTorch's ImageNet example and torchvision's reference training: SGD, /10 every 30 epochs."""
    recipe, steps = recipe_for("imagefolder"), 5004  # of 1,281,167 images
    assert recipe == Recipe(epochs=90, batch_size=256, lr=0.1, momentum=0.9, weight_decay=1e-4,
                            schedule="step", milestones=(1 / 3, 2 / 3), warmup=0.0)  # fmt: skip
    for epoch in range(90):
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert lr_factor(recipe, step, steps) == pytest.approx(0.1 ** (epoch // 30))


def test_presets_are_recipes():
    assert set(PRESETS) == {"digits", "cifar10", "imagefolder", "synthetic"}
    assert recipe_for("cifar10") == Recipe()
    assert (Recipe().epochs, Recipe().lr, Recipe().momentum) == (30, 0.1, 0.9)
    assert Recipe().weight_decay == 5e-4
    short = recipe_for("digits", epochs=1, lr=0.01)
    assert (short.epochs, short.warmup, short.lr) == (1, 0.2, 0.01)
    with pytest.raises(ValueError, match="warmup"):
        recipe_for("digits", epochs=1, warmup=2.0)
    assert Recipe(**short.as_dict()) == short


def test_an_implementation_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "native_ops", lambda: None)
    backends._resolve.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="impl='native' cannot run"):
            fit(model("native"), data(), RECIPE)
    finally:
        backends._resolve.cache_clear()
