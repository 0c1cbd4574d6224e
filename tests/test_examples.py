"""examples/: every script runs as its docstring says and proves its point; the table lists all."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_ops

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
SCRIPTS = {path.name: path for path in sorted(FOLDER.glob("*.py"))}
NOTEBOOK = FOLDER / "drop_in.ipynb"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
LINES = 60
PATIENCE = 300  # seconds; alone on two cores each takes less than half a minute
COMPILED = "export_aoti.py"
IMPORTS = {  # packages that a script needs, by the names pip knows them
    "lightning": "lightning", "accelerate": "accelerate", "timm": "timm", "onnx": "onnx",
    "onnxscript": "onnxscript", "onnxruntime": "onnxruntime", "scikit-learn": "sklearn",
}  # fmt: skip
IMPORTING_TORCHVISION = {"lightning_module.py", "accelerate_loop.py", "timm_utils.py"}


def docstring(path):
    return re.match(r'"""(.*?)"""', path.read_text(encoding="utf-8"), re.DOTALL)[1]


def needs(path):
    """What the docstring says to install."""
    (told,) = re.findall(r"^Needs: (.+)$", docstring(path), re.MULTILINE)
    return told.removeprefix("pip install ").split() if "pip" in told else []


def command(path):
    """The first command of the docstring, by this Python and with torchvision mended."""
    words = shlex.split(re.search(r"^Run: +(.+)$", docstring(path), re.MULTILINE)[1])
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    assert words[0] == "python"
    mended = [torchvision_ops.__file__] if path.name in IMPORTING_TORCHVISION else []
    return [sys.executable, *mended, *words[1:]]


def run(path, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)  # as a user has it
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        command(path), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.strip().splitlines()[-1]


SLOW = {"fine_tune.py", "timm_utils.py", COMPILED}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SCRIPTS]
)
def test_runs(name, tmp_path):
    """As a user runs it; the last line says what was shown."""
    path = SCRIPTS[name]
    for package in needs(path):
        if (reason := torchvision_ops.why_not(IMPORTS[package])) is not None:
            pytest.skip(reason)
    if "torchrun" in docstring(path) and 0 < torch.cuda.device_count() < 2:
        pytest.skip("two processes need a GPU each, this machine has one")
    if name == COMPILED and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("AOTInductor needs a C++ compiler")
    assert run(path, tmp_path).startswith("ok: ")


def test_notebook_runs():
    """Its code cells, one after another; none keeps an output."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    for i, cell in enumerate(code):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_short_and_says_how_to_run(name):
    text = SCRIPTS[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) < LINES
    told = docstring(SCRIPTS[name])
    assert re.search(rf"^Run: .*examples/{name}", told, re.MULTILINE)
    assert all(package in IMPORTS for package in needs(SCRIPTS[name]))


def test_the_table_is_the_folder():
    """Every file has a row, with the needs and the command of its docstring."""
    rows = {}
    for line in README.splitlines():
        if found := re.match(r"\| \[([\w.]+)\]\(([\w.]+)\) \|", line):
            assert found[1] == found[2]
            _, _, _, wanted, how, _ = map(str.strip, line.split("|"))
            rows[found[1]] = wanted, how.strip("`")
    kept = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert set(rows) | {"README.md"} == kept
    for name, path in SCRIPTS.items():
        wanted, how = rows[name]
        told = docstring(path)
        assert f"Run:   {how}\n" in told
        assert wanted == ", ".join(needs(path)) or f"Needs: {wanted}\n" in told
