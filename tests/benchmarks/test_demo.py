"""`python -m bench demo`: the digits, the lock-step training, the claims and the page."""

import argparse
import base64
import json
import re
import sys

import pytest
import torch
from test_bench import sample_row

from bench import demo, digits, report, rows
from bench.__main__ import main as bench
from resnet_fast import verify
from resnet_fast.dispatch import backends


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return digits.load()


def test_the_digits_are_all_there(data):
    assert len(data.train_y) + len(data.test_y) == 1797
    assert data.train_x.shape[1:] == data.test_x.shape[1:] == (3, 16, 16)
    assert data.train_x.mean().abs() < 1e-5
    assert data.train_x.std() == pytest.approx(1, abs=1e-4)
    counts = torch.bincount(data.test_y, minlength=10)
    assert counts.min() >= 34  # stratified
    again = digits.load()
    assert torch.equal(again.test_x, data.test_x)


def test_batches_repeat_and_shift(data):
    first, again = (list(digits.batches(data, 1)) for _ in range(2))
    assert len(first) == len(data.train_y) // digits.BATCH
    for (x, y), (same_x, same_y) in zip(first, again, strict=True):
        assert x.shape == (digits.BATCH, 3, 16, 16)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
    twice = list(digits.batches(data, 2))
    assert not torch.equal(twice[0][0], twice[len(first)][0])
    x, y = first[0]
    one = data.train_x[data.train_y == y[0], :1]
    background = data.train_x.min()
    padded = torch.nn.functional.pad(one - background, (digits.SHIFT,) * 4) + background
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1).reshape(-1, 16, 16)
    assert (windows == x[0, 0]).flatten(1).all(1).any()  # one of the scans, moved


@pytest.mark.slow
def test_the_fused_net_follows_the_plain_one(data, impl):
    impl.need(torch.float64)
    impl.need_speed()
    if impl.device != "cpu":
        pytest.skip("the demo is the CPU's")
    exact = digits.train(digits.nets(impl.name, torch.float64), data, steps=6)
    single = digits.train(digits.nets(impl.name), data, steps=3)
    assert set(exact) == {"plain", "fused", "plain NCHW"}
    assert all(len(curve.losses) == 6 and not curve.accuracies for curve in exact.values())
    assert all(curve.seconds > 0 for curve in exact.values())
    assert max(digits.drift(exact, "fused")) < 1e-12
    assert max(digits.drift(single, "fused")) < 1e-3
    assert exact["plain"].losses[0] == pytest.approx(single["plain"].losses[0], rel=1e-5)


def test_a_wrong_gradient_breaks_the_claim(data, monkeypatch):
    resolve = backends.resolve

    def wrong(name, *args):
        right = resolve(name, *args)
        if name != "bn_act_bwd_reduce":
            return right

        def run(*args):
            first, *rest = right.run(*args)
            return first * 1.001, *rest

        return right._replace(run=run)

    monkeypatch.setattr(backends, "resolve", wrong)
    found = digits.train(digits.nets("reference", torch.float64), data, steps=4)
    for curve in found.values():
        curve.accuracies.append(0.99)
    claims = demo.training_claims(found, found)
    assert [claim.ok for claim in claims if "fp64" in claim.text] == [False]


def curves(reached=0.99, apart=0.0):
    """Three curves of two epochs of three steps."""
    losses = [2.0, 1.5, 1.0, 0.5, 0.25, 0.125]
    fused = [value * (1 + apart) for value in losses]
    return {
        "plain": digits.Curve(losses, [0.5, reached], 0.6),
        "fused": digits.Curve(fused, [0.5, reached], 0.5),
        "plain NCHW": digits.Curve(list(losses), [0.5, reached], 0.7),
    }


@pytest.mark.parametrize(
    ("found", "exact", "held"),
    [
        (curves(), curves(), [True] * 4),
        (curves(apart=1e-2), curves(), [True, False, True, True]),
        (curves(), curves(apart=1e-6), [False, True, True, True]),
        (curves(reached=0.96), curves(), [True, True, False, False]),
        (curves(apart=float("nan")), curves(), [True, False, True, True]),
    ],
    ids=["right", "apart", "apart in fp64", "not learned", "nan"],
)
def test_claims_of_the_training(found, exact, held):
    assert [claim.ok for claim in demo.training_claims(found, exact)] == held


@pytest.fixture(scope="module")
def checks():
    trials = verify.trials(["reference"], dtypes=["fp32"], parts=["ops"], quick=True)
    return verify.verify(list(trials))


@pytest.fixture
def measured():
    return [sample_row("eager", images_per_s=33.3, speedup_vs_eager=1.0), sample_row()]


def facts():
    return rows.facts(torch.device("cpu"))


def test_the_page_holds_all_it_shows(tmp_path, checks, measured):
    pytest.importorskip("matplotlib")
    claims = [("right <so far>", True), ("and not this", False)]
    path = report.write(
        tmp_path, environment="torch <2.6>", checks=checks, curves=curves(), measured=measured,
        claims=claims, facts=facts(),
    )  # fmt: skip
    page = path.read_text(encoding="utf-8")
    images = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,([^"]+)">', page)
    assert len(images) == page.count("<img") == 2
    for name, data in zip(("training.png", "throughput.png"), images, strict=True):
        picture = base64.b64decode(data)
        assert picture.startswith(b"\x89PNG")
        assert picture == (tmp_path / name).read_bytes()
    assert "torch &lt;2.6&gt;" in page
    assert '<li class="good">right &lt;so far&gt;</li>' in page
    assert '<li class="bad">and not this</li>' in page
    verified = page[page.index("<h2>Verification") :]
    for check in checks:
        assert f"<td>{check.what}<td>" in verified
    assert verified.count('<tr class="good">') == len({(c.what, c.setting) for c in checks})
    assert "99.00%" in page
    assert "1.50\u00d7" in page
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)  # nothing from elsewhere
    assert page.count("<section") == page.count("</section>")
    assert page.count("<details") == page.count("</details>")


def test_a_failed_check_is_open_and_marked(tmp_path, checks):
    pytest.importorskip("matplotlib")
    wrong = verify.verify([_broken(next(iter(verify.trials(parts=["ops"]))))])
    page = report.write(
        tmp_path, environment="", checks=[*checks, *wrong], curves=curves(), measured=[],
        claims=[("this", False)], facts=facts(),
    ).read_text(encoding="utf-8")  # fmt: skip
    assert "<details open><summary>Ops" in page
    assert "FAIL</b> auto raised RuntimeError: broken &amp; bare" in page
    assert page.count("<img") == 1
    assert not (tmp_path / "throughput.png").exists()


def _broken(trial):
    import dataclasses

    def prepare():
        def actual():
            raise RuntimeError("broken & bare")

        return trial.prepare()._replace(actual=actual)

    return dataclasses.replace(trial, prepare=prepare)


@pytest.fixture
def short(monkeypatch, checks, measured):
    """The demo with all that takes time taken out; `parts` may be changed by a test."""
    parts = {"curves": curves(), "claims": [demo.Claim("the nets agree", True)]}
    monkeypatch.setattr(demo, "training", lambda impl: (parts["curves"], list(parts["claims"])))
    monkeypatch.setattr(
        demo, "throughput", lambda impl, out: (measured, demo.Claim("the gate is green", True))
    )
    trials = verify.trials
    monkeypatch.setattr(
        verify, "trials", lambda impls, **o: trials(impls, **{**o, "parts": ["ops"]}, quick=True)
    )
    return parts


def test_the_demo_ends_with_ok(short, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert bench(["demo", "--out", str(tmp_path / "new" / "demo"), "--impl", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "demo: ok"
    assert [line for line in lines if line.startswith("==")] == [
        f"== {name} =="
        for name in ("environment", "verification", "training", "throughput", "claims")
    ]
    out = tmp_path / "new" / "demo"
    assert (out / "report.html").exists()
    assert json.loads((out / "verify.json").read_text())["ok"] is True


def test_a_claim_that_fails_is_the_last_line(short, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    short["claims"].append(demo.Claim("the nets read well", False))
    assert bench(["demo", "--out", str(tmp_path), "--impl", "reference"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "demo: FAILED: not true: the nets read well"
    assert (tmp_path / "report.html").exists()


def test_a_wrong_op_fails_the_demo(short, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    resolve = backends.resolve

    def wrong(name, *args):
        right = resolve(name, *args)
        double = right._replace(run=lambda *args: right.run(*args) * 2)
        return double if name == "conv_bn_act" else right

    monkeypatch.setattr(backends, "resolve", wrong)
    assert bench(["demo", "--out", str(tmp_path), "--impl", "reference"]) == 1
    out = capsys.readouterr().out
    assert "FAIL conv_bn_act" in out
    assert out.splitlines()[-1].startswith("demo: FAILED: not true: ops: ")


def test_what_is_missing_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(backends, "refusal", lambda *a: "resnet_fast._C is not built")
    assert bench(["demo", "--out", str(tmp_path), "--impl", "native"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("demo: FAILED: --impl native cannot run")
    assert "resnet_fast._C is not built" in last


def test_missing_packages_are_named(tmp_path, monkeypatch, checks):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match="pip install scikit-learn"):
        digits.load()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        report.plot_training(curves(), tmp_path / "training.png")


def test_throughput_keeps_its_rows(tmp_path, monkeypatch):
    asked = []

    def measure(arguments):
        asked.extend(arguments)
        rows.append(tmp_path / "throughput.jsonl", [sample_row()])
        return 0

    monkeypatch.setattr("bench.__main__.main", measure)
    rows.append(tmp_path / "throughput.jsonl", [sample_row("eager")])  # of an earlier demo
    measured, claim = demo.throughput("reference", tmp_path)
    assert measured == [sample_row()]
    assert claim.ok
    parser = argparse.ArgumentParser()
    from bench import models

    models.add_arguments(parser)
    args = parser.parse_args(asked[1:])  # what it asks for is there
    assert (args.impl, args.out) == ("reference", tmp_path / "throughput.jsonl")
