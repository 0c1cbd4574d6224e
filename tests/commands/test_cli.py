"""`resnet-fast` and `resnet-fast env`: what they print, also with nothing built; bad arguments."""

import json
import subprocess
import sys

import pytest
import torch

import resnet_fast
from resnet_fast import cli
from resnet_fast.commands import env
from resnet_fast.dispatch import backends, ops
from resnet_fast.spec.chain import IMPLS
from resnet_fast.spec.dtypes import DTYPES

BARE = """
import sys
for name in ("resnet_fast._C", "triton"):
    sys.modules[name] = None  # as if it were not there
from resnet_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*arguments):
    """`resnet-fast` in a fresh interpreter that has neither `_C` nor Triton."""
    command = [sys.executable, "-c", BARE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_env_names_versions_and_implementations(capsys):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    for word in (resnet_fast.__version__, torch.__version__, "python", "compiler", "threads"):
        assert word in out
    for row in backends.status():
        assert row.why in out
    assert 'impl="auto" takes' in out


def test_env_json_says_what_auto_takes(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert {row["impl"] for row in found["implementations"]} == set(IMPLS) - {"auto"}
    cpu = [row for row in found["auto"] if row["device"] == "cpu"]
    assert len(cpu) == len(ops.NAMES) * len(DTYPES)
    for row in cpu:
        dtype = getattr(torch, row["dtype"])
        assert row["takes"] == backends.chosen(row["op"], "auto", "cpu", dtype)
        assert row["takes"] not in row["not"]
        assert all(row["not"].values())  # every implementation before it has a reason


@pytest.mark.slow
def test_env_with_nothing_built_and_no_triton():
    done = bare("env")
    assert done.returncode == 0, done.stderr
    assert "resnet_fast._C is not built" in done.stdout
    assert "Triton is not installed" in done.stdout
    assert "every op" in done.stdout
    found = json.loads(bare("env", "--json").stdout)
    assert found["build"] is None
    assert {row["takes"] for row in found["auto"]} == {"reference"}
    assert [row["impl"] for row in found["implementations"] if row["live"]] == ["reference"]


def test_an_op_that_goes_another_way_has_its_own_line():
    rows = [
        {"device": "cpu", "dtype": "float32", "op": op, "takes": takes, "not": refused}
        for op, takes, refused in (
            ("bn_act", "native", {}),
            ("add_relu", "reference", {"native": "there is no native kernel for add_relu"}),
        )
    ]
    assert env.auto_lines(rows) == [
        ("cpu", "float32", "native", "bn_act"),
        ("cpu", "float32", "reference",
         "add_relu (not native: there is no native kernel for add_relu)"),
    ]  # fmt: skip


def test_python_m_resnet_fast():
    command = [sys.executable, "-m", "resnet_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"resnet_fast {resnet_fast.__version__}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["enw"], "invalid choice: 'enw'"),
        (["env", "--yaml"], "unrecognized arguments: --yaml"),
    ],
    ids=["none", "unknown", "option"],
)
def test_bad_command_lines(capsys, arguments, expected):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert expected in capsys.readouterr().err


def test_help_imports_no_command(monkeypatch, capsys):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(SystemExit) as raised:
        cli.main(["--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, (_, summary, *_) in cli.COMMANDS.items())
