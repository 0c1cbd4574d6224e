"""The rule fitted to measurements, and `resnet-fast tune`, without a GPU."""

import json
import re

import numpy as np
import pytest
import torch

from resnet_fast import cli
from resnet_fast.commands import tune
from resnet_fast.dispatch import auto_impl, cost_model
from resnet_fast.runtime import settings, tuning_tables
from resnet_fast.spec import reference
from resnet_fast.verify.op_cases import CONVOLUTIONS, CONVS, POINTWISE, Draw

GPU = "NVIDIA Test 1"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path / "user"))
    monkeypatch.delenv("RESNET_FAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning_tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(auto_impl, "_chosen", {})
    monkeypatch.setattr(auto_impl, "_written", {})


@pytest.mark.parametrize(
    "truth",
    [(4.0, 2e-7, 1.5e-9), (0.0, 3e-7, 0.0), (5.0, 0.0, 2e-9), (7.0, 0.0, 0.0), (0.0, 1e-7, 1e-9)],
    ids=str,
)
def test_fit_finds_what_made_the_times(truth):
    """Exactly without noise; within the noise's size with 3% of it."""
    generator = np.random.default_rng(0)
    moved, flop = 10 ** generator.uniform(4, 9, (2, 24)) * np.array([[1.0], [100.0]])
    time = np.stack([np.ones(24), moved, flop], 1) @ truth
    found = cost_model.fit(list(zip(moved, flop, time, strict=True)))
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=0)
    noisy = time * generator.normal(1, 0.03, 24)
    found = cost_model.fit(list(zip(moved, flop, noisy, strict=True)))
    assert (found >= 0).all()
    predicted = np.stack([np.ones(24), moved, flop], 1) @ found
    assert np.abs(predicted / time - 1).max() < 0.06


def test_fit_of_what_no_model_explains():
    """Times that fall with size still give numbers, none of them negative."""
    found = cost_model.fit([(1e6, 0, 10.0), (2e6, 0, 5.0), (4e6, 0, 2.0), (8e6, 0, 1.0)])
    assert (found >= 0).all() and np.isfinite(found).all()


def test_work_of_ops():
    """Bytes by the tensors that are there, operations by the convolution's definition."""
    conv = CONVS["3x3-stride2"]
    for variant in ("conv_bn_act", "conv_fprop:prologue", "conv_bprop:residual-masked"):
        op = variant.partition(":")[0]
        args = CONVOLUTIONS[variant](Draw(torch.float32, torch.channels_last, "cpu"), conv)
        results = getattr(reference, op)(*args)
        results = results if isinstance(results, tuple) else (results,)
        tensors = [t for t in (*args, *results) if isinstance(t, torch.Tensor)]
        found = cost_model.work(op, args)
        assert found.bytes == sum(t.numel() * t.element_size() for t in tensors)
        z = args[0] if op == "conv_bprop" else results[0]
        w = args[1]
        products = z.numel() * w.size(1) * w.size(2) * w.size(3)
        assert found.flop == 2 * products * (2 if op == "conv_bprop" else 1)
    args = POINTWISE["bn_act"](Draw(torch.float32, torch.channels_last, "cpu"), (2, 24, 5, 7))
    assert cost_model.work("bn_act", args).flop == 0


def section(names, count=6):
    """Measurements in which native is faster in small launches and triton in large ones."""
    entries = {}
    for i in range(count):
        moved = 10**5 * 4**i
        us = {"triton": 8 + moved / 4e6, "native": 3 + moved / 2e6}
        us = {name: us[name] for name in names}
        entries[f"float32[{i}]"] = {"impl": "any", "us": us, "bytes": moved, "flop": 0}
    return entries


def test_fastest():
    both = ("triton", "native")
    table = section(both)
    assert cost_model.fastest(table, "float32", cost_model.Work(10**5, 0), both) == "native"
    assert cost_model.fastest(table, "float32", cost_model.Work(10**9, 0), both) == "triton"
    assert cost_model.fastest(table, "bfloat16", cost_model.Work(10**9, 0), both) is None
    assert cost_model.fastest(section(both, 3), "float32", cost_model.Work(10**9, 0), both) is None
    assert cost_model.fastest(section(("triton",)), "float32", cost_model.Work(1, 0), both) is None
    old = {key: {"impl": "native", "us": e["us"]} for key, e in table.items()}
    unknown = cost_model.fastest(old, "float32", cost_model.Work(10**9, 0), both)
    assert unknown is None, "no bytes are known"


def test_auto_follows_the_rule():
    """A shape that is in no table: by the fit, without a search; one that is in it: by it."""
    x = torch.zeros(256, 24, 32, 32)
    small = torch.zeros(1, 8, 2, 2)
    candidates = {"triton": None, "native": None}
    path = tuning_tables.shipped_table("impls", GPU)
    for key, entry in section(("triton", "native")).items():
        tuning_tables.write(path, "add_relu", key, entry)
    tuning_tables.write(path, "add_relu", auto_impl.signature((x, x, False)), {"impl": "native"})
    assert auto_impl.pick("add_relu", GPU, (x, x, False), candidates)[0] == "native"
    assert auto_impl.pick("add_relu", GPU, (x, x, True), candidates)[0] == "triton"
    assert auto_impl.pick("add_relu", GPU, (small, small, True), candidates)[0] == "native"
    unknown = auto_impl.pick("bn_stats", GPU, (x,), candidates)
    assert unknown == ("triton", "first choice"), "nothing is known of it"


def test_tune(monkeypatch, capsys):
    """What a step misses is measured once and kept; a second time nothing is."""
    shapes = [torch.zeros(n, 8, 2, 2) for n in (1, 2, 3)]
    ran = []

    def triton_add(x, *_):
        ran.append("triton")

    def native_add(x, *_):
        ran.append("native")

    candidates = {"triton": triton_add, "native": native_add}
    times = {triton_add: 9.0}
    monkeypatch.setattr(auto_impl, "_microseconds", lambda run, args: times.get(run, 4.0))

    def step():
        for x in shapes:
            candidates[auto_impl.pick("add_relu", GPU, (x, x, False), candidates)[0]](x)

    def milliseconds(step):
        ran.clear()
        step()
        return 1.0 * ran.count("triton") + 0.5 * ran.count("native")

    gain = tune.tune(step, milliseconds)
    assert gain == tune.Gain(3.0, 1.5, 3)
    assert str(gain) == "3 entries measured; 3.00 ms per step before, 1.50 ms after (2.00x)"
    table = json.loads(tuning_tables.user_table("impls", GPU).read_text())["add_relu"]
    assert len(table) == 3 and all(entry["impl"] == "native" for entry in table.values())
    assert all(entry["bytes"] > 0 and entry["flop"] == 0 for entry in table.values())
    assert tune.tune(step, milliseconds) == tune.Gain(1.5, 1.5, 0)
    assert not settings.AUTOTUNE.read()


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_searches_while_a_model_is_tuned(monkeypatch, before):
    """In every step and timing; afterwards, and after an error, it is as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    seen = []

    def step():
        seen.append(torch.backends.cudnn.benchmark)

    def milliseconds(step):
        step()
        return 1.0

    tune.tune(step, milliseconds)
    assert len(seen) == 4 and all(seen) and torch.backends.cudnn.benchmark is before
    with pytest.raises(ZeroDivisionError):
        tune.tune(step, lambda step: 1 / 0)
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.parametrize("mode", tune.MODES)
def test_steps(mode):
    """The steps that are tuned are a model's."""
    step = tune.step_of("cifar_resnet20", mode, torch.bfloat16, 2, 16, "cpu")
    y = step()
    assert torch.isfinite(y).all() and y.requires_grad == (mode == "train")
    assert tune.milliseconds(lambda: None) < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["tune", "--model", "resnet50", "--batch", "1"]) == 2
    assert "torch.cuda.is_available() is False here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--model, --batch"),
        (["--model", "resnet5", "--batch", "1"], "--model: expected a comma.*got 'resnet5'"),
        (["--model", "resnet50", "--batch", "0"], "--batch: expected a positive int, got '0'"),
        (["--model", "resnet50", "--batch", "1", "--mode", "eval"], "--mode: expected a comma"),
    ],
)
def test_bad_options(options, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *options])
    assert stop.value.code == 2
    assert re.search(says, capsys.readouterr().err)
