"""Every command's help ends with two command lines that the command takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast import cli
from resnet_fast.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[2]
COMMANDS = [[name] for name in cli.COMMANDS] + [["experiment", name] for name in EXPERIMENTS]


@pytest.mark.parametrize("words", COMMANDS, ids="-".join)
def test_examples(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    title, *examples = capsys.readouterr().out.splitlines()[-3:]
    assert title == "examples:"
    seen = []
    module = __import__(cli.COMMANDS[words[0]][0], fromlist=["run"])
    monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    for example in examples:
        program, *given = example.split()
        assert program == "resnet-fast"
        assert given[: len(words)] == words
        assert cli.main(given) == 0
    assert len(seen) == 2


@pytest.mark.parametrize("words", ["--help", "--version", "env", "env --json", "train --help"])
def test_a_closed_pipe_has_no_message(words):
    """Of a command whose output fits the buffer, too."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-m", "resnet_fast", *words.split()], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.close()
        assert process.wait() == 128 + 13
        assert process.stderr.read() == b""
