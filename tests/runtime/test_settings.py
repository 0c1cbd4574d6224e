"""The environment variables: default, range, error, and that nothing else reads them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_fast.runtime import settings

ROOT = Path(__file__).parents[2]
GOOD = {
    settings.TRACE: ("1", True),
    settings.AUTOTUNE: ("0", False),
    settings.CACHE: ("/a/folder", Path("/a/folder")),
    settings.TRITON_CONV: ("library", "library"),
    settings.CUDA_CONV: ("cudnn", "cudnn"),
    settings.CPU_CONV: ("tiles", "tiles"),
    settings.CPU_ISA: ("avx2", "avx2"),
    settings.CPU_CACHE_MB: ("0", 0),
    settings.BENCH_BATCH: ("1", 1),
    settings.BENCH_DEVICE: ("cuda", "cuda"),
    settings.BENCH_IMPL: ("triton", "triton"),
}


@pytest.mark.parametrize("setting", settings.ALL, ids=lambda setting: setting.variable)
def test_values(setting, monkeypatch):
    text, value = GOOD[setting]
    monkeypatch.delenv(setting.variable, raising=False)
    assert setting.read() == setting.default
    monkeypatch.setenv(setting.variable, "")
    assert setting.read() == setting.default
    monkeypatch.setenv(setting.variable, text)
    assert setting.read() == value
    if setting is not settings.CACHE:
        monkeypatch.setenv(setting.variable, "yes?")
        said = f"{setting.variable}: expected {setting.expected}, got 'yes?'"
        with pytest.raises(settings.BadSetting, match=re.escape(said)):
            setting.read()


@pytest.mark.parametrize("text", ["2x", "-1", "1e3", " 5", "²", str(2**44), str(10**23)])
def test_mebibytes_that_are_none(text, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_CPU_CACHE_MB", text)
    with pytest.raises(settings.BadSetting, match="MiB from 0 to 8796093022207, got"):
        settings.CPU_CACHE_MB.read()


@pytest.mark.parametrize("before", [None, "0"])
def test_set_to(before, monkeypatch):
    if before is None:
        monkeypatch.delenv("RESNET_FAST_AUTOTUNE", raising=False)
    else:
        monkeypatch.setenv("RESNET_FAST_AUTOTUNE", before)
    with pytest.raises(KeyError), settings.AUTOTUNE.set_to("1"):
        assert settings.AUTOTUNE.read()
        raise KeyError
    assert settings.os.environ.get("RESNET_FAST_AUTOTUNE") == before


@pytest.mark.parametrize("command", ["env", "verify --quick"])
def test_a_command_names_the_variable(command):
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fast", *command.split()], cwd=ROOT, capture_output=True,
        text=True, env={**settings.os.environ, "RESNET_FAST_TRACE": "maybe"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: RESNET_FAST_TRACE: expected 0 or 1, got 'maybe'" in done.stderr


def test_read_in_one_place():
    """No other file of the package or of the kernels reads one; setup.py has its own."""
    named = {setting.variable for setting in settings.ALL}
    for path in [*ROOT.glob("resnet_fast/**/*.py"), *ROOT.glob("bench/*.py")]:
        text = path.read_text()
        if path.name != "settings.py":
            assert not re.findall(r"environ[^\n]*RESNET_FAST_", text), path
        assert set(re.findall(r'"(RESNET_FAST_\w+)"', text)) <= named | {"RESNET_FAST_BUILD"}, path
    for path in ROOT.glob("csrc/**/*"):
        assert path.is_dir() or "getenv" not in path.read_text(), path


@pytest.mark.parametrize("before, after", [(None, "auto"), ("", "auto"), ("cudnn", "cudnn")])
def test_prefer_keeps_what_is_set(monkeypatch, before, after):
    """An empty variable counts as unset, as in `read`."""
    name = settings.CUDA_CONV.variable
    monkeypatch.setenv(name, before or "")
    if before is None:
        monkeypatch.delenv(name)
    settings.CUDA_CONV.prefer("auto")
    assert settings.CUDA_CONV.read() == after
