"""The roofline page: bytes and operations of every launch, and what rows say they took."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resnet_fast
from bench import roofline, rows
from bench.__main__ import main
from bench.ceilings import Ceilings
from bench.estimate import GPUS
from bench.floors import Step, total

ROOT = Path(__file__).resolve().parents[2]
H200 = Ceilings(*roofline.KNOWN["h200"], "bf16")


def of(steps, name, mode):
    (step,) = (step for step in steps if step.name == name and step.mode == mode)
    return step


def test_bytes_and_operations_of_a_layer():
    """Each tensor once: x, filters, residual and y of 2 bytes; 2 operations a multiply-add."""
    n, steps = 8, roofline.steps_of("resnet50", "infer", 8, 2)
    step = of(steps, "1x1/1 64>256 @56+res", "infer")
    assert step.bytes == 2 * (n * 56 * 56 * (64 + 256 + 256) + 64 * 256) and step.count == 2
    assert step.flops == 2 * n * 56 * 56 * 64 * 256
    both = of(steps, "1x1/1 64>256 @56+projection", "infer")  # not the projection itself
    assert both.bytes == 2 * (n * 56 * 56 * (64 + 64 + 256) + 2 * 64 * 256) and both.count == 1
    assert both.flops == 2 * step.flops
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
    found = [step for step in steps if step.kind != "passes"]
    assert sum(step.count * (1 + ("projection" in step.name)) for step in found) == convs


def test_bytes_of_a_training_step():
    """ResNet-50's ideal schedule: 255 MB an image in 16 bits, as by hand; 56 launches forward."""
    steps = roofline.steps_of("resnet50", "train", 256, 2)
    moved = sum(step.count * step.bytes for step in steps) / 256 / 1e6
    assert moved == pytest.approx(255, rel=0.01)
    modes = {step.mode for step in steps}
    assert modes == {"fprop", "dgrad", "wgrad"}
    joins = sum(s.count for s in steps if s.mode == "fprop" and "relu" in s.name)
    assert joins == 16 + 1  # one a block, and the stem's
    assert not any(step.mode == "dgrad" and step.name.startswith("7x7") for step in steps)


def test_a_strided_1x1_reads_what_it_meets():
    """One pixel of four where the stride is 2, forward and for dw; dx is written whole."""
    n, steps = 2, roofline.steps_of("resnet50", "train", 2, 2)
    x, y, w = n * 256 * 56 * 56, n * 512 * 28 * 28, 512 * 256
    moved = {mode: of(steps, "1x1/2 256>512 @56", mode).bytes // 2 for mode in
             ("fprop", "dgrad", "wgrad")}  # fmt: skip
    assert moved == {
        "fprop": x // 4 + w + y, "dgrad": 2 * y + w + 2 * x, "wgrad": x // 4 + w + 2 * y
    }  # fmt: skip


def command(*arguments, first="", **settings):
    """`python -m bench roofline` in a process where Triton does not interpret, after `first`."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"import sys\n{first}\nfrom bench.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "roofline", *arguments],
        cwd=ROOT, env={**env, **settings}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    """What the command prints for ResNet-50 at batch 256, and the steps that it writes."""
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("roofline")
    done = command("--out", str(out))
    assert done.returncode == 0, done.stderr
    listed = json.loads((out / "roofline.json").read_text())
    steps = {
        (mode, name): [Step(**step) for step in own]
        for mode, both in listed.items()
        for name, own in both.items()
    }
    assert set(steps) == {(m, n) for m in ("infer", "train") for n in ("runs", "ideal")}
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout, steps


def test_inference_runs_the_ideal_schedule(resnet50):
    """Beside it the classifier, the fold of the norms, the padding of the stem, a pass after each
    of cuDNN's convolutions, and the projections that by estimate take less time apart.
    """
    _, steps = resnet50
    runs, ideal = (total(steps["infer", name], H200) for name in ("runs", "ideal"))
    library = sum(step.count for step in steps["infer", "runs"] if step.name.endswith("library"))
    joined = [step for step in steps["infer", "ideal"] if step.name.endswith("+projection")]
    names = {step.name for step in steps["infer", "runs"]}
    apart = [step for step in joined if step.name not in names]
    assert sum(step.count for step in joined) == 4 and 1 <= len(apart) <= 3
    assert runs.launches == ideal.launches + 1 + 3 + library + len(apart)
    filters = (re.search(r">(\d+) @(\d+)", step.name).groups() for step in apart)
    between = sum(2 * 2 * 256 * int(k) * int(side) ** 2 for k, side in filters)  # y, in 2 bytes
    assert ideal.bytes < runs.bytes - between < 1.05 * ideal.bytes
    assert ideal.ms < runs.ms - between / 4.3e9 < 1.05 * ideal.ms


def test_what_training_moves_beyond_the_ideal(resnet50):
    """dz = f(dy, z) of every convolution, and φ(x) = f(x) twice of those inside a block."""
    said, steps = resnet50
    runs, ideal = steps["train", "runs"], steps["train", "ideal"]
    dz = phi = 0
    for step in ideal:
        if step.mode == "fprop" and step.kind != "passes":
            pattern = r"\dx\d/(\d) (\d+)>(\d+) @(\d+)"
            stride, c, k, side = map(int, re.match(pattern, step.name).groups())
            dz += step.count * 3 * 2 * 256 * k * (side // stride) ** 2
            if step.kind == "3x3" or step.name.endswith("+res"):
                phi += step.count * 2 * 2 * 2 * 256 * c * side**2
    assert total(runs, H200, "φ(x)").launches == 2 * 2 * 16
    assert total(runs, H200, "φ(x)").bytes == pytest.approx(phi, rel=1e-3)
    assert total(runs, H200, "dz").launches == 53
    assert total(runs, H200, "dz").bytes == pytest.approx(dz, rel=0.02)  # and masks
    table = said[said.rindex("what runs beside the ideal schedule") :]
    for part in ("dz", "φ(x)", "vectors"):
        one = total(runs, H200, part)
        assert re.search(
            rf"^{re.escape(part)} +{one.launches} +{one.bytes / 1e9:.2f} +{one.ms:.3f} +0 ",
            table, re.MULTILINE,
        )  # fmt: skip
    parts = [total(runs, H200, part) for part in roofline.PARTS]
    assert sum(one.bytes for one in parts) == total(runs, H200).bytes


def test_operations_that_run_are_the_ideal_ones(resnet50):
    """The convolutions', in each pass; forward also those of the stem's padded channels."""
    _, steps = resnet50
    for mode in ("infer", "train"):
        runs, ideal = (
            sum(step.count * step.flops for step in steps[mode, name] if step.kind != "passes")
            for name in ("runs", "ideal")
        )
        assert runs == ideal + 2 * 256 * 112**2 * 64 * 7 * (32 - 21)


def test_benchmarks_page_has_these_floors(resnet50):
    """Images/s of what runs and of the ideal schedule, in three digits."""
    _, steps = resnet50
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    found = re.search(
        r"at most ([\d,]+) images/s in inference and ([\d,]+) in training\.\s+The ideal .*?"
        r"It allows ([\d,]+) and ([\d,]+) images/s\.", text
    )  # fmt: skip
    said = [int(figure.replace(",", "")) for figure in found.groups()]
    for figure, (name, mode) in zip(
        said, [(n, m) for n in ("runs", "ideal") for m in ("infer", "train")], strict=True
    ):
        assert figure == pytest.approx(256e3 / total(steps[mode, name], H200).ms, rel=5e-3)


def test_limits_are_the_clocks():
    assert set(roofline.KNOWN) == set(GPUS)
    for name, gpu in GPUS.items():
        assert roofline.KNOWN[name] == (gpu.bytes_per_s, gpu.flops_per_s)


def test_an_h100(capsys):
    """Its bandwidth, 3 TB/s, bounds the pool of the stem."""
    assert main(["roofline", "--limits", "h100", "--mode", "infer", "--batch", "256"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "max-pool 64@112" in x)
    assert "513.8" in line and f"{513.8e6 / 3.0e12 * 1e3:.4f}" in line


@pytest.mark.slow
def test_the_ideal_schedule_alone(capsys):
    """Without Triton, or without a GPU's launches, the command says why what runs is missing."""
    done = command("--mode", "infer", first="sys.modules['triton'] = None")
    assert done.returncode == 0, done.stderr
    assert "cannot list what runs: Triton is needed" in done.stdout
    assert "ideal schedule" in done.stdout and "beside" not in done.stdout
    done = command("--mode", "infer", TRITON_INTERPRET="1")
    why = "TRITON_INTERPRET is set" if "TRITON" in done.stdout else "Triton is needed"
    assert done.returncode == 0 and f"cannot list what runs: {why}" in done.stdout
    assert main(["roofline", "--limits", "cpu", "--mode", "infer", "--batch", "1"]) == 0
    assert "cannot list what runs: it lists the launches of a GPU" in capsys.readouterr().out


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
    listed = json.loads((tmp_path / "roofline.json").read_text())["infer"]["ideal"]
    took = {step["name"]: step["ms"] for step in listed if step["ms"] is not None}
    assert took == {"7x7/2 3>64 @224": 7.0, "max-pool 64@112": 0.25}
    printed = capsys.readouterr().out
    assert "2 of 26 steps measured: 7.25 ms" in printed and "51 launches move 60 MB" in printed
    picture = (tmp_path / "roofline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--mode", "learn"], "--mode: expected some of infer, train, got 'learn'"),
        (["--batch", "0"], "--batch: expected at least 1"),
        (["--limits", "h300"], "--limits: expected one of h200, h100, cpu, cuda, got 'h300'"),
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_arguments(options, what, capsys):
    assert main(["roofline", *options]) == 2
    assert what in capsys.readouterr().err
