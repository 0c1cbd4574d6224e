"""The benchmarks' own rules: rows, turns, the gate, peak memory, the table, the command line."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import gate, memory, models, peers, rows, step, table, timing
from bench.__main__ import COMMANDS, main
from bench.layers import flops_of
from resnet_fast.runtime.optional import MissingPackage

TINY = ["models", "--model", "tiny", "--image-size", "16", "--rounds", "2", "--threads", "1"]


class Tiny(nn.Module):
    """Two convolutions under torchvision's names, so that conditioning finds the block."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def block(self, x):
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + h).relu()

    def forward(self, x):
        return self.fc(self.block(x).mean((2, 3)))


class LeakyTiny(Tiny):
    """Wrong in the backward pass alone: the skip path gets no gradient."""

    def block(self, x):
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + h.detach()).relu()


class BiasedVarianceTiny(Tiny):
    """Wrong in what it leaves behind alone: running_var takes the biased variance."""

    def forward(self, x):
        before = self.bn1.running_var.clone()
        out = super().forward(x)
        if self.training:
            count = x.numel() / x.size(1)
            new = self.bn1.running_var - 0.9 * before
            self.bn1.running_var = 0.9 * before + new * (count - 1) / count
        return out


class NanTiny(Tiny):
    def forward(self, x):
        return super().forward(x) * float("nan")


def provider_of(kind):
    def build(plain, case, x):
        module = kind()
        module.load_state_dict(plain.state_dict())
        return step.prepare(module, case, "channels_last")

    return models.Provider(build, "channels_last", gated=True)


@pytest.fixture
def tiny(monkeypatch):
    def plain(name, image_size):
        torch.manual_seed(0)
        return gate.condition(Tiny(), image_size)

    monkeypatch.setattr(models, "model_names", lambda: ["tiny"])
    monkeypatch.setattr(models, "plain_model", plain)
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.0)
    monkeypatch.setitem(models.PROVIDERS, "resnet_fast", provider_of(Tiny))
    threads = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(threads)


def sample_row(provider="resnet_fast", **changes):
    values = {name: None for name in (*rows.FIELDS, *rows.EXTRA_FIELDS)}
    values |= {
        "benchmark": "models", "model": "resnet50", "mode": "infer", "batch": 16, "dtype": "fp32",
        "layout": "channels_last", "device": "cpu", "provider": provider, "images_per_s": 50.0,
        "ms_p20": 310.0, "ms_p50": 320.0, "ms_p80": 330.0, "peak_mb": 200.0,
        "speedup_vs_eager": 1.5, "torch": "2.6.0", "cpu_or_gpu": "a CPU", "threads": 2,
        "git_sha": "abc", "date": "2025-01-01T00:00:00+00:00", "image_size": 224, "rounds": 9,
        "isa": "AVX2", "impl": "auto", "optimizer": "none",
    }  # fmt: skip
    return values | changes


@pytest.mark.slow
def test_a_row_has_every_field_in_order(tiny, tmp_path, capsys):
    out = tmp_path / "deep" / "rows.jsonl"
    arguments = ["--mode", "infer,train", "--batch", "1,2", "--dtype", "bf16"]
    asked = ["eager_nchw", "eager", "resnet_fast"]
    arguments += ["--providers", ",".join(asked), "--out", str(out), "--json"]
    assert main([*TINY, *arguments]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found
    assert len(found) == 2 * 2 * len(asked)
    for one in found:
        assert tuple(one) == rows.FIELDS + rows.EXTRA_FIELDS
        assert 0 < one["ms_p20"] <= one["ms_p50"] <= one["ms_p80"]
        assert one["images_per_s"] == pytest.approx(one["batch"] / one["ms_p50"] * 1e3, rel=1e-3)
        assert one["peak_mb"] > 0
        assert one["rounds"] == 2
        assert one["layout"] == ("nchw" if one["provider"] == "eager_nchw" else "channels_last")
    assert {one["speedup_vs_eager"] for one in found if one["provider"] == "eager"} == {1.0}


def test_rows_refuse_missing_and_unknown_fields():
    with pytest.raises(ValueError, match="peak_mb"):
        rows.row({k: v for k, v in sample_row().items() if k != "peak_mb"})
    with pytest.raises(ValueError, match=r"unknown fields.*colour"):
        rows.row(sample_row(), colour="red")


def test_reading_names_the_line_at_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.append(path, [sample_row()])
    assert rows.read([path]) == [sample_row()]
    path.open("a").write('{"model": "resnet50"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the row has no benchmark"):
        rows.read([path])


def test_turns_rotate():
    order = []
    steps = {name: lambda i, name=name: order.append((name, i)) for name in "abc"}
    times = timing.interleave(steps, rounds=4, repeats=2)
    turns = ["abc", "bca", "cab", "abc"]
    assert order == [
        (name, 2 * turn + k) for turn, names in enumerate(turns) for name in names for k in (0, 1)
    ]
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 4)


@pytest.mark.parametrize(("tick", "expected"), [(0.1, timing.MIN_ROUNDS), (0.001, 50)])
def test_seconds_bound_the_rounds(tick, expected):
    now = [0.0]

    def work(i):
        now[0] += tick

    times = timing.interleave({"a": work, "b": work}, seconds=0.0999, clock=lambda: now[0])
    assert len(times["a"]) == len(times["b"]) == expected
    assert times["a"] == pytest.approx([tick * 1e3] * expected)


def test_speedup_is_paired_by_round():
    eager, ours = [10.0, 40.0, 10.0], [5.0, 20.0, 4.0]  # a slow second slows both
    assert timing.speedup(eager, ours) == 2.0
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_gate_passes_the_same_model(tiny, mode, dtype):
    case = step.Case("tiny", mode, 1, dtype, torch.device("cpu"), 16)
    checks = gate.gate(provider_of(Tiny).build, models.plain_model("tiny", 16), case)
    kinds = ["output", "loss", "parameter gradients", "running statistics"]
    assert [check.kind for check in checks] == (kinds if mode == "train" else kinds[:1])
    assert all(check.ok for check in checks), checks
    assert max(check.allowed for check in checks) < 0.5


@pytest.mark.parametrize(
    ("broken", "mode", "kind"),
    [
        (LeakyTiny, "train", "parameter gradients"),
        (BiasedVarianceTiny, "train", "running statistics"),
        (NanTiny, "infer", "output"),
        (nn.Identity, "infer", "raised RuntimeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_model_gets_no_rows(tiny, tmp_path, capsys, broken, mode, kind):
    tiny.setitem(models.PROVIDERS, "resnet_fast", provider_of(broken))
    out = tmp_path / "rows.jsonl"
    arguments = ["--mode", mode, "--batch", "1", "--providers", "eager,resnet_fast"]
    assert main([*TINY, *arguments, "--out", str(out), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert not out.exists()
    red = [line for line in printed.err.splitlines() if "RED" in line]
    assert len(red) == 1
    assert kind in red[0]


def test_an_output_wrong_at_full_size_alone_gets_no_rows(tiny, capsys):
    class WrongWhenLarge(Tiny):
        def forward(self, x):
            return super().forward(x) * (1 if x.size(0) == gate.GATE_BATCH else 1.01)

    tiny.setitem(models.PROVIDERS, "resnet_fast", provider_of(WrongWhenLarge))
    arguments = ["--mode", "infer", "--batch", "1", "--providers", "eager,resnet_fast", "--json"]
    assert main([*TINY, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "full size" in next(line for line in printed.err.splitlines() if "RED" in line)


def test_a_failing_peer_leaves_the_others_their_rows(tiny, capsys):
    def broken(plain, case, x):
        raise RuntimeError("no compiler here")

    tiny.setitem(models.PROVIDERS, "compile", models.Provider(broken, "channels_last"))
    assert main([*TINY, "--mode", "infer", "--batch", "1", "--json"]) == 1
    printed = capsys.readouterr()
    found = [json.loads(line)["provider"] for line in printed.out.splitlines()]
    assert found == ["eager_nchw", "eager", "resnet_fast"]
    assert "compile raised RuntimeError: no compiler here" in printed.err


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_op_suite_refuses_a_wrong_op(monkeypatch, mode):
    pytest.importorskip("pytest_benchmark")
    from bench import ops

    layer = ops.Layer("layer4", 8, 7, nn.Identity, (8, 7))
    ops.check("add_relu", layer, mode, torch.float32)

    def wrong(module, x, residual):
        return (x + 1.1 * residual).relu()

    monkeypatch.setitem(ops.OPS, "add_relu", ([layer], ops.eager_add_relu, wrong))
    with pytest.raises(AssertionError, match=r"add_relu layer4 7x7x8: output \(y\)"):
        ops.check("add_relu", layer, mode, torch.float32)


def test_peak_memory_counts_what_is_kept_and_what_a_step_needs():
    mib = 2**20 // 4

    def build():
        kept = torch.empty(4 * mib)  # parameters, packed weights

        def one(i):
            a = torch.empty(8 * mib)
            b = torch.empty(2 * mib)
            del a
            return b, torch.empty(3 * mib), kept

        return one

    step_of, peak = memory.peak_of(build, torch.device("cpu"))
    assert peak == pytest.approx(4 + 8 + 2, abs=0.1)
    assert callable(step_of)


def test_integration_sees_only_the_span_and_only_its_own():
    kept, before, inside, after, foreign = range(5)
    changes = [
        (1, kept, 10), (2, before, 100), (3, before, -100), (5, inside, 7), (6, inside, -7),
        (7, inside, 3), (8, foreign, -1000), (20, after, 1000),
    ]  # fmt: skip
    assert memory.integrate(changes, 4, 10) == 17
    assert memory.integrate(reversed(changes), 8, 9) == 13
    assert memory.integrate([(1, kept, 10)], 4, 9) == 10


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--model", "tiny,resnet51", "comma-separated list of tiny; got 'resnet51'"),
        ("--mode", "infer,fit", "comma-separated list of infer, train; got 'fit'"),
        ("--batch", "1,0", "positive int, got '0'"),
        ("--batch", "1,,2", "positive int, got ''"),
        ("--dtype", "fp8", "comma-separated list of fp32, bf16, fp16; got 'fp8'"),
        ("--device", "tpu", "one of cpu, cuda; got 'tpu'"),
        ("--providers", "eager,onnx", "got 'onnx'"),
        ("--threads", "0", "positive int, got '0'"),
        ("--rounds", "many", "positive int, got 'many'"),
        ("--seconds", "nan", "positive float, got 'nan'"),
        ("--image-size", "-1", "positive int, got '-1'"),
        ("--impl", "cudnn", "choose from"),
        ("--optimizer", "adam", "choose from"),
    ],
)
def test_a_bad_value_names_its_option(tiny, capsys, option, value, expected):
    with pytest.raises(SystemExit) as exit_:
        main(["models", f"{option}={value}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: " in error
    assert expected in error


def test_cuda_without_a_gpu_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["models", "--device", "cuda"])
    assert "argument --device: expected cpu: torch.cuda.is_available()" in capsys.readouterr().err


def test_commands_are_imported_when_asked_for(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as exit_:
        main(["modles"])
    assert exit_.value.code == 2
    assert "invalid choice: 'modles'" in capsys.readouterr().err
    command = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--tile", type=int),
        run=lambda args: args.tile,
    )
    monkeypatch.setitem(COMMANDS, "kernels", ("a_module", "kernels one by one"))
    monkeypatch.setattr("importlib.import_module", {"a_module": command}.__getitem__)
    assert main(["kernels", "--tile", "7"]) == 7


def test_other_runtimes_take_inference_on_a_cpu_alone():
    cpu = step.Case("resnet18", "infer", 1, "fp32", torch.device("cpu"))
    others = [replace(cpu, mode="train"), replace(cpu, device=torch.device("cuda"))]
    for takes in (peers.openvino_takes, peers.onnxruntime_takes):
        assert takes(cpu)
        assert not any(takes(other) for other in others)
    bf16 = replace(cpu, dtype="bf16")
    assert peers.openvino_takes(bf16)
    assert not peers.onnxruntime_takes(bf16)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_another_runtime_that_is_not_installed(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    case = step.Case("tiny", "infer", 1, "fp32", torch.device("cpu"), 32)
    with pytest.raises(MissingPackage, match=f"pip install {name}"):
        getattr(peers, name)(Tiny(), case, torch.zeros(1, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_another_runtime_computes_the_same(name, tiny, capsys):
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnxscript")
    asked = ["--mode", "infer", "--batch", "2", "--providers", f"{name},resnet_fast", "--json"]
    assert main([*TINY, *asked]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["provider"], one["peak_mb"] is None) for one in found] == [
        (name, True), ("resnet_fast", False)
    ]  # fmt: skip


def test_a_table_with_another_runtime():
    run = [
        sample_row("openvino", images_per_s=40.0, ms_p50=400.0, peak_mb=None),
        sample_row("resnet_fast", speedup_vs_eager=None),
    ]
    header, _, line = table.markdown(run).splitlines()[2:5]
    assert header == (
        "| model | mode | dtype | batch | OpenVINO | resnet_fast | vs OpenVINO | peak MiB |"
    )
    assert line.endswith("| 40 | 50 | 1.25x | – → 200 |")
    assert table.text(run).splitlines()[1].split()[-2:] == ["–", "1.50x"]


def test_table_round_trip(tmp_path, capsys):
    results, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    peers = {"eager": (33.3, 480.0, 1.0), "compile": (45.7, 350.0, 1.37)}
    rows.append(results, [sample_row(), sample_row(model="resnet18")])
    rows.append(results, [
        sample_row(p, images_per_s=i, ms_p50=ms, speedup_vs_eager=s, peak_mb=300.0)
        for p, (i, ms, s) in peers.items()
    ])  # fmt: skip
    begin = f"{table.BEGIN} resnet50 -->"
    readme.write_text(f"# Title\n\n{begin}\nold\n{table.END}\n\nrest\n")
    command = ["table", str(results), "--update", str(readme)]
    assert main([*command, "--check"]) == 1
    assert "differs from the rows" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert main(command) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n" + begin)
    assert "resnet18" not in text
    assert text.endswith(table.END + "\n\nrest\n")
    line = "| resnet50, 224 px | infer | fp32 | 16 | 33.3 | 45.7 | 50 | 1.50x | 1.09x | 300 → 200 |"
    assert line in text
    for word in ("a CPU", "2 threads", "PyTorch 2.6.0", "2025-01-01", "`abc`", "AVX2"):
        assert word in text
    assert main([*command, "--check"]) == 0
    rows.append(results, [sample_row(images_per_s=20.0, date="2025-02-01T00:00:00+00:00")])
    assert main([*command, "--check"]) == 1
    assert main(["table", str(results)]) == 0
    assert re.search(r"^\| resnet50, 224 px .* \| 20 \|", capsys.readouterr().out, re.M)


def test_a_table_shows_threads_and_the_share_of_the_fma_limit():
    limit = sample_row("resnet_fast", benchmark="ceilings", model=None, mode=None, batch=None)
    limits = [limit | {"tflop_per_s": 1.0}, limit | {"tflop_per_s": 4.0, "date": "2025-02-01"}]
    infer = flops_of("resnet50", "infer")
    assert infer == pytest.approx(2 * 4.087e9, rel=1e-3)  # its 4.09 G multiply-adds, without fc
    stem = 2 * 112 * 112 * 64 * 3 * 49  # its dgrad is not computed
    assert flops_of("resnet50", "train") == 3 * infer - stem
    one = sample_row(threads=1, images_per_s=20.0)
    found = [*limits, sample_row(), one, sample_row("eager"), sample_row(dtype="bf16")]
    text = table.markdown(found)
    heading, _, header, _, first, alone, bf16 = text.splitlines()[:7]
    assert "(1 and 2 threads, " in heading and header.endswith("| threads | of the FMA limit |")
    assert first.endswith(f"| 2 | {50 * infer / 4e12:.0%} |")
    assert alone.endswith("| 1 | – |") and bf16.endswith("| 2 | – |")  # no limit of that case
    heading, _, header = table.markdown([sample_row()]).splitlines()[:3]
    assert "(2 threads, " in heading and "threads" not in header


def test_a_table_line_holds_one_run_and_the_newest():
    old = [sample_row(p, images_per_s=1.0) for p in ("eager", "compile", "resnet_fast")]
    late = "2025-03-01T00:00:00+00:00"
    new = [sample_row(p, images_per_s=2.0, date=late) for p in ("eager", "resnet_fast")]
    other = sample_row("eager", cpu_or_gpu="another CPU")
    for found in ([*old, *new, other], [*new, *old, other]):
        runs = table.newest(found)
        assert [sorted(run) for run in runs] == [["eager", "resnet_fast"], ["eager"]]
        assert runs[0]["eager"]["images_per_s"] == 2.0
    assert table.markdown([]).startswith("No measurements yet")
    assert table.newest([sample_row(benchmark="kernels")]) == []


OPENED = f"{table.BEGIN} -->\n"


@pytest.mark.parametrize(
    "text", ["no markers", OPENED, f"{table.END}{OPENED}", OPENED * 2 + table.END]
)
def test_update_needs_its_markers(tmp_path, capsys, text):
    results, readme = tmp_path / "rows.jsonl", tmp_path / "README.md"
    rows.append(results, [sample_row()])
    readme.write_text(text)
    assert main(["table", str(results), "--update", str(readme)]) == 1
    assert readme.read_text() == text
    assert f"expected one {table.BEGIN}" in capsys.readouterr().err


def test_pages_show_the_committed_rows():
    assert main(["table", "--check"]) == 0


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.png"
    table.plot_throughput([sample_row("eager"), sample_row(), sample_row(mode="train")], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one row"):
        table.plot_throughput([], path)


def test_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        table.plot_throughput([sample_row()], tmp_path / "bars.png")
