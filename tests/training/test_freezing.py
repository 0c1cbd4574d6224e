"""`Recipe.freeze`: parameters and running statistics of named modules stay as they are."""

from dataclasses import replace

import pytest
import torch
from training_cases import RECIPE, assert_same, data, metrics, model

from resnet_fast.training import fit


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("names", [("stem",), ("stem", "layer1"), ("layer2.0.bn1",)])
def test_frozen_modules_stay(names, impl):
    """Bit by bit; all others change; their gradients are required again afterwards."""
    net = model(impl)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fit(net, data(), replace(RECIPE, freeze=names))
    prefixes = tuple(
        f"{part}." for name in names for part in (("conv1", "bn1") if name == "stem" else (name,))
    )
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(prefixes), key
    assert all(p.requires_grad for p in net.parameters())
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_fused_equals_plain(optimizer):
    """A frozen norm normalizes by its running statistics, in both."""
    recipe = replace(RECIPE, freeze=("stem", "layer1"), optimizer=optimizer, lr=0.01)
    fused = metrics(fit(model(dtype=torch.float64), data(), recipe))
    plain = metrics(fit(model(dtype=torch.float64, fused=False), data(), recipe))
    rounding = 1e-9 if optimizer == "sgd" else 1e-2  # Muon computes in bfloat16
    for one, other in zip(fused, plain, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=rounding)


def test_what_was_frozen_before_stays_frozen(tmp_path):
    net = model()
    net.fc.weight.requires_grad_(False)
    head = net.fc.weight.clone()
    fit(net, data(), replace(RECIPE, freeze=("layer1",)))
    assert not net.fc.weight.requires_grad
    assert torch.equal(net.fc.weight, head)


def test_a_frozen_run_resumes_bit_by_bit(tmp_path):
    recipe = replace(RECIPE, freeze=("layer1",), ema=0.5)
    whole = model()
    history = fit(whole, data(), recipe, out=tmp_path)
    again = model()
    path = tmp_path / "checkpoints" / "epoch-0002.pt"
    assert fit(again, data(), recipe, out=tmp_path, resume=path).losses == history.losses
    assert_same(again.state_dict(), whole.state_dict())
    with pytest.raises(ValueError, match=r"resume: .* has freeze \('layer1',\), this run has \(\)"):
        fit(model(), data(), replace(recipe, freeze=()), out=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("layer9",), "freeze: expected names of modules, such as stem, conv1, .*; got 'layer9'"),
        (("",), "freeze: expected names of modules"),
        (("stem", "layer1", "layer2", "fc"), "freeze: .* leave no parameter to train"),
    ],
)
def test_what_is_wrong_is_named(names, says):
    net = model()
    with pytest.raises(ValueError, match=says):
        fit(net, data(), replace(RECIPE, freeze=names))
    assert all(p.requires_grad for p in net.parameters())
