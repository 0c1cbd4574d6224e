"""`bench gpu`: its stages with a small model on a CPU, a run that is resumed, the summary."""

import json
import os
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import correct, gpu, models, profile, rows, stages, step, timing
from bench.__main__ import main
from bench.stages import FAILED, LATE, OK, Context, Outcome, OutOfTime
from bench.step import Case
from resnet_fast.dispatch import ops

CPU = torch.device("cpu")
CHECKED = frozenset({"correct_infer", "correct_train"})
CASE = partial(Case, "cifar_resnet20", dtype="fp32", device=CPU, image_size=32, graph=False)
PLAN = gpu.Plan((CASE(mode="train", batch=2, optimizer="sgd"), CASE(mode="infer", batch=1)), 1)


@pytest.fixture
def quick(monkeypatch):
    """A case is timed for no longer than it has to be."""
    monkeypatch.setattr(gpu, "SECONDS", 0.01)
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.0)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)


def context(out, name="models", seconds=600.0, ok=()):
    out.mkdir(exist_ok=True)
    end = time.monotonic() + seconds
    return Context(name, out, end, end, frozenset(ok))


def test_the_stages():
    """Most important first; what the headline needs fits into the budget."""
    table = gpu.stages_of(gpu.Plan(gpu.headline(torch.device("cuda"))))
    names = [stage.name for stage in table]
    assert names == [
        "machine", "compile", "correct_infer", "correct_train", "models", "profile", "library",
        "layers", "passes", "compile_default", "compile_max",
    ]  # fmt: skip
    assert sum(stage.seconds for stage in table[: names.index("layers")]) <= gpu.BUDGET
    assert all(stage.least < stage.seconds for stage in table)


def test_the_headline():
    cases = gpu.headline(torch.device("cuda"))
    assert [(c.mode, c.batch, c.optimizer) for c in cases] == [
        ("train", 256, "sgd"), ("infer", 256, "none"), ("infer", 1, "none"),
    ]  # fmt: skip
    assert all(c.graph and c.dtype == "bf16" and c.model == "resnet50" for c in cases)


def test_checks_of_projections():
    """Each projection of the model with the convolution that adds it, in inference."""
    case = replace(
        gpu.headline(torch.device("cpu"))[-1], model="resnet18", image_size=32, dtype="bf16"
    )
    joins = [draw for what, draw in correct.draws([case]) if "projection" in what]
    assert len(joins) == 3
    for draw in joins:
        op, args = draw()
        assert op == "conv_add_projection" and args[-1] == [2, 2]
        assert correct.of_call(draw, "auto") == []


def test_arguments(tmp_path, capsys, monkeypatch):
    """A folder with results is not written over; stages are known by name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.signal, "signal", lambda *args: None)
    asked = []
    monkeypatch.setattr(gpu, "measure", lambda *args: asked.append(args) or 1)
    assert main(["gpu", "--out", str(tmp_path), "--budget", "99", "--only", "models,layers"]) == 1
    ((plan, *rest),) = asked
    assert rest == [tmp_path, 99.0, ["models", "layers"]] and len(plan.cases) == 3
    (tmp_path / stages.RECORD).write_text('{"stages": []}')
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert f"continue it with --resume {tmp_path}" in capsys.readouterr().err
    assert main(["gpu", "--resume", str(tmp_path)]) == 1 and asked[1][1] == tmp_path
    for bad in (["--only", "ceilings"], ["--budget", "0"], ["--out", "a", "--resume", "b"]):
        with pytest.raises(SystemExit, match="2"):
            main(["gpu", *bad])


def test_a_run(tmp_path, capsys):
    """In processes: a stage that fails, as there is nothing to measure, is named; others run."""
    assert gpu.measure(gpu.Plan(()), tmp_path, 600.0, ["machine", "models"]) == 1
    found = {one.name: one for one in stages.recorded(tmp_path)}
    assert found["machine"].status == FAILED and "IndexError" in found["machine"].why
    assert found["models"].status == OK and found["layers"].status == stages.WAITING
    assert (tmp_path / stages.SUMMARY).read_text() in capsys.readouterr().out
    assert gpu.measure(gpu.Plan(()), tmp_path, 600.0, ["models"]) == 1, "it has failed before"


def test_a_folder_of_another_gpu_or_commit(tmp_path, capsys, monkeypatch):
    """Rows of two of them in one table would mislead."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.signal, "signal", lambda *args: None)
    monkeypatch.setattr(gpu, "measure", lambda *args: 0)
    monkeypatch.setattr(rows, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(rows, "git_sha", lambda: "abc")
    facts = {"cpu_or_gpu": "NVIDIA H200", "git_sha": "abc", "stage": "machine"}
    row = {name: None for name in rows.FIELDS} | facts
    rows.append(tmp_path / stages.ROWS, [row])
    assert main(["gpu", "--resume", str(tmp_path)]) == 0
    rows.append(tmp_path / stages.ROWS, [row | {"cpu_or_gpu": "NVIDIA H100"}])
    assert main(["gpu", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "has rows of NVIDIA H100 at abc, but this is NVIDIA H200 at abc" in said


@pytest.mark.slow
def test_models_are_checked_once(tmp_path, quick, monkeypatch):
    """After green `correct_*` no second reference in fp64 is run; else it is here."""
    gated = []
    monkeypatch.setattr(correct, "of_model", lambda plain, case: gated.append(case.mode) or [])
    monkeypatch.setattr(models.gate, "at_full_size", lambda *args: 1 / 0)
    assert "images/s by resnet_fast" in gpu.whole_models(PLAN, context(tmp_path, ok=CHECKED))
    assert not gated
    own = stages.read_rows(tmp_path)
    assert [(row["mode"], row["provider"]) for row in own] == [
        ("train", "eager"), ("train", "resnet_fast"), ("infer", "eager"), ("infer", "resnet_fast"),
    ]  # fmt: skip
    assert gpu.whole_models(PLAN, context(tmp_path, ok=CHECKED)) == "", "nothing is missing"
    assert len(stages.read_rows(tmp_path)) == 4
    gpu.whole_models(PLAN, context(tmp_path / "half", ok={"correct_infer"}))
    assert gated == ["train"]
    monkeypatch.setattr(correct, "of_model", lambda plain, case: [f"{case.mode} is wrong"])
    with pytest.raises(RuntimeError, match=r"train is wrong; .*infer is wrong"):
        gpu.whole_models(PLAN, context(tmp_path / "other"))
    assert stages.read_rows(tmp_path / "other") == []


@pytest.mark.slow
def test_the_librarys_rows_are_named(tmp_path, quick, monkeypatch):
    """Another plan has another name in the rows, and its output is looked at."""
    plan = "RESNET_FAST_TRITON_CONV"
    monkeypatch.setenv(plan, "fused")
    seen = []
    measure = models.measure

    def watched(*args, **options):
        seen.append((os.environ[plan], options["check"]))
        return measure(*args, **options)

    monkeypatch.setattr(models, "measure", watched)
    gpu.library(PLAN, context(tmp_path, "library", ok=CHECKED))
    assert seen == [("library", True)] * 2 and os.environ[plan] == "fused"
    assert {row["provider"] for row in stages.read_rows(tmp_path)} == {"library"}


@pytest.mark.slow
def test_a_case_that_fails_leaves_the_others(tmp_path, quick, monkeypatch):
    def broken(plain, case, x):
        if case.mode == "train":
            raise RuntimeError("no kernel\nfor this")
        return models._resnet_fast(plain, case, x)

    provider = replace(models.PROVIDERS["resnet_fast"], build=broken)
    monkeypatch.setitem(models.PROVIDERS, "resnet_fast", provider)
    with pytest.raises(RuntimeError, match=r"train.*no kernel$"):
        gpu.whole_models(PLAN, context(tmp_path, ok=CHECKED))
    own = [(row["mode"], row["provider"]) for row in stages.read_rows(tmp_path)]
    assert own == [("train", "eager"), ("infer", "eager"), ("infer", "resnet_fast")]
    with pytest.raises(RuntimeError, match=r"train.*no kernel$"):
        gpu.whole_models(PLAN, context(tmp_path, ok=CHECKED))
    again = [(row["mode"], row["provider"]) for row in stages.read_rows(tmp_path)]
    assert again == [*own, ("train", "eager")], "a second call tries what failed, and that alone"


def test_a_stage_that_is_late_names_what_failed(tmp_path, quick, monkeypatch):
    """What was wrong before the time was up is the stage's verdict, and not the time."""
    late = context(tmp_path)
    monkeypatch.setattr(correct, "of_model", lambda plain, case: vars(late).update(deadline=0) or
                        ["wrong"])  # fmt: skip
    with pytest.raises(RuntimeError, match=r"train.*: wrong$"):
        gpu.whole_models(PLAN, late)
    checks = [("a", lambda: vars(late).update(deadline=0) or ["bad"]), ("b", lambda: [])]
    monkeypatch.setattr(correct, "checks", lambda cases: checks)
    vars(late).update(deadline=time.monotonic() + 600)
    with pytest.raises(RuntimeError, match=r"^1 of 1 checks failed: a: bad$"):
        gpu.correctness("train", PLAN, late)


def test_profiles_that_are_there_stay(tmp_path, monkeypatch):
    event = {"name": "conv", "ts": 0.0, "dur": 4.0}
    monkeypatch.setattr(profile, "recorded", lambda run: [event])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    one = gpu.Plan(PLAN.cases[1:], 1)
    assert gpu.profiles(one, context(tmp_path, "profile")) == "2 steps in profile.json"
    before = json.loads((tmp_path / gpu.PROFILE).read_text())
    monkeypatch.setattr(profile, "recorded", lambda run: [event | {"dur": 9.0}])
    assert gpu.profiles(PLAN, context(tmp_path, "profile")) == "4 steps in profile.json"
    assert json.loads((tmp_path / gpu.PROFILE).read_text())[:2] == before


def test_passes_go_on_where_they_ended(tmp_path, monkeypatch):
    limits = gpu.ceilings.Ceilings(1e9, 1e12, "fp32")
    monkeypatch.setattr(gpu.ceilings, "measure", lambda *args: limits)
    monkeypatch.setattr(gpu.passes, "SHAPES", {"small 16@4": (16, 4)})
    failing, real, ran = ["sums"], gpu.passes.measured, []

    def measured(run, impl, moved, limits, facts):
        ran.append(facts["mode"])
        if facts["mode"] in failing:
            raise RuntimeError("no")
        return real(run, impl, moved, limits, facts)

    monkeypatch.setattr(gpu.passes, "measured", measured)
    monkeypatch.setattr(gpu.passes, "median_ms", lambda run, device: 1.0)
    with pytest.raises(RuntimeError, match="1 failed: sums at small"):
        gpu.single_passes(PLAN, context(tmp_path, "passes"))
    failing.clear()
    everything = len(ran)
    assert "of a copy" in gpu.single_passes(PLAN, context(tmp_path, "passes"))
    assert ran[everything:] == ["sums"]


def test_layers_go_on_where_they_ended(tmp_path, quick, monkeypatch):
    """Rows are there at once; a second call measures what is missing; a failure is one layer's."""
    real, failing, ran = gpu.layers.layer_rows, [], []
    limits = gpu.ceilings.Ceilings(1e9, 1e12, "fp32")
    monkeypatch.setattr(gpu.ceilings, "measure", lambda *args: limits)

    def rows_of(layer, *args):
        ran.append(layer)
        if len(ran) in failing:
            raise RuntimeError(f"no {layer}")
        return real(layer, *args)

    monkeypatch.setattr(gpu.layers, "layer_rows", rows_of)
    everything = len(list(gpu.layers_in(PLAN)))
    with pytest.raises(OutOfTime):
        gpu.single_layers(PLAN, context(tmp_path, "layers", seconds=0.0))
    failing += [2]
    with pytest.raises(RuntimeError, match=r"1 failed: infer of .*: RuntimeError: no "):
        gpu.single_layers(PLAN, context(tmp_path, "layers"))
    assert len(ran) == everything
    assert "dgrad" in gpu.single_layers(PLAN, context(tmp_path, "layers"))
    assert len(ran) == everything + 1 and ran[-1] == ran[1]


def test_what_is_timed_is_checked():
    """Ops of every layer and the whole model, against fp64, twice, and by what replays them."""
    found = {what: check() for what, check in correct.checks(PLAN.cases)}
    assert not any(found.values()), found
    names = {what.partition(" of ")[0] for what in found if " of " in what}
    assert names == {"fprop", "dgrad and wgrad", "inference"}
    assert len(found) == 3 * len(gpu.layers.layers_of("cifar_resnet20", 32)) + 4


@pytest.mark.parametrize("op, result", [("conv_bn_act", 0), ("conv_fprop", 2), ("conv_bprop", 1)])
def test_a_wrong_op_is_found(op, result, monkeypatch):
    right = getattr(ops, op)

    def wrong(*args):
        found = right(*args)
        if torch.is_tensor(found):
            return 1.01 * found
        return [1.01 * t if i == result else t for i, t in enumerate(found)]

    monkeypatch.setattr(ops, op, wrong)
    draws = [draw for _, draw in correct.draws(PLAN.cases) if draw()[0] == op]
    (one,) = correct.of_call(draws[2], "auto")
    assert one.startswith(f"{correct.RESULTS[op][result]}: error")


def test_other_bits_are_found(monkeypatch):
    """An op, and a model, whose second call differs in the last place."""
    right, calls = ops.conv_bn_act, []

    def unsteady(*args):
        calls.append(args)
        return right(*args) * (1 + 2e-7 * (len(calls) % 2))

    monkeypatch.setattr(ops, "conv_bn_act", unsteady)
    _, draw = list(correct.draws(PLAN.cases[1:]))[1]
    assert correct.of_call(draw, "auto") == ["y: different bits in a second call"]
    infer, plain = step.infer, models.plain_model("cifar_resnet20", 32)
    monkeypatch.setattr(step, "infer", lambda m, x: calls.append(x) or infer(m, x) + len(calls))
    wrong = correct.of_graph(plain, PLAN.cases[1])
    assert len(wrong) == 4 and "different bits in a replay: 1, first logits" in wrong[-1]


def test_correctness_names_what_failed(tmp_path, monkeypatch):
    """All checks run but those after the GPU is lost; time is looked at before each."""
    ran = []

    def check(name, wrong):
        def run():
            ran.append(name)
            if isinstance(wrong, str):
                raise RuntimeError(wrong)
            return wrong

        return name, run

    pytest.importorskip("triton")
    todo = [check("a", []), check("b", ["bad", "worse"]), check("c", "no"), check("d", [])]
    monkeypatch.setattr(correct, "checks", lambda cases: todo)
    with pytest.raises(RuntimeError, match=r"^2 of 4 checks failed: b: bad$"):
        gpu.correctness("train", PLAN, context(tmp_path))
    todo[1:1] = [check("e", "CUDA error: an illegal address")]
    with pytest.raises(RuntimeError, match=r"^e: CUDA error: an illegal"):
        gpu.correctness("train", PLAN, context(tmp_path))
    assert ran == ["a", "b", "c", "d", "a", "e"]
    with pytest.raises(OutOfTime, match="skipped a"):
        gpu.correctness("infer", PLAN, context(tmp_path, seconds=0.0))


ESTIMATE = {
    "model": "cifar_resnet20", "mode": "infer", "batch": 1, "dtype": "fp32", "total_ms": 0.008,
    "images_per_s": 125000.0,
    "launches": [
        {"kernel": "conv", "count": 2, "estimate_us": 3.0}, {"kernel": "conv", "count": 1,
         "estimate_us": 2.0}, {"kernel": "lost", "count": 1, "estimate_us": 2.5},
    ],
}  # fmt: skip


def test_a_profile_beside_the_clock():
    """A step's mean; kernels by name and grid; what only one of both has."""
    events = [
        {"name": "conv", "ts": 100.0 * step, "dur": 4.0, "args": {"grid": [step % 2, 1, 1]}}
        for step in range(2)
    ]
    events += [{"name": "copy", "ts": 50.0, "dur": 1.0}]
    found = profile.summary(events, ESTIMATE, replays=2)
    assert found["busy_us"] == 4.5 and found["span_us"] == 52.0 and found["estimate_us"] == 8.0
    assert found["by_name"] == [
        {"count": 1.0, "total_us": 4.0, "mean_us": 4.0, "name": "conv", "estimate_count": 3,
         "estimate_us": 8.0},
        {"count": 0.5, "total_us": 0.5, "mean_us": 1.0, "name": "copy", "estimate_count": None,
         "estimate_us": None},
        {"count": 0, "total_us": 0.0, "mean_us": None, "name": "lost", "estimate_count": 1,
         "estimate_us": 2.5},
    ]  # fmt: skip
    assert [(one["grid"], one["count"]) for one in found["kernels"]] == [
        ((0, 1, 1), 0.5), ((1, 1, 1), 0.5), (None, 0.5),
    ]  # fmt: skip
    lines = profile.text(found).splitlines()
    assert lines[1].split() == ["conv", "1", "4.0", "4.0", "8.0"]
    assert lines[-1] == "busy 4.5 of 52.0 us per step, estimate 8.0 us"
    assert profile.summary([])["by_name"] == []


def test_the_summary(tmp_path):
    """A line a case and a stage: measured beside estimated, which is marked; no line is long."""
    facts = rows.facts(CPU)
    values = {name: None for name in (*rows.FIELDS, *rows.EXTRA_FIELDS) if name not in facts}
    values |= {"benchmark": "models", "model": "cifar_resnet20", "mode": "infer", "batch": 1}
    values |= {"dtype": "fp32", "image_size": 32}
    new = [
        rows.row(facts, **values | {"provider": name, "images_per_s": rate, **more})
        for name, rate, more in (
            ("eager", 1000.0, {}), ("resnet_fast", 1900.0, {"speedup_vs_eager": 1.9}),
            ("library", float("nan"), {}),
        )
    ]  # fmt: skip
    context(tmp_path).append(new)
    (tmp_path / gpu.ESTIMATES).write_text(json.dumps([ESTIMATE]))
    outcomes = [
        Outcome("machine", OK, 8.2, 30, "a cache: hit"),
        Outcome("correct_train", FAILED, 71, 90, "1 of 70 checks failed: " + "x" * 200),
        Outcome("models", LATE, 120, 120),
        Outcome("layers"),
    ]
    text = gpu.summary(PLAN, tmp_path, outcomes)
    assert [line.split() for line in text.splitlines()[2:6]] == [
        ["images/s", "resnet_fast", "eager", "library", "vs", "eager", "estimate"],
        ["cifar_resnet20", "train", "fp32", "2", "-", "-", "-", "-", "-"],
        ["cifar_resnet20", "infer", "fp32", "1", "1900", "1000", "-", "1.90x", "~125000"],
        "~: an estimate for resnet_fast (bench estimate), not measured".split(),
    ]
    assert max(map(len, text.splitlines()[2:])) <= 100 and len(text.splitlines()) < 30
    assert "layers" in text and "not started" in text and "out of time" in text


def test_names_of_the_clock():
    assert gpu.clock_of("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu.clock_of("NVIDIA H200 (dry)") == gpu.clock_of("another") == "h200"


def test_splits_are_counted(monkeypatch):
    """Of what was chosen, the convolutions whose last number is above 1."""
    config_select = pytest.importorskip("resnet_fast.kernels.config_select")
    chosen = {
        ("conv_affine_act_tma", "gpu"): ((64, 64, 64, 4, 3, 4), "rule"),
        ("conv_affine_act", "gpu"): ((64, 64, 64, 4, 3, 1), "rule"),
        ("bn_stats", "gpu"): ((2048, 4, 8), "rule"),
    }
    monkeypatch.setattr(config_select, "_chosen", chosen)
    assert correct.splits() == 1
