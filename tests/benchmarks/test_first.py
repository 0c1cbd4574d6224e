"""`python -m bench first`: processes of their own, their caches, wrong logits, failures."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from bench import first, first_process, rows
from bench.__main__ import main

TINY = ["first", "--model", "cifar_resnet20", "--image-size", "32", "--providers", "resnet_fast"]
TOOK = {"import_torch_s": 3.0, "import_s": 0.25, "build_s": 0.5, "first_s": 1.0, "total_s": 1.75}


def options(**changes):
    return {"model": "cifar_resnet20", "batch": 1, "dtype": "fp32", "image_size": 32,
            "impl": "reference", "device": "cpu", "provider": "resnet_fast"} | changes  # fmt: skip


def processes(monkeypatch, *, code=0, err=""):
    """Processes that print TOOK instead of being started; what they were called with."""
    calls = []

    def run(command, **keywords):
        calls.append((command, keywords))
        return SimpleNamespace(returncode=code, stdout=f"noise\n{json.dumps(TOOK)}\n", stderr=err)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(first.rows, "git_sha", lambda: None)
    return calls


def test_a_process_says_what_its_parts_took(tmp_path):
    took = first.measure(options(), tmp_path, 120)
    assert tuple(took) == tuple(TOOK) and all(seconds > 0 for seconds in took.values())
    parts = took["import_s"] + took["build_s"] + took["first_s"]
    assert took["total_s"] == pytest.approx(parts)


def test_rows_and_table(tmp_path, monkeypatch, capsys):
    """Two processes a provider, with the same caches in a folder that was not there before."""
    calls = processes(monkeypatch)
    out = tmp_path / "rows.jsonl"
    command = [*TINY[:-1], "eager,resnet_fast", "--batch", "2", "--out", str(out)]
    assert main(command) == 0
    found = rows.read([out])
    assert [(row["provider"], row["caches"]) for row in found] == [
        ("eager", "empty"), ("eager", "warm"), ("resnet_fast", "empty"), ("resnet_fast", "warm"),
    ]  # fmt: skip
    for row in found:
        assert tuple(row) == rows.FIELDS + rows.EXTRA_FIELDS + rows.FIRST_FIELDS
        assert row["benchmark"] == "first" and row["batch"] == 2 and row["dtype"] == "fp32"
        assert {name: row[name] for name in TOOK} == TOOK
    folders = [
        [keywords["env"][name] for name in ("RESNET_FAST_CACHE", "TRITON_CACHE_DIR",
                                            "TORCHINDUCTOR_CACHE_DIR")]
        for _, keywords in calls
    ]  # fmt: skip
    assert folders[0] == folders[1] and folders[2] == folders[3]
    assert len({*folders[0], *folders[2]}) == 6
    asked = [json.loads(command[-1]) for command, _ in calls]
    assert [one["provider"] for one in asked] == ["eager"] * 2 + ["resnet_fast"] * 2
    printed = capsys.readouterr().out.splitlines()
    assert "sum without torch" in printed[0]
    assert printed[-1].split() == ["resnet_fast", "warm", "3.00", "0.25", "0.50", "1.00", "1.75"]


def test_a_process_that_fails_leaves_no_row(tmp_path, monkeypatch, capsys):
    processes(monkeypatch, code=1, err="Traceback\nRuntimeError: no such kernel\n")
    out = tmp_path / "rows.jsonl"
    assert main([*TINY, "--out", str(out)]) == 1
    assert "resnet_fast: RuntimeError: no such kernel" in capsys.readouterr().err
    assert not out.exists()


def test_a_process_that_lasts_too_long(monkeypatch, capsys):
    asked = subprocess.run  # for the commit, too

    def run(command, timeout=None, **keywords):
        if timeout is None:
            return asked(command, **keywords)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert main([*TINY, "--timeout", "7"]) == 1
    assert "resnet_fast: not done after 7 s" in capsys.readouterr().err


def test_wrong_logits_are_no_first_inference(monkeypatch):
    from bench import step

    right = step.infer
    assert first_process.main(options())["total_s"] > 0
    monkeypatch.setattr(step, "infer", lambda module, x: 1.01 * right(module, x))
    with pytest.raises(RuntimeError, match="resnet_fast: output at full size"):
        first_process.main(options())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--model", "resnet51"), ("--providers", "eager_nchw"), ("--batch", "0"), ("--timeout", "no"),
     ("--device", "tpu"), ("--image-size", "-3"), ("--dtype", "fp8")],
)  # fmt: skip
def test_a_bad_value_names_its_option(capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        main(["first", f"{option}={value}"])
    assert exit_.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err
