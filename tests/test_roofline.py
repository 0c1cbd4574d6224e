"""The roofline page: bytes and operations of every launch, and what rows say they took."""

import json

import pytest
import torch
from torch import nn

import resnet_fast
from bench import roofline, rows
from bench.__main__ import main
from bench.ceilings import Ceilings

H200 = Ceilings(*roofline.KNOWN["h200"], "bf16")


def of(steps, name, mode):
    (step,) = (step for step in steps if step.name == name and step.mode == mode)
    return step


def test_bytes_and_operations_of_a_layer():
    """Each tensor once: x, filters, residual and y of 2 bytes; 2 operations a multiply-add."""
    n, steps = 8, roofline.steps_of("resnet50", "infer", 8, 2)
    step = of(steps, "1x1/1 64>256 @56+res", "infer")
    assert step.bytes == 2 * (n * 56 * 56 * (64 + 256 + 256) + 64 * 256) and step.count == 3
    assert step.flops == 2 * n * 56 * 56 * 64 * 256
    assert step.floor_ms(H200) == pytest.approx(1e3 * step.bytes / 4.3e12)
    assert step.bound(H200) == "memory"
    deep = of(steps, "3x3/1 512>512 @7", "infer")
    assert deep.bound(H200) == "compute"
    assert deep.floor_ms(H200) == pytest.approx(1e3 * deep.flops / 790e12)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "preact_resnet18"])
def test_operations_are_the_models(name):
    """The convolutions' operations are those that PyTorch counts in a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    image = 32 if "cifar" in name else 224
    with torch.device("meta"):
        net = resnet_fast.unfuse(resnet_fast.create_model(name, impl="reference")).eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(2, 3, image, image, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    expected = sum(f for op, f in counts.items() if "conv" in str(op))
    steps = roofline.steps_of(name, "infer", 2, 2, image)
    assert sum(step.count * step.flops for step in steps) == expected
    convs = sum(isinstance(m, nn.Conv2d) for m in net.modules())
    assert sum(step.count for step in steps if step.kind != "passes") == convs


def test_bytes_of_a_training_step():
    """ResNet-50's fused schedule: 262 MB an image in 16 bits, as by hand; 56 launches forward."""
    steps = roofline.steps_of("resnet50", "train", 256, 2)
    moved = sum(step.count * step.bytes for step in steps) / 256 / 1e6
    assert moved == pytest.approx(262, rel=0.03)
    modes = {step.mode for step in steps}
    assert modes == {"fprop", "dgrad", "wgrad"}
    joins = sum(s.count for s in steps if s.mode == "fprop" and "relu" in s.name)
    assert joins == 16 + 1  # one a block, and the stem's
    assert not any(step.mode == "dgrad" and step.name.startswith("7x7") for step in steps)


def layer(mode, name, ms, provider="resnet_fast", benchmark="layers", date="2026-01-01", batch=4):
    found = dict.fromkeys((*rows.FIELDS, *rows.EXTRA_FIELDS, *rows.LAYER_FIELDS))
    return found | {
        "benchmark": benchmark, "mode": mode, "layer": name, "ms_p50": ms, "provider": provider,
        "impl": "triton", "date": date, "batch": batch, "dtype": "bf16", "model": None,
        "image_size": None,
    }  # fmt: skip


def test_measured_rows_meet_their_steps(tmp_path, capsys):
    """The newest row of a layer, the fastest of a pass; others say nothing."""
    path = tmp_path / "rows.jsonl"
    rows.append(path, [
        layer("infer", "7x7/2 3>64 @224", 9.0, date="2026-01-02"),
        layer("infer", "7x7/2 3>64 @224", 7.0, date="2026-01-03"),
        layer("infer", "7x7/2 3>64 @224", 1.0, provider="torch", date="2026-01-04"),
        layer("infer", "1x1/1 64>64 @56", 1.0, batch=8, date="2026-01-05"),
        layer("max-pool", "stem 64@112", 0.5, "native", "passes"),
        layer("max-pool", "stem 64@112", 0.25, "triton", "passes"),
    ])  # fmt: skip
    command = ["roofline", "--mode", "infer", "--batch", "4", "--rows", str(path)]
    assert main([*command, "--out", str(tmp_path)]) == 0
    listed = json.loads((tmp_path / "roofline.json").read_text())["infer"]
    took = {step["name"]: step["ms"] for step in listed if step["ms"] is not None}
    assert took == {"7x7/2 3>64 @224": 7.0, "max-pool 64@112": 0.25}
    printed = capsys.readouterr().out
    assert "2 of 26 steps measured: 7.25 ms" in printed and "55 launches move 69 MB" in printed
    picture = (tmp_path / "roofline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--mode", "learn"], "--mode: expected some of infer, train, got 'learn'"),
        (["--batch", "0"], "--batch: expected at least 1"),
        (["--limits", "h300"], "--limits: expected one of h200, cpu, cuda, got 'h300'"),
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_arguments(options, what, capsys):
    assert main(["roofline", *options]) == 2
    assert what in capsys.readouterr().err
