"""Every option of every command with values of every kind: one line, and no traceback."""

import argparse

import pytest

from resnet_fast import cli
from resnet_fast.commands import env, evaluate, experiment, predict, train, tune, verify
from resnet_fast.experiments import EXPERIMENTS
from resnet_fast.experiments.options import add_common
from resnet_fast.training import History, checkpoint
from resnet_fast.training.history import COLUMNS

VALUES = ("", "-1", "0", "1" + "0" * 30, "9" * 5000, "nan", "1e400", "x" * 300, "\x1b[2J", "a,b",
          "/dev/null", "/nowhere/a", "folder", "file", str(2**64), "1.5", "\ud800")  # fmt: skip
COMMANDS = {
    "train": (train, ["train", "synthetic", "--size", "8"]),
    "eval": (evaluate, ["eval", "synthetic", "--size", "8", "--weights", "model.pt"]),
    "predict": (predict, ["predict", "a.png", "--weights", "model.pt"]),
    "verify": (verify, ["verify", "--quick"]),
    "tune": (tune, ["tune", "--model", "resnet18", "--batch", "1"]),
    "env": (env, ["env"]),
}


def flags(*add):
    """Options with a value."""
    parser = argparse.ArgumentParser()
    for one in add:
        one(parser)
    return [a.option_strings[0] for a in parser._actions if a.option_strings and a.nargs != 0
            and not isinstance(a, argparse.BooleanOptionalAction)]  # fmt: skip


LINES = [
    (command, [*words, flag])
    for command, (module, words) in COMMANDS.items() for flag in flags(module.add_arguments)
] + [
    ("experiment", ["experiment", name, flag])
    for name in EXPERIMENTS for flag in flags(add_common, experiment.load(name).add_arguments)
]  # fmt: skip


@pytest.fixture
def nothing_runs(monkeypatch, tmp_path):
    """A folder with a file of each kind; what the commands do after their checks is left out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (9, 9)).save("a.png")
    from resnet_fast import create_model

    checkpoint.write(tmp_path / "model.pt", {
        "spec": {"name": "cifar_resnet20", "options": {}}, "classes": list("0123456789"),
        "preprocessing": {"size": 8, "resize": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
        "weights": create_model("cifar_resnet20").state_dict(),
    })  # fmt: skip
    history = History([dict.fromkeys(COLUMNS, 1.0)], [1.0])
    monkeypatch.setattr(train, "fit", lambda *a, **k: history)
    monkeypatch.setattr(train, "plot_curves", lambda *a: None)
    monkeypatch.setattr(evaluate, "evaluate", refuse)
    monkeypatch.setattr(verify, "verify", lambda work: [])
    monkeypatch.setattr(verify.report, "text", lambda checks: "")
    for name in EXPERIMENTS:
        monkeypatch.setattr(experiment.load(name), "run", refuse)


def refuse(*args, **options):
    raise ValueError("not run")


@pytest.mark.parametrize(("command", "words"), LINES, ids=[" ".join(w[-2:]) for _, w in LINES])
def test_a_bad_value_is_one_line(nothing_runs, capsys, command, words):
    *before, flag = words
    for value in VALUES:
        try:
            status = cli.main([*before, f"{flag}={value}"])
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        assert status in (0, 1, 2), value
        assert "\x1b" not in said.out + said.err
        if status:
            assert said.err.startswith(f"resnet-fast {command}"), value
            assert said.err.count("\n") == 1, value
