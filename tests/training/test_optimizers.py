"""LARS by hand, Muon against torch.optim.Muon on matrices, and what a checkpoint has of them."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_cases import RECIPE, assert_same, data, metrics, model

from resnet_fast.training import fit
from resnet_fast.training.optimizers import TRUST, Lars, Muon, optimizer_of, slots_of
from resnet_fast.training.recipe import OF_OPTIMIZER, OPTIMIZERS, recipe_for

RATES = {"sgd": 0.05, "adamw": 2e-3, "lars": 1.0, "muon": 4e-3}


def _net(fmt=torch.contiguous_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    return net.double().to(memory_format=fmt)


def _recipe(name, **options):
    return replace(RECIPE, optimizer=name, lr=RATES[name], **options)


def _gradients(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_lars_by_hand():
    net = _net()
    recipe = _recipe("lars", weight_decay=0.1, decay_norms=False)
    optimizer = optimizer_of(net, recipe)
    assert isinstance(optimizer, Lars)
    parameters = net[0].weight, net[3].weight, net[3].bias
    wanted, velocity = [p.detach().clone() for p in parameters], [0, 0, 0]
    for seed in range(2):
        _gradients(net, seed)
        for i, p in enumerate(parameters):
            slope = p.grad.clone()
            if p.ndim > 1:
                slope += 0.1 * wanted[i]
                size = wanted[i].norm()
                slope *= TRUST * size / (p.grad.norm() + 0.1 * size)
            velocity[i] = 0.9 * velocity[i] + slope
            wanted[i] = wanted[i] - RATES["lars"] * velocity[i]
        optimizer.step()
    for p, value in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p.detach(), value)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_does_not_scale_by_a_norm_of_zero(zero):
    net = _net()
    optimizer = optimizer_of(net, _recipe("lars", weight_decay=0.0))
    _gradients(net)
    w = net[0].weight
    with torch.no_grad():
        (w if zero == "weight" else w.grad).zero_()
    expected = w.detach() - RATES["lars"] * w.grad
    optimizer.step()
    torch.testing.assert_close(w.detach(), expected)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_muon_is_torchs_on_matrices(fmt):
    """Filters as matrices [K, C·R·S]; what is no filter gets AdamW's step."""
    net, twin = _net(fmt), _net()
    optimizer = optimizer_of(net, _recipe("muon", weight_decay=0.1, decay_norms=False))
    assert isinstance(optimizer, Muon)
    filters = nn.Parameter(twin[0].weight.detach().flatten(1).clone())
    muon = torch.optim.Muon([filters], RATES["muon"], 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    others = [p for name, p in twin.named_parameters() if name != "0.weight"]
    adamw = torch.optim.AdamW([
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0},
    ], RATES["muon"])  # fmt: skip
    for seed in range(3):
        _gradients(net, seed)
        _gradients(twin, seed)
        filters.grad = twin[0].weight.grad.flatten(1)
        for one in (optimizer, muon, adamw):
            one.step()
    # Newton and Schulz's iteration runs in bfloat16: the order of columns changes its rounding.
    torch.testing.assert_close(net[0].weight.detach().flatten(1), filters.detach(),
                               rtol=1e-2, atol=1e-4)  # fmt: skip
    assert (net[0].weight - twin[0].weight).abs().max() > 1e-3
    for name, p in net.named_parameters():
        if name != "0.weight":
            torch.testing.assert_close(p, twin.get_parameter(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on(name):
    """Loaded into a new optimizer, the next step has the same bits; slots have the named form."""
    net = _net(torch.channels_last)
    optimizer = optimizer_of(net, _recipe(name))
    _gradients(net)
    optimizer.step()
    other = copy.deepcopy(net)
    again = optimizer_of(other, _recipe(name))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((net, optimizer), (other, again)):
        _gradients(one, 1)
        its.step()
    assert_same(dict(net.named_parameters()), dict(other.named_parameters()))
    assert_same(optimizer.state_dict(), again.state_dict())
    for p in net.parameters():
        slots, slot = slots_of(optimizer, p), optimizer.state[p]
        assert {k: v.shape for k, v in slots.items()} == {k: v.shape for k, v in slot.items()}
        assert {k: v.dtype for k, v in slots.items()} == {k: v.dtype for k, v in slot.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_bit_by_bit_and_learns(name, tmp_path):
    recipe = _recipe(name, epochs=8, ema=0.2 if name == "muon" else None)
    whole = fit(model(), data(), recipe)

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model(), data(), recipe, out=tmp_path, callbacks={"epoch": stop})
    net = model()
    history = fit(net, data(), recipe, out=tmp_path, resume=True)
    assert metrics(history) == metrics(whole)
    assert history.losses == whole.losses
    assert history.epochs[-1]["train_loss"] < 0.95 * history.epochs[0]["train_loss"]


def test_usual_values_of_an_optimizer():
    for name in OPTIMIZERS:
        recipe = recipe_for("digits", optimizer=name, epochs=100).as_dict()
        assert OF_OPTIMIZER[name].items() <= recipe.items()
    assert recipe_for("digits", optimizer="adamw", lr=0.5).lr == 0.5
    assert recipe_for("digits").nesterov


def test_an_old_pytorch_has_no_muon(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="optimizer: muon needs PyTorch"):
        optimizer_of(_net(), _recipe("muon"))


def test_muon_needs_filters():
    with pytest.raises(ValueError, match="optimizer: muon expected filters to train, got none"):
        optimizer_of(nn.Linear(2, 2), _recipe("muon"))
