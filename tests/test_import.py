"""A fresh interpreter: without Triton, without the compiled extension, or with a broken one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WITHOUT = """
import importlib.machinery, sys

class Without:
    '''A finder that hides modules from the finder behind it.'''
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def find_spec(self, name, path=None, target=None):
        hidden = any(name == n or name.startswith(n + ".") for n in self.names)
        find = getattr(self.finder, "find_spec", None)
        return None if hidden or find is None else find(name, path, target)

def hide(*names):
    sys.meta_path[:] = [Without(finder, names) for finder in sys.meta_path]

class Broken:
    '''An extension that is there but does not load.'''
    def find_spec(self, name, path=None, target=None):
        if name == "resnet_fast._C":
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("undefined symbol: _ZN2at4_ops5emptyE")
    def exec_module(self, module):
        pass
"""

RUN = """
import torch
import resnet_fast
from resnet_fast import backend

block = resnet_fast.Bottleneck(16, 4)
x = torch.randn(2, 16, 5, 5, requires_grad=True)
block(x).sum().backward()
assert x.grad.isfinite().all() and block.conv1.weight.grad is not None
with torch.no_grad():
    block.eval()(x)
"""


def run(*parts):
    """Run Python source in a fresh interpreter; what it printed."""
    source = "\n".join(parts)
    found = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert "RuntimeWarning: resnet_fast" not in found.stderr
    return found.stdout


def test_without_triton_and_extension():
    """The reference does everything; an explicit choice says what is missing."""
    told = run(
        WITHOUT, "hide('triton', 'resnet_fast._C')", RUN,
        """
assert backend.chosen("bn_act", "auto", "cpu", torch.float32) == "reference"
assert backend.build_info() is None
reasons = {"native": "resnet_fast._C is not built", "triton": "Triton is not installed"}
for name, says in reasons.items():
    try:
        resnet_fast.add_relu(x, x, impl=name)
    except RuntimeError as error:
        assert f"impl={name!r} cannot run add_relu" in str(error), error
        assert says in str(error), error
        print(name)
    live = [row.live for row in backend.status() if row.impl == name]
    assert live and not any(live)
import sys
assert "triton" not in sys.modules and "resnet_fast._C" not in sys.modules
""",
    )  # fmt: skip
    assert told.split() == ["native", "triton"]


def test_with_a_triton_that_is_too_old():
    """One without tensor descriptors: the reason is told, and auto goes on without it."""
    pytest.importorskip("triton")
    told = run(
        "import sys, triton\nsys.modules['triton.tools.tensor_descriptor'] = None", RUN,
        """
reason = backend.refusal("triton", "bn_act", "cuda", torch.float32)
assert "does not load: they need Triton 3.4 or newer, this is 3" in reason, reason
print("told")
""",
    )  # fmt: skip
    assert told.split() == ["told"]


OTHER_TORCH = """
import sys, types
fake = types.ModuleType("resnet_fast._C")
fake.build_info = lambda: {"torch_version": "1.0"}
fake.__spec__ = importlib.machinery.ModuleSpec("resnet_fast._C", None)
sys.modules["resnet_fast._C"] = fake
"""
UNUSABLE = {  # extensions that are there: how they come, what is said of them
    "does-not-load": (
        "hide('resnet_fast._C')\nsys.meta_path.insert(0, Broken())",
        "resnet_fast._C does not load: undefined symbol: _ZN2at4_ops5emptyE",
    ),
    "other-torch": (OTHER_TORCH, "resnet_fast._C is built for torch 1.0, this is "),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_with_an_extension_that_cannot_be_used(name, compiled):
    """One warning says why and what to do; auto goes on without it, an explicit choice does not."""
    setup, why = UNUSABLE[name]
    told = run(
        WITHOUT, setup,
        f"import warnings\nwhy, compiled = {why!r}, {compiled}",
        """
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch, resnet_fast
    from resnet_fast import backend
    assert not [w for w in seen if "resnet_fast" in str(w.message)]
    block = resnet_fast.Bottleneck(16, 4)
    call = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    for _ in range(2):
        call(x).sum().backward()
        with torch.no_grad():
            block.eval()(x)
(said,) = [str(w.message) for w in seen if "resnet_fast" in str(w.message)]
assert said.startswith(why) and "plain PyTorch runs instead" in said, said
assert said.endswith("pip install --no-build-isolation --force-reinstall --no-deps ."), said
assert backend.refusal("native", "bn_act", "cpu", torch.float32) in said
try:
    resnet_fast.add_relu(x, x, impl="native")
except RuntimeError as error:
    print(why in str(error))
""",
    )  # fmt: skip
    assert told.split() == ["True"]


def test_import_is_lazy():
    """Importing loads neither the extension nor Triton nor anything optional."""
    told = run(
        "import sys, resnet_fast",
        "names = ('resnet_fast._C', 'resnet_fast.kernels', 'resnet_fast.training', 'torchvision',",
        "         'matplotlib', 'sklearn', 'PIL')",
        "print([name for name in names if name in sys.modules])",
    )
    assert told.split() == ["[]"]


def test_reference_imports_torch_alone():
    """reference.py is the specification: beside torch it needs only the layout's rules."""
    source = (ROOT / "resnet_fast" / "reference.py").read_text()
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    allowed = ("from __future__", "import torch", "from torch", "from .layout")
    assert all(line.startswith(allowed) for line in imports), imports


@pytest.mark.parametrize("module", ["functional", "modules", "blocks", "chain", "autograd.chain"])
def test_imports_point_down(module):
    """The floors of the house: nothing above the backend knows an implementation by name."""
    source = (ROOT / "resnet_fast" / (module.replace(".", "/") + ".py")).read_text()
    for line in source.splitlines():
        if line.lstrip().startswith(("import ", "from ")):
            assert not re.search(r"triton|\b_C\b|kernels", line), line
