"""The fuzzer: some of its cases, and that it finds what is wrong."""

import json
import math
import sys

import fuzz
import pytest
import torch

from resnet_fast.dispatch import backends

pytestmark = pytest.mark.skipif(backends.native_module()[0] is None, reason="native is not built")

COUNT = 8  # a pair


@pytest.mark.slow
def test_some_of_it(capsys):
    """Every instruction set of this CPU, every way to convolve; the cases are always the same."""
    status = fuzz.main(["--count", str(COUNT), "--seed", "0", "--small"])
    told = capsys.readouterr().out
    assert status == 0, told
    pairs = fuzz.pairs(fuzz.parser().parse_args([]))
    assert f"{COUNT * len(pairs)} cases, 0 mismatches" in told


def test_a_seed_says_all():
    assert fuzz.draw(77) == fuzz.draw(77)
    cases = [fuzz.draw(seed) for seed in range(400)]
    assert {case.kind for case in cases} >= {"conv_bn_act", "stem", "resnet", "PreActBottleneck"}
    assert {case.values for case in cases} == set(fuzz.VALUES)
    assert any(0 in case.size for case in cases)


NAN, INF, ONE = (torch.full((4,), value) for value in (math.nan, math.inf, 1.0))


@pytest.mark.parametrize(
    ("actual", "same", "wide", "message"),
    [
        (ONE, [NAN, NAN], NAN, "NaN swallowed"),
        (NAN, [ONE, ONE], ONE, "NaN made"),
        (INF, [ONE, ONE], ONE, "an infinity made"),
        (ONE, [INF, INF], INF, "an infinity lost"),
        (1.01 * ONE, [ONE, ONE], ONE, "error 0.01"),
        (ONE[:3], [ONE, ONE], ONE, "shape"),
    ],
)
def test_judge_fails(actual, same, wide, message):
    with pytest.raises(fuzz.Mismatch, match=message):
        fuzz.judge("y", actual, same, wide)


def test_judge_passes():
    """One plain run that differs leaves both open."""
    for actual in (NAN, ONE):
        assert not fuzz.judge("y", actual, [NAN, ONE], ONE)
    assert not fuzz.judge("grad x", 9 * ONE, [ONE, ONE], ONE, by_value=False)


def test_a_tie_is_what_rounding_decides():
    """A ReLU's input, or a max-pool's lead, no further from zero than another run is off."""
    x = torch.tensor([[[[-0.25, 2.0], [1.0, 1.5]]]])
    pool = torch.nn.MaxPool2d(2)
    for run, error, clear in (
        (torch.relu, 0.2, True), (torch.relu, 0.3, False), (pool, 0.4, True), (pool, 0.6, False),
    ):  # fmt: skip
        seen = []
        for value in (x, x + error):
            with fuzz.Kinks() as kinks:
                run(value)
            seen.append(kinks)
        assert seen[0].outlast(seen[1]) is clear, (run, error)


def test_plain_pytorch_by_onednn_counts():
    """A NaN in filters that meets the zeros of the padding: NaN by ATen, left out by oneDNN."""
    case = fuzz.draw(40108)
    assert case.poisoned == "nan" and case.options["padding"] == (1, 1)
    fuzz.one(case)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y.relu_() * 1.001, "error"),
        (lambda y: y.nan_to_num(0.0), "NaN swallowed"),
        (lambda y: (_ for _ in ()).throw(ValueError("spoilt")), "native: ValueError: spoilt"),
        (lambda y: y + 1e-3 * torch.rand(()), "other bits"),
    ],
    ids=["values", "nan", "raises", "bits"],
)
def test_a_fault_is_found(spoil, message, monkeypatch):
    """Of an op that is wrong in one of four ways."""
    seed = next(s for s in range(999) if (c := fuzz.draw(s)).kind == "conv_bn_act"
                and c.values == ("nan" if "NaN" in message else "normal") and c.mode == "infer"
                and c.size[0] and not c.poisoned and "track" in c.options and c.options["track"]
                and not fuzz.one(c)["raised"])  # fmt: skip
    conv_bn_act = fuzz.resnet_fast.conv_bn_act
    monkeypatch.setattr(
        fuzz.resnet_fast, "conv_bn_act", lambda *args, **words: spoil(conv_bn_act(*args, **words))
    )
    with pytest.raises(fuzz.Mismatch, match=message):
        fuzz.one(fuzz.draw(seed))


DYING = """
import json, os, sys
seed = next(int(word[7:]) for word in sys.argv if word.startswith("--seed="))
count = next(int(word[8:]) for word in sys.argv if word.startswith("--count="))
for seed in range(seed, seed + count):
    print(json.dumps({"begins": seed}), flush=True)
    if seed == 12:
        os.abort()
    print(json.dumps({"seed": seed, "used": {}, "failed": None}), flush=True)
"""


def test_a_death_is_told_with_its_seed():
    args = fuzz.parser().parse_args(["--seed", "10", "--count", "5"])
    args.interpreter = ["-c", DYING]
    tally = fuzz.run_pair("baseline", "auto", args)
    assert tally.cases == 5
    assert tally.failed == [(12, "the process died: status -6")]


def test_one_repeats_a_case(capsys):
    assert fuzz.main(["--one", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["seed"] == 3
    assert sys.modules["fuzz"] is fuzz
