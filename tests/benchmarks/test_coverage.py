"""Coverage of other packages' models: what is counted, what is compared, the page."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from foreign_models import ResNet
from torch import nn

from bench import coverage
from bench.__main__ import main
from bench.coverage import Coverage, difference, lines_of, main_reason, spliced
from bench.coverage_models import MODELS, PACKAGES, Model, package
from bench.executed import Counts, executed
from resnet_fast import fuse

X = torch.ones(2, 4, 3, 3)
COUNTED = {  # what runs once, as what it counts
    "conv": (lambda: nn.Conv2d(4, 4, 1)(X), Counts(1)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 2)(X), Counts(1)),
    "one-dimensional": (lambda: nn.Conv1d(4, 4, 1)(X[..., 0]), Counts()),
    "gate": (lambda: nn.Conv2d(4, 4, 1)(X.mean((2, 3), keepdim=True)).relu(), Counts()),
    "one-result-pixel": (lambda: nn.Conv2d(4, 4, 3)(X), Counts()),
    "norm": (lambda: nn.BatchNorm2d(4)(X), Counts(norms=1)),
    "norm-in-evaluation": (lambda: nn.BatchNorm2d(4).eval()(X), Counts(norms=1)),
    "instance-norm": (lambda: nn.InstanceNorm2d(4, affine=True)(X), Counts()),
    "relu": (lambda: F.relu(X), Counts(relus=1)),
    "relu-in-place": (lambda: X.clone().relu_(), Counts(relus=1)),
    "relu6": (lambda: F.relu6(X), Counts()),
    "sum": (lambda: X + X, Counts(additions=1)),
    "sum-in-place": (lambda: X.clone().add_(X), Counts(additions=1)),
    "of-a-number": (lambda: X + 1, Counts()),
    "of-a-vector": (lambda: X + X[:, :, :1, :1], Counts()),
    "with-a-factor": (lambda: torch.add(X, X, alpha=2), Counts()),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_what_counts(name, gradients):
    run, expected = COUNTED[name]
    assert executed(run, gradients=gradients) == expected


@pytest.mark.parametrize("training", [False, True])
def test_what_runs_in_an_op_of_resnet_fast_does_not(training):
    plain, x = ResNet().train(training), torch.ones(2, 3, 32, 32)
    every = executed(lambda: plain(x), gradients=training)
    assert every == Counts(convolutions=10, norms=10, relus=9, additions=4)
    assert executed(lambda: fuse(plain)(x), gradients=training) == Counts()


def test_within():
    assert Counts(1, 9, 2, 3).within(Counts(1, 0, 2, 3))
    for name in ("convolutions", "relus", "additions"):
        assert not Counts(**{name: 1}).within(Counts())


def test_difference():
    one, two = torch.ones(2), torch.tensor([1.0, 1.5])
    assert difference([one, None], [one, None]) == 0
    assert difference([two], [one]) == 0.5
    assert difference([one, one * 1e-9], [one, one * 2e-9]) == pytest.approx(1e-6)  # of 1e-3
    for other in (None, torch.ones(3), one * math.nan):
        assert difference([other], [one]) == math.inf


def test_main_reason():
    reasons = ["its result goes to a.0 (SiLU); fusible are others", "it has hooks", ""]
    assert main_reason([*reasons, "its result goes to b.1 (SiLU); x"]) == "its result goes to SiLU"
    assert main_reason([""]) == ""


def one(name, relus=0, apart=0.0):
    every = Counts(5, 5, 4, 0)
    return Coverage(name, (every, Counts()), (every, Counts(relus=relus)), apart, "it has hooks")


class TestThePage:
    TEXT = f"before\n{coverage.BEGIN}\n{coverage.END}\nafter\n"

    def test_keeps_the_lines_of_other_models_in_order(self):
        first, second, *_ = MODELS
        page = spliced(self.TEXT, [one(second)], "versions")
        page = spliced(page, [one(first, 1, 1e-3)], "versions")
        assert list(lines_of(page)) == [first, second]
        assert lines_of(page)[second][1:] == ["5 of 5", "4 of 4", "–", "same", "equal", ""]
        assert lines_of(page)[first][4:] == ["5 of 5, 3 of 4, –", "1e-03 apart", "it has hooks"]
        assert page.startswith("before\n") and page.endswith(f"versions\n{coverage.END}\nafter\n")
        assert list(lines_of(spliced(page, [one(first)], "newer"))) == [first]

    @pytest.mark.parametrize("text", ["", TEXT * 2, f"{coverage.END} {coverage.BEGIN}"])
    def test_has_one_table(self, text):
        with pytest.raises(ValueError, match="expected one <!-- coverage:begin -->"):
            spliced(text, [], "versions")

    def test_of_this_repository_has_every_model(self):
        """Counts that can be, and results that are equal."""
        text = coverage.PAGE.read_text(encoding="utf-8")
        lines = lines_of(text)
        assert list(lines) == list(MODELS)
        for name, (_, *shares, training, results, reason) in lines.items():
            modes = [shares, shares if training == "same" else training.split(", ")]
            pairs = [re.fullmatch(r"(\d+) of (\d+)", cell) for mode in modes for cell in mode]
            assert len(pairs) == 6 and pairs[0] and results == "equal", name
            assert all(int(pair[1]) <= int(pair[2]) for pair in pairs if pair), name
            assert bool(reason) or all(pair[1] == pair[2] for pair in pairs if pair), name
        for name in ("torch", *PACKAGES):
            assert re.search(rf"^Measured with .*\b{name} \d", text, re.MULTILINE)
        assert {package(name) for name in MODELS} == set(PACKAGES)


class Grows(ResNet):
    """A model that cannot run."""

    def forward(self, x):
        raise MemoryError("too large")


@pytest.fixture
def own(monkeypatch, tmp_path):
    """The command with models of this suite instead, and a page of its own."""
    page = tmp_path / "coverage.md"
    page.write_text(TestThePage.TEXT)
    monkeypatch.setattr(coverage, "PAGE", page)
    monkeypatch.setattr(coverage, "why_missing", {"timm": "it is not here"}.get)
    for name in MODELS:
        build = Grows if name == "torchvision/vgg11_bn" else partial(ResNet, planes=4)
        monkeypatch.setitem(MODELS, name, Model(build, 32))
    return page


class TestTheCommand:
    def test_measures_and_says_what_is_missing(self, own, capsys):
        assert main(["coverage", "--models", "timm/resnet18", "transformers/ResNet"]) == 0
        said = capsys.readouterr()
        assert "its models are left out: timm: it is not here" in said.err
        (line,) = said.out.splitlines()
        line = line.rpartition(" | ")[0]
        assert line == "transformers/ResNet | 10 of 10 | 9 of 9 | 4 of 4 | same | equal | "
        assert own.read_text() == TestThePage.TEXT

    def test_a_model_that_fails_is_named_and_the_rest_measured(self, own, capsys):
        names = ["torchvision/vgg11_bn", "transformers/ResNet"]
        assert main(["coverage", "--models", *names]) == 1
        said = capsys.readouterr()
        assert "torchvision/vgg11_bn: MemoryError: too large" in said.err
        assert "transformers/ResNet | 10 of 10" in said.out

    def test_updates_the_page_where_every_package_is_there(self, own, monkeypatch, capsys):
        update = ["coverage", "--update", "--models", "transformers/ResNet"]
        assert main(update) == 1 and own.read_text() == TestThePage.TEXT
        monkeypatch.setattr(coverage, "why_missing", lambda name: None)
        monkeypatch.setattr(coverage, "version", lambda name: "1")
        assert main(update) == 0
        assert list(lines_of(own.read_text())) == ["transformers/ResNet"]
        assert "Measured with torch 1, timm 1" in own.read_text()
