"""Ceilings, layers and the budget of a GPU run: the logic of those commands, on a CPU."""

import inspect
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import shards
import torch

from bench import ceilings, host, layers, passes, rows
from bench.__main__ import main
from bench.step import Case
from resnet_fast.dispatch import backends
from resnet_fast.spec.chain import Conv

ROOT = Path(__file__).resolve().parents[2]


def test_layers_of_resnet50():
    """53 convolutions and, with the classifier, the 4.09 billion multiply-adds of torchvision."""
    found = layers.layers_of("resnet50")
    assert sum(found.values()) == 53
    convs = sum(layer.flops(1) * count for layer, count in found.items())
    assert convs / 2 + 2048 * 1000 == pytest.approx(4.09e9, rel=2e-3)
    assert sum(count for layer, count in found.items() if layer.residual) == 16
    assert sum(count for layer, count in found.items() if not layer.relu) == 4
    stem = next(iter(found))
    assert str(stem) == "7x7/2 3>64 @224" and stem.out_size == (112, 112)


def test_bytes_of_a_layer():
    layer = layers.Layer(8, 6, 6, 16, (3, 3), Conv((2, 2), (1, 1)), residual=True)
    x, w, y = 5 * 8 * 36, 16 * 8 * 9, 5 * 16 * 9
    assert layer.bytes(5, 2) == 2 * (x + w + 2 * y)
    assert layer.flops(5) == 2 * 5 * 16 * 9 * 8 * 9
    limits = ceilings.Ceilings(1e9, 1e12, "bf16")
    assert limits.floor_ms(2e6, 1e9) == pytest.approx(2.0)
    assert limits.floor_ms(2e6, 3e9) == pytest.approx(3.0)


@pytest.mark.slow
def test_layers_command(tmp_path, capsys):
    """A row a provider and layer; the fused time of a layer is the floor over its share."""
    path = tmp_path / "rows.jsonl"
    options = ["--model", "cifar_resnet20", "--image-size", "32", "--batch", "2", "--dtype", "fp32"]
    options += ["--mode", "infer,fprop,dgrad,wgrad"]
    assert main(["layers", *options, "--out", str(path)]) == 0
    found = rows.read([path])
    text = capsys.readouterr().out
    shapes = layers.layers_of("cifar_resnet20", 32)
    names = {row["layer"] for row in found}
    (stem,) = (str(layer) for layer in shapes if layer.channels == 3)
    assert len(found) == 3 * (4 * len(names) - 1) and all(name in text for name in names)
    assert not any(row["mode"] == "dgrad" and row["layer"] == stem for row in found)
    assert {row["provider"] for row in found} == {"resnet_fast", "torch", "torch conv"}
    for row in found:
        assert row["benchmark"] == "layers" and row["percent_of_floor"] > 0 and row["ms_p50"] > 0
        layer = next(layer for layer in shapes if str(layer) == row["layer"])
        moved = row["gb_per_s"] * row["ms_p50"] * 1e6
        assert moved == pytest.approx(layer.bytes(2, 4, row["mode"]), rel=1e-3)
        assert row["launches"] == shapes[layer]


@pytest.mark.parametrize("mode", layers.MODES)
def test_a_wrong_layer_is_not_timed(monkeypatch, capsys, mode):
    """Fused and unfused must agree before either is measured."""
    for name in ("conv_bn_act", "conv_fprop", "conv_bprop"):
        right = getattr(layers.ops, name)

        def wrong(*args, right=right):
            found = right(*args)
            return 1.01 * found if torch.is_tensor(found) else [1.01 * t for t in found]

        monkeypatch.setattr(layers.ops, name, wrong)
    assert main(["layers", "--model", "cifar_resnet20", "--image-size", "32", "--batch", "1",
                 "--dtype", "fp32", "--mode", mode]) == 1  # fmt: skip
    assert "fused and unfused differ by 1.0" in capsys.readouterr().err


def untimed(monkeypatch, module):
    """The commands without their clock."""
    limits = ceilings.Ceilings(1e9, 1e12, "fp32")
    monkeypatch.setattr(module, "measure", lambda device, dtype: limits)
    monkeypatch.setattr(module, "median_ms", lambda run, device: 1.0)


def test_a_layer_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    """Rows of a layer are written before the next one runs; the end names those that failed."""
    path, right, written = tmp_path / "rows.jsonl", layers.layer_rows, []

    def failing(layer, *args):
        written.append(len(rows.read([path])) if path.exists() else 0)
        if len(written) == 2:
            raise MemoryError("no room")
        return right(layer, *args)

    monkeypatch.setattr(layers, "layer_rows", failing)
    untimed(monkeypatch, layers)
    assert main(["layers", "--model", "cifar_resnet20", "--image-size", "32", "--batch", "1",
                 "--dtype", "fp32", "--out", str(path)]) == 1  # fmt: skip
    shapes = list(layers.layers_of("cifar_resnet20", 32))
    assert written == [0, 3, *range(3, 3 * len(shapes) - 3, 3)]
    out, err = capsys.readouterr()
    assert err == f"layers: {shapes[1]} infer: MemoryError: no room\n"
    assert str(shapes[-1]) in out and len(rows.read([path])) == 3 * (len(shapes) - 1)


def closure(function):
    """What a function has from outside, by name."""
    return inspect.getclosurevars(function).nonlocals


def held(function):
    """Tensors that a call would use: of closures and arguments, and of the functions among them."""
    if isinstance(function, partial):
        inside = [function.func, *function.args]
    else:
        inside = closure(function).values() if inspect.isfunction(function) else []
    found = []
    for value in inside:
        for one in value if isinstance(value, (list, tuple)) else [value]:
            found += [one] if torch.is_tensor(one) else held(one)
    return found


@pytest.mark.parametrize("mode", layers.MODES)
def test_no_autograd_graph_is_timed(mode):
    """A CUDA graph captures another stream than that of a forward pass made before."""
    layer = layers.Layer(24, 6, 6, 16, (3, 3), Conv((2, 2), (1, 1)))
    make = layers.infer if mode == "infer" else layers.train(mode)
    with torch.no_grad():
        runs = make(layer, 2, torch.float32, torch.device("cpu"), "reference")
    for name, run in runs.items():
        tensors = held(run)
        assert len(tensors) >= 2, name
        assert not any(t.requires_grad for t in tensors), name
        with torch.enable_grad():
            assert not run().requires_grad


def test_dgrad_by_pytorchs_ops_is_autograds():
    """The backward pass of relu, convolution and normalization, bit by bit."""
    torch.manual_seed(0)
    layer = layers.Layer(24, 6, 6, 16, (3, 3), Conv((2, 2), (1, 1)))
    with torch.no_grad():
        run = layers.train("dgrad")(layer, 2, torch.float32, torch.device("cpu"), "auto")["torch"]
    outer = closure(run)
    w = closure(outer["backward"])["w"]
    weight, bias = closure(outer["norm_backward"])["weight"], torch.zeros(16)
    leaf = outer["h"].clone().requires_grad_()
    z = torch.nn.functional.conv2d(leaf.relu(), w, None, *layer.conv.args())
    out = torch.nn.functional.batch_norm(z, None, None, weight, bias, True, 0.0, layers.EPS)
    assert torch.equal(run(), torch.autograd.grad(out, leaf, outer["dy"])[0])


def small_passes(monkeypatch):
    monkeypatch.setattr(passes, "SHAPES", {"small": (24, 5)})
    return ["passes", "--batch", "2", "--dtype", "fp32", "--shape", "small"]


def test_passes_command(tmp_path, capsys, monkeypatch):
    """A row a pass; its bytes are what reading and writing each tensor once takes."""
    if backends.native_module()[0] is None:
        pytest.skip(backends.native_module()[1])
    path = tmp_path / "rows.jsonl"
    assert main([*small_passes(monkeypatch), "--out", str(path)]) == 0
    found = [json.loads(line) for line in path.read_text().splitlines()]
    elements = 2 * 24 * 5 * 5
    moved = {row["mode"]: row["gb_per_s"] * row["ms_p50"] * 1e6 for row in found}
    assert moved["statistics"] == pytest.approx(4 * elements, rel=2e-2)
    pooled = 2 * 24 * 3 * 3
    with_pool = 4 * elements + 5 * pooled
    assert moved["bn + relu + max-pool"] == pytest.approx(with_pool, rel=2e-2)
    assert moved["max-pool backward"] == pytest.approx(with_pool + 4 * elements, rel=2e-2)
    for mode in ("bn + add + relu", "gate + add + relu"):
        assert moved[mode] == pytest.approx(12 * elements + elements / 8, rel=2e-2)
    assert all(row["provider"] == "native" for row in found) and len(moved) == len(found) == 17
    assert "native ms" in capsys.readouterr().out


def test_a_wrong_pass_is_not_timed(capsys, monkeypatch):
    if backends.native_module()[0] is None:
        pytest.skip(backends.native_module()[1])
    right = passes.ops.bn_stats

    def wrong(x, impl):
        mean, m2 = right(x, impl)
        return (mean, m2) if impl == "reference" else (mean, 1.01 * m2)

    monkeypatch.setattr(passes.ops, "bn_stats", wrong)
    assert main(small_passes(monkeypatch)) == 1
    err = capsys.readouterr().err
    assert "passes: statistics at small by native: RuntimeError: differs" in err
    assert err.count("\n") == 1


def test_a_pass_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """Nor does a shape whose tensors cannot be made."""
    if backends.native_module()[0] is None:
        pytest.skip(backends.native_module()[1])
    path, right = tmp_path / "rows.jsonl", passes.passes
    options = small_passes(monkeypatch)
    monkeypatch.setattr(passes, "SHAPES", {"none": (25, 5), "small": (24, 5)})
    options[options.index("--shape") + 1] = "none,small"

    def made(x):
        if x.size(1) == 25:
            raise torch.OutOfMemoryError("no room")
        return {"bad": ("bn_stats", [], 1), **right(x)}

    monkeypatch.setattr(passes, "passes", made)
    untimed(monkeypatch, passes)
    assert main([*options, "--out", str(path)]) == 1
    assert len(rows.read([path])) == 17
    err = capsys.readouterr().err
    assert err.startswith(
        "passes: none: OutOfMemoryError: no room\npasses: bad at small by native:"
    )
    assert err.count("passes: ") == 2


def test_ceilings_command(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main(["ceilings", "--dtype", "fp32", "--out", str(path)]) == 0
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["benchmark"] == "ceilings" and row["gb_per_s"] > 0.1 and row["tflop_per_s"] > 1e-3
    assert row["launch_us"] is None, "of CUDA graphs"
    by = "matmul" if ceilings.tiles("fp32") is None else "tiles"
    assert row["provider"] == ("torch" if by == "matmul" else "resnet_fast")
    assert re.search(rf": copy \d+ GB/s, fp32 {by} [\d.]+ TFLOP/s", capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operations_of_tiles_from_registers(dtype):
    """Per step and thread: the accumulators of a tile, 2 operations per value."""
    isa = backends.build_info()["isa_active"] if backends.build_info() else "baseline"
    if isa == "baseline":
        assert ceilings.tiles(dtype) is None
        return
    wide = {"avx2": 12 * 8, "avx512": 28 * 16, "avx512_bf16": 28 * 32, "amx_bf16": 32 * 32 * 32}
    own = wide[isa] if dtype == "bf16" else wide["avx2" if isa == "avx2" else "avx512"]
    assert ceilings.tiles(dtype, 5)() == 5 * 2 * own * torch.get_num_threads()
    assert ceilings.tiles("fp16") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["gpu", *(f"{name} --device cuda" for name in
                                              ("layers", "passes", "ceilings"))])  # fmt: skip
def test_without_a_gpu(command, capsys):
    assert main(command.split()) == 2
    assert "torch.cuda.is_available() is False" in capsys.readouterr().err


def test_bad_values(capsys):
    assert main(["layers", "--batch", "0"]) == 2
    assert main(["layers", "--mode", "train"]) == 2
    assert main(["passes", "--shape", "layer5"]) == 2
    assert main(["passes", "--batch", "0"]) == 2
    assert "--batch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown fields"):
        rows.layer_row({}, nonsense=1)


@pytest.mark.slow
def test_shards():
    """Every test is in one shard of two, and only there."""

    def collected(*options):
        words = "-m pytest --collect-only -q tests/spec/test_layout.py".split()
        done = subprocess.run(
            [sys.executable, *words, *options],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        return [line for line in done.stdout.splitlines() if "::" in line], done

    whole, _ = collected()
    parts = [collected("--shard", f"{i}/2")[0] for i in (0, 1)]
    assert sorted([*parts[0], *parts[1]]) == sorted(whole) and len(whole) > 4
    assert abs(len(parts[0]) - len(parts[1])) <= 1
    assert "expected I/N with 0 <= I < N, got '2/2'" in collected("--shard", "2/2")[1].stderr


@pytest.mark.slow
def test_a_shard_that_fails_hides_no_other(tmp_path, monkeypatch, capsys):
    """Every shard's output is kept, one that crashes or hangs is named; no tests are no failure."""

    def start(log, i, jobs, options):
        code = [
            "print('== 3 passed ==')",
            "print('FAILED tests/test_a.py::test_b - no'); print('1 failed'); raise SystemExit(1)",
            "import os; print('half', flush=True); os.abort()",
            "raise SystemExit(5)",
            "import time; print('slow', flush=True); time.sleep(600)",
        ][i]
        with open(log, "w") as file:
            command = [sys.executable, "-c", code]
            return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    monkeypatch.setattr(shards, "start", start)
    assert shards.run(tmp_path, "wide", 5, 4.0, []) == 1
    assert (tmp_path / "wide.txt").read_text().splitlines() == [
        "shard 0/5: status 0: 3 passed",
        "shard 1/5: status 1: 1 failed",
        "FAILED tests/test_a.py::test_b - no",
        "shard 2/5: status -6: half",
        "shard 3/5: status 5: no output",
        "shard 4/5: out of time: slow",
    ]
    log = (tmp_path / "wide.log").read_text()
    assert all(f"=== shard {i}/5" in log for i in range(5)) and "3 passed" in log
    assert "FAILED tests/test_a.py" in capsys.readouterr().out
    assert shards.run(tmp_path, "few", 1, 20.0, []) == 0


def test_host_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["host"]) == 2
    assert "torch.cuda.is_available() is False here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["host", "--providers", "compile"])


def test_host_rows(monkeypatch):
    """Providers take turns; the first three of a provider's calls are no part of its times."""
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(host, "launches", lambda run: 3 if run is steps["auto"] else 0)
    steps = {name: lambda name=name: calls.append(name) for name in ("eager", "auto")}
    args = SimpleNamespace(rounds=4, dtype="bf16", image_size=64)
    found = host.measured(rows.facts(torch.device("cpu")), "resnet18 train", 2, args, steps)
    assert calls[:8] == ["wait", "eager", "wait", "auto", "wait", "auto", "wait", "eager"]
    assert calls.count("eager") == calls.count("auto") == 7
    assert [(row["provider"], row["launches"], row["ms_p50"]) for row in found] == [
        ("eager", 0, 1000.0), ("auto", 3, 1000.0),
    ]  # fmt: skip
    assert {row["model"] for row in found} == {"resnet18"}
    lines = host.text(found).splitlines()
    assert lines[1].split() == ["resnet18", "train", "2", "eager", "1000000", "0", "-"]
    assert lines[2].split()[-2:] == ["3", "333333.3"]


def test_host_steps_of_a_model():
    """A step a provider that is to be had, in both modes."""
    plain = host.models.plain_model("cifar_resnet20", 32)
    for mode in host.models.MODES:
        case = Case("cifar_resnet20", mode, 2, "fp32", torch.device("cpu"), 32)
        steps = host.whole(plain, case, ["eager", "reference", "auto"])
        assert list(steps) == ["eager", "reference", "auto"]
        results = [steps[name]() for name in steps]
        logits = [r if mode == "infer" else r[0] for r in results]
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
