"""`python -m bench scaling`: points, budget, memory that runs out, the table, the picture."""

import functools
import sys

import pytest
import torch

from bench import curves, models, rows, scaling, step
from bench.__main__ import main

SMALL = ["--model", "cifar_resnet20", "--mode", "infer", "--seconds", "0.01", "--threads", "1",
         "--providers", "eager,resnet_fast"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Samples of one step, and the threads as they were."""
    monkeypatch.setattr(models.timing, "MIN_SAMPLE_MS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measure(out, *options):
    status = main(["scaling", *SMALL, "--out", str(out), *options])
    return status, rows.read([out]) if out.exists() else []


def point(provider, *, images_per_s=None, peak_mb=None, over="batch", **changes):
    """A row; without images_per_s one that failed."""
    row = dict.fromkeys((*rows.FIELDS, *rows.EXTRA_FIELDS, *rows.POINT_FIELDS))
    row |= {
        "benchmark": "scaling", "model": "cifar_resnet20", "mode": "infer", "batch": 4,
        "dtype": "bf16", "device": "cuda", "provider": provider, "cpu_or_gpu": "NVIDIA H200",
        "image_size": 32, "date": "2026-01-01", "over": over, "device_mb": 1005.0,
    }  # fmt: skip
    row |= changes
    if images_per_s is None:
        return row | {"failed": changes.get("failed", "out of memory")}
    ms = 1e3 * row["batch"] / images_per_s
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), ms)
    return row | times | {"images_per_s": images_per_s, "peak_mb": peak_mb}


def over_batches(provider, rates, peaks, **changes):
    return [
        point(provider, batch=batch, images_per_s=rate, peak_mb=peak, **changes)
        for batch, rate, peak in zip((1, 2, 4, 8, 16), rates, peaks, strict=False)
    ]


BATCHES = [
    *over_batches("eager", [100, 190, 320, 390], [120, 140, 180, 260]),
    point("eager", batch=16),
    *over_batches("resnet_fast", [195, 380, 630, 700, 710], [60, 70, 90, 130, 210]),
]


def test_an_order_that_spans_from_its_start():
    assert scaling.coarse_first([1, 2, 4, 8, 16, 32, 64]) == [1, 64, 8, 2, 16, 4, 32]
    for n in range(12):
        assert sorted(scaling.coarse_first(range(n))) == list(range(n))


def test_points_lie_on_every_axis_once():
    found = scaling.points(("batch", "resolution", "depth"), ["a", "b"], [1, 2, 4], [32, 64],
                           ("a", 2, 32))  # fmt: skip
    assert found[0] == scaling.Point("a", 2, 32, ("batch", "resolution", "depth"))
    assert [p.over for p in found[1:]] == [("batch",), ("resolution",), ("depth",), ("batch",)]
    places = [(p.model, p.batch, p.image_size) for p in found]
    assert set(places[1:]) == {("a", 1, 32), ("a", 4, 32), ("a", 2, 64), ("b", 2, 32)}
    (alone,) = scaling.points(["depth"], ["c"], [7], [96], ("a", 2, 32))
    assert alone == scaling.Point("c", 7, 96, ("depth",))  # a list that lacks the centre gives one


def test_the_budget(capsys):
    """What took longest of a mode is expected again; what does not fit is named."""
    now, done = [0.0], []

    def take(case, over):
        done.append(case.batch)
        now[0] += case.batch
        return [case.batch]

    cases = [(step.Case("m", "infer", n, "fp32", torch.device("cpu"), 32), ()) for n in (1, 6, 2)]
    assert scaling.within(cases, 10.0, take, clock=lambda: now[0]) == [1, 6] == done
    assert "left out m infer fp32 batch 2, 32 px: 6 s, 3 s left" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_table_and_picture(tmp_path, capsys):
    """A row a place and provider, the centre on both axes; the picture is made from them again."""
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "rows.jsonl", tmp_path / "deep" / "scaling.png"
    status, found = measure(out, "--over", "batch,resolution", "--batch", "1,2", "--image-size",
                            "32,48", "--plot", str(picture))  # fmt: skip
    assert status == 0 and len(found) == 2 * 3
    fields = rows.FIELDS + rows.EXTRA_FIELDS + rows.POINT_FIELDS
    for row in found:
        assert tuple(row) == fields and row["benchmark"] == "scaling" and row["failed"] is None
        rate = 1e3 * row["batch"] / row["ms_p50"]
        assert row["images_per_s"] == pytest.approx(rate, rel=1e-3) and row["peak_mb"] > 0
        assert row["device_mb"] is None or row["device_mb"] > row["peak_mb"]
    overs = {(row["batch"], row["image_size"]): row["over"] for row in found}
    assert overs == {(2, 48): "batch,resolution", (1, 48): "batch", (2, 32): "resolution"}
    printed = capsys.readouterr().out
    assert "against batch; 48 px, cifar_resnet20" in printed and "against resolution" in printed
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 20_000
    picture.unlink()
    assert main(["scaling", "--rows", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes() == first and capsys.readouterr().out == printed


def wrong(plain, case, x):
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = step.prepare(plain, case, "channels_last")

        def forward(self, x):
            return 1.01 * self.plain(x)

    return Wrong()


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        models.PROVIDERS, "resnet_fast", models.Provider(wrong, "channels_last", gated=True)
    )
    status, found = measure(tmp_path / "rows.jsonl", "--over", "batch", "--batch", "1,2",
                            "--image-size", "32")  # fmt: skip
    assert status == 1 and found == []
    said = capsys.readouterr().err
    assert said.count("gate RED") == 1 and "no rows of this benchmark" in said


def short_of_memory(monkeypatch, times, error):
    """eager raises `error` at batch 2, `times` times."""
    provider, left = models.PROVIDERS["eager"], [times]

    def build(plain, case, x):
        if case.batch == 2 and left[0] > 0:
            left[0] -= 1
            raise error
        return provider.build(plain, case, x)

    monkeypatch.setitem(models.PROVIDERS, "eager", models.Provider(build, provider.layout))


@pytest.mark.slow
def test_memory_that_runs_out_is_a_row_and_the_curve_goes_on(tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 2, torch.OutOfMemoryError("Tried to allocate 2 GiB"))
    status, found = measure(tmp_path / "rows.jsonl", "--over", "batch", "--batch", "1,2,4",
                            "--image-size", "32")  # fmt: skip
    assert status == 0 and len(found) == 6
    (failed,) = (row for row in found if row["failed"])
    assert (failed["provider"], failed["batch"], failed["failed"]) == ("eager", 2, "out of memory")
    assert failed["images_per_s"] is None and failed["peak_mb"] is None
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "out of memory" in line)
    assert said.split()[:2] == ["2", "eager"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), models.MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), models.MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), models.MEMORY),
        (ValueError("no compiler here\nmore"), "ValueError: no compiler here"),
    ],
    ids=["python", "cpu", "cudnn", "another"],
)
def test_how_libraries_say_that_memory_ran_out(monkeypatch, error, reason):
    def build(plain, case, x):
        raise error

    monkeypatch.setitem(models.PROVIDERS, "eager", models.Provider(build, "channels_last"))
    case = step.Case("cifar_resnet20", "infer", 1, "fp32", torch.device("cpu"), 32)
    plain = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert models.measure(plain, case, ["eager"], {}) == ([], {"eager": reason})


def test_what_has_no_memory_beside_the_others_is_measured_alone(tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 1, MemoryError())
    status, found = measure(tmp_path / "rows.jsonl", "--over", "batch", "--batch", "2",
                            "--image-size", "32")  # fmt: skip
    assert status == 0 and "eager alone, for want of memory" in capsys.readouterr().err
    assert {row["provider"]: row["failed"] for row in found} == {"eager": None, "resnet_fast": None}


def test_a_gate_without_memory_is_not_the_providers_want(tmp_path, monkeypatch):
    def at_full_size(*args):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(models.gate, "at_full_size", at_full_size)
    status, found = measure(tmp_path / "rows.jsonl", "--over", "batch", "--batch", "1",
                            "--image-size", "32")  # fmt: skip
    assert status == 0
    why = {row["provider"]: row["failed"] for row in found}
    assert why == {"eager": None, "resnet_fast": "out of memory in the gate"}


def test_another_failure_is_no_want_of_memory(tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 9, RuntimeError("no compiler here"))
    status, found = measure(tmp_path / "rows.jsonl", "--over", "batch", "--batch", "2",
                            "--image-size", "32")  # fmt: skip
    assert status == 1 and [row["provider"] for row in found] == ["resnet_fast"]
    assert "no compiler here" in capsys.readouterr().err


def test_a_cpu_is_not_asked_for_more_than_it_has(monkeypatch):
    """There the end of memory is the end of the process: the largest case so far foretells it."""
    sweep = scaling.Sweep(["eager"], 0.01, rows.facts(torch.device("cpu")), 64.0, 40.0)
    monkeypatch.setattr(models, "plain_model", lambda *args: None)
    monkeypatch.setattr(models, "measure", lambda plain, case, *args, **options: (
        [point("eager", images_per_s=1.0, peak_mb=3.0 * case.batch)], {}))  # fmt: skip
    of = functools.partial(step.Case, "cifar_resnet20", "infer", dtype="fp32",
                           device=torch.device("cpu"), image_size=32)  # fmt: skip
    found = [sweep.measure(of(batch=n), ["batch"])[0] for n in (4, 8, 16)]
    assert [row["failed"] for row in found[:2]] == [None, None]
    assert found[2]["failed"] == "more than the free memory, by estimate"
    assert found[2]["batch"] == 16 and found[2]["device_mb"] == 64.0


def test_the_table_says_what_failed_and_the_share_of_the_floor():
    (panel,) = curves.panels(BATCHES)
    lines = [line.split() for line in curves.table(panel).splitlines()]
    share = f"{100 * panel.work[1].floor_ms / BATCHES[-5]['ms_p50']:.0f}"
    assert lines[0][-3:] == ["%", "of", "floor"]
    assert lines[1] == ["1", "resnet_fast", "195", "5.13", "60", "–", share]
    assert lines[-1] == ["16", "eager", "out", "of", "memory", *"––––"]
    (panel,) = curves.panels([row | {"device": "cpu"} for row in BATCHES])
    assert "floor" not in curves.table(panel)


def test_the_floor_is_the_limits_of_that_gpu():
    """By its newest row of ceilings, else what is known of it; a CPU has none."""
    (row,) = over_batches("resnet_fast", [1e4], [1.0])
    known = curves.limits_of(row, [])
    assert known.bytes_per_s == 4.3e12
    ceilings = [
        row | {"benchmark": "ceilings", "date": date, "gb_per_s": 1e3, "tflop_per_s": rate}
        for date, rate in (("2026-01-02", 2.0), ("2026-01-01", 1.0))
    ]
    found = curves.limits_of(row, ceilings)
    assert (found.bytes_per_s, found.flops_per_s) == (1e12, 2e12)
    assert curves.limits_of(row | {"cpu_or_gpu": "NVIDIA T4"}, ceilings) is None
    assert curves.limits_of(row | {"dtype": "fp32"}, ceilings) is None
    assert curves.limits_of(row | {"device": "cpu"}, ceilings) is None
    (panel,) = curves.panels([*BATCHES, *ceilings])
    work = panel.work[1]
    assert work.floor_ms >= 1e3 * work.bytes / 1e12
    assert max(work.bytes_ms, work.flops_ms) <= work.floor_ms <= work.bytes_ms + work.flops_ms


def test_the_newest_run_of_each_axis():
    new = over_batches("resnet_fast", [1.0, 2.0], [5.0, 6.0], date="2026-02-01")
    depth = point("eager", images_per_s=3.0, peak_mb=7.0, over="depth")
    found = curves.panels([*new, *BATCHES, depth])
    assert [panel.axis for panel in found] == ["batch", "depth"]
    assert list(found[0].curves) == ["resnet_fast"] and list(found[1].curves) == ["eager"]


def test_the_picture_of_a_gpu(tmp_path):
    """With a floor, crosses, the device's memory; the panels that are not there stay empty."""
    pytest.importorskip("matplotlib")
    train = [row | {"mode": "train", "over": "resolution"} for row in BATCHES if row["batch"] == 4]
    path, less = tmp_path / "a.png", tmp_path / "b.png"
    scaling.scaling_plot.plot(curves.panels([*BATCHES, *train]), path)
    scaling.scaling_plot.plot(curves.panels(BATCHES), less)
    assert path.read_bytes().startswith(b"\x89PNG") and less.stat().st_size < path.stat().st_size


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    rows.append(out, BATCHES)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["scaling", "--rows", str(out), "--plot", str(tmp_path / "a.png")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--over", "width", "comma list of batch, resolution, depth; got 'width'"),
        ("--model", "resnet51", "got 'resnet51'"),
        ("--batch", "0", "positive int, got '0'"),
        ("--image-size", "large", "positive int, got 'large'"),
        ("--mode", "fit", "got 'fit'"),
        ("--dtype", "fp8", "got 'fp8'"),
        ("--device", "tpu", "got 'tpu'"),
        ("--providers", "onnx", "got 'onnx'"),
        ("--minutes", "-1", "positive float, got '-1'"),
    ],
)
def test_a_bad_value_names_its_option(capsys, option, value, expected):
    with pytest.raises(SystemExit) as exit_:
        main(["scaling", f"{option}={value}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: " in error and expected in error


def test_values_that_no_parser_sees(tmp_path, capsys):
    assert main(["scaling", "--image-size", "16"]) == 2
    assert "--image-size: expected at least 32" in capsys.readouterr().err
    assert main(["scaling", "--rows", str(tmp_path / "none.jsonl")]) == 2
    assert "--rows: " in capsys.readouterr().err
