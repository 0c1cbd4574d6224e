"""A fresh interpreter: without Triton, without the compiled extension, or with a broken one."""

import ast
import graphlib
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
from resnet_fast.dispatch import backends

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
assert backends.chosen("bn_act", "auto", "cpu", torch.float32) == "reference"
assert backends.build_info() is None
reasons = {"native": "resnet_fast._C is not built", "triton": "Triton is not installed"}
for name, says in reasons.items():
    try:
        resnet_fast.add_relu(x, x, impl=name)
    except RuntimeError as error:
        assert f"impl={name!r} cannot run add_relu" in str(error), error
        assert says in str(error), error
        print(name)
    live = [row.live for row in backends.status() if row.impl == name]
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
reason = backends.refusal("triton", "bn_act", "cuda", torch.float32)
assert "does not load: the Triton kernels need Triton 3.4 or newer, found 3" in reason, reason
print("told")
""",
    )  # fmt: skip
    assert told.split() == ["told"]


OTHER_TORCH = """
import sys, types
fake = types.ModuleType("resnet_fast._C")
fake.build_info = lambda: {"torch_version": "1.0"}
fake.configure = lambda **settings: None
fake.__spec__ = importlib.machinery.ModuleSpec("resnet_fast._C", None)
sys.modules["resnet_fast._C"] = fake
"""
UNUSABLE = {  # extensions that are there: how they come, what is said of them
    "does-not-load": (
        "hide('resnet_fast._C')\nsys.meta_path.insert(0, Broken())",
        "resnet_fast._C does not load: undefined symbol: _ZN2at4_ops5emptyE",
    ),
    "older": (OTHER_TORCH + "del fake.configure", "resnet_fast._C is older than the package"),
    "other-torch": (OTHER_TORCH, "resnet_fast._C is built for torch 1.0, not for "),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in UNUSABLE), ("other-torch", True)]
)
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
    from resnet_fast.dispatch import backends
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
assert backends.refusal("native", "bn_act", "cpu", torch.float32) in said
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


FLOORS = (  # from the ground up: a module imports from its own floor and from those below
    "spec", "runtime", "kernels", "dispatch", "autograd", "functional", "blocks", "modules",
    "models", "cuda_graphs", "fusion", "training", "verify", "experiments", "commands", "cli",
    "__init__", "__main__",
)  # fmt: skip
PACKAGE = ROOT / "resnet_fast"


def name_of(path):
    """The module of a file within the package: "spec.chain", "kernels" for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """(module, names) of every import from this package, wherever it stands in the file."""
    path = MODULES[name]
    package = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        base = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            yield inner if inner in MODULES else base or "__init__", alias.name


def test_imports_point_down():
    """No import runs up to a higher floor; nothing but its version is taken from the package."""
    assert {name.partition(".")[0] for name in MODULES} == set(FLOORS)
    up = [
        f"{name} imports {target}"
        for name in MODULES
        for target, what in imports_of(name)
        if (target != "__init__" or what != "__version__")
        and FLOORS.index(target.partition(".")[0]) > FLOORS.index(name.partition(".")[0])
    ]
    assert up == []


def test_no_circle():
    """Modules can be put in an order in which each imports only those before it."""
    graph = {
        name: {target for target, _ in imports_of(name) if target not in (name, "__init__")}
        for name in MODULES
    }
    # `from . import x` names the module x; the package that holds both comes after its modules.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_what_each_floor_may_know():
    """spec imports torch alone, kernels not the reference, and Triton stays in the kernels."""
    for name, path in MODULES.items():
        lines = path.read_text().splitlines()
        outside = [line.strip() for line in lines if re.match(r"\s*(import|from) [a-z_]", line)]
        modules = {line.split()[1].partition(".")[0] for line in outside}
        floor = name.partition(".")[0]
        if floor == "spec":
            assert modules <= {"torch", "__future__", *sys.stdlib_module_names}, name
        if floor == "kernels":
            assert all(target != "spec.reference" for target, _ in imports_of(name)), name
        elif name != "dispatch.auto_impl":  # Triton's errors, while it measures
            assert "triton" not in modules, name


def test_a_short_top():
    """What a user opens first: at most ten modules at the top of the package."""
    assert len(list(PACKAGE.glob("*.py"))) <= 10
