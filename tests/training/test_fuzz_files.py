"""The fuzzer of files: some of its inputs, and that it finds what is wrong."""

import json
import re
import sys
from pathlib import Path

import fuzz_files
import pytest

from resnet_fast.training.checkpoint import CheckpointError

pytest.importorskip("PIL")

COUNT = 150
FILE = Path("/data/run/checkpoint.pt")


def test_some_of_it(capfd):
    """Every kind of file, in processes with a memory limit; the inputs are always the same."""
    status = fuzz_files.main(["--inputs", str(COUNT), "--seed", "0"])
    told = capfd.readouterr().out
    assert status == 0, told
    assert f"{COUNT} inputs, 0 violations" in told


def test_a_seed_says_all(tmp_path):
    """The bytes of an input, and that most of its kind differ."""
    files = fuzz_files.Files(tmp_path)
    for kind in ("checkpoint", "weights", "image", "table"):
        first, again, *others = (
            getattr(files, kind)(fuzz_files.Drawn(seed)).read_bytes() for seed in (3, 3, *range(20))
        )
        assert first == again
        assert len(set(others)) > 10


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (CheckpointError(f"{FILE}: damaged"), ""),
        (ValueError(f"resume: {FILE} has only a model"), ""),
        (KeyError("weights"), "KeyError at .*: 'weights'"),
        (ValueError(f"{FILE}: first\nsecond"), "a message of 2 lines"),
        (ValueError(f"{FILE}: {'x' * 2000}"), "a message of 20.. characters"),
        (ValueError("expected a dict"), "a message that does not name the file"),
        (ValueError(f"{FILE}: MemoryError"), "an allocation failed"),
    ],
)
def test_judge(error, wrong):
    with pytest.raises(type(error)) as raised:
        raise error
    assert re.match(wrong or "$", fuzz_files.judge("checkpoint", FILE, raised.value))


DYING = """
import json, os, sys
for seed in json.loads(sys.stdin.read()):
    print(json.dumps({"begins": seed}), flush=True)
    if seed == 12:
        os.abort()
    told = {"seed": seed, "said": [], "accepted": False, "wrong": "", "seconds": 0.1}
    print(json.dumps(told), flush=True)
"""


def test_a_death_is_told_with_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_files, "INTERPRETER", ["-c", DYING])
    tally = fuzz_files.Tally()
    fuzz_files.run([10, 11, 12, 13, 14], tmp_path / "0", tally)
    assert tally.counts == {
        ("checkpoint", "refused"): 1, ("weights", "refused"): 1, ("cifar", "died"): 1,
        ("image", "refused"): 1, ("table", "refused"): 1,
    }  # fmt: skip
    [(why, seed)] = tally.wrong
    assert seed == 12 and why.startswith("cifar: the process died: status -6")


def test_one_repeats_an_input(capfd):
    assert fuzz_files.main(["--one", "4"]) == 0
    told = capfd.readouterr().out
    assert json.loads(told[: told.index("}") + 1])["seed"] == 4
    assert sys.modules["fuzz_files"] is fuzz_files
