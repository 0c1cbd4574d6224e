"""Fixtures of the suite: implementations, dtypes and layouts by name, poisoned memory, seeds."""

import argparse
import os
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

# Before torch loads OpenMP: over a few elements its threads mostly wait for each other, and where
# the cores are shared those that wait by spinning keep the others from working.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import emulation
import fast_interpreter
import pytest
import torch
from pairs import every_pair

# Before the kernels are imported: without a GPU they run in Triton's interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from resnet_fast.dispatch import backends, replay
from resnet_fast.spec.dtypes import BY_NAME

DTYPES = BY_NAME
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Impl:
    """One implementation on one device: `impl=name` for tensors of `device`.

    emulated: native is `csrc/cuda`, compiled for the CPU.
    """

    name: str
    device: str
    emulated: bool = False

    @property
    def interpreted(self):
        """Whether a GPU's threads are taken one by one: milliseconds for an operation."""
        return self.emulated or (self.name == "triton" and self.device == "cpu")

    def need_speed(self):
        """Skip a test of whole nets in the interpreter: parts of it have run there by now."""
        if self.interpreted:
            pytest.skip(f"{self.name} on {self.device}: minutes, a thread at a time")

    def refusal(self, dtype=torch.float32, op="bn_act"):
        """Why `op` cannot run here in `dtype`, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "this machine has no CUDA device"
        if self.emulated and emulation.refusal() is not None:
            return emulation.refusal()
        if self.emulated and dtype == torch.float16:  # where native has it on a GPU
            dtype = torch.float32
        return backends.refusal(self.name, op, self.device, dtype)

    def need(self, dtype, *ops):
        """Skip the test, with the reason, unless every one of `ops` runs in `dtype`."""
        for op in ops or ("bn_act",):
            reason = self.refusal(dtype, op)
            if reason is not None:
                pytest.skip(f"{self.name} on {self.device}: {reason}")


IMPLS = {
    "reference": Impl("reference", "cpu"),
    "native-cpu": Impl("native", "cpu"),
    "native-cuda": Impl("native", "cuda"),
    "native-cuda-emulated": Impl("native", "cpu", emulated=True),
    "triton-interpreter": Impl("triton", "cpu"),
    "triton-cuda": Impl("triton", "cuda"),
}


@pytest.fixture(params=IMPLS.values(), ids=IMPLS.keys())
def impl(request, monkeypatch):
    """Every implementation in turn; one that is not there skips with its reason."""
    request.param.need(torch.float32)
    if request.param.name == "native":  # cuDNN for channels that CUTLASS does not take
        monkeypatch.setenv("RESNET_FAST_CUDA_CONV", "auto")
    if not request.param.emulated:
        on_gpu = request.param.device == "cuda"  # then all that a test draws is there
        with torch.device("cuda") if on_gpu else nullcontext():
            yield request.param
        return
    ops = emulation.ops()
    monkeypatch.setattr(backends, "native_ops", lambda: ops)
    monkeypatch.setitem(backends.NATIVE_DTYPES, "cpu", backends.NATIVE_DTYPES["cuda"])
    backends._resolve.cache_clear()
    yield request.param
    backends._resolve.cache_clear()


ALONE = {"layout": torch.channels_last, "keep": False, "bias": False}
"""What the interpreter runs where one value of a parameter stands for all."""


def shard(text):
    """ "I/N" as (I, N): every N-th test from the I-th."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return int(i), int(n)


def pytest_addoption(parser):
    parser.addoption("--shard", type=shard, metavar="I/N", default=(0, 1),
                     help="every N-th test from the I-th, for N processes at once")  # fmt: skip
    parser.addoption("--quick", action="store_true",
                     help="one case a test and implementation, and no slow tests")  # fmt: skip
    parser.addoption("--every", action="store_true",
                     help="every case; else those that hold each pair of parameters")  # fmt: skip


@pytest.hookimpl(hookwrapper=True)
def pytest_collection_modifyitems(config, items):
    """Mark what needs a GPU, and leave out what shows nothing and what another shard has.

    Without --every, tests marked `minutes` are left out, and of the cases that remain those are
    taken that hold every pair of parameters (`thinned`). Cases that a test marks by `leave_out`
    never run.

    Of a missing implementation one case a test is kept: it skips and stands for the rest. The
    interpreter and the emulator take milliseconds for an operation; there the ops run in full
    (`test_ops`), and what is made of them in the cases of ALONE: the rest differs in the ops'
    arguments only. In the interpreter fp16 differs from fp32 where values are widened and rounded,
    which channels_last shows.
    """
    kept, rest, seen, quick = [], [], set(), config.getoption("quick")
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        impl = params.get("impl")
        missing = isinstance(impl, Impl) and impl.refusal(dtype_of(params)) is not None
        if isinstance(impl, Impl) and impl.device == "cuda":
            item.add_marker(pytest.mark.gpu)
        covered = isinstance(impl, Impl) and impl.interpreted and item.path.stem != "test_ops"
        covered = covered and any(params.get(name, value) != value for name, value in ALONE.items())
        if impl == IMPLS["triton-interpreter"] and params.get("dtype") == torch.float16:
            covered = covered or params.get("layout") == torch.contiguous_format
        key = item
        if missing or quick:
            key = (item.path, item.cls, item.originalname, impl, missing and dtype_of(params))
        covered = covered or (quick and item.get_closest_marker("slow") is not None)
        covered = covered or (item.get_closest_marker("minutes") and not config.getoption("every"))
        for mark in item.iter_markers("leave_out"):
            covered = covered or mark.kwargs["cases"](SimpleNamespace(**params))
        (rest if key in seen or covered else kept).append(item)
        seen.add(key)
    config.hook.pytest_deselected(items=rest)
    items[:] = kept
    yield  # what -m and -k leave is thinned out and dealt out
    if not config.getoption("every"):
        keep(config, items, thinned(items))
    i, n = config.getoption("shard")
    keep(config, items, set(range(i, len(items), n)))


def dtype_of(params):
    """The dtype that a case asks its implementation for."""
    return params.get("dtype", params.get("narrow", torch.float32))


def thinned(items):
    """Indices of the cases that hold, for each implementation, each pair of a test's parameters."""
    tests = defaultdict(list)
    for i, item in enumerate(items):
        impl = item.callspec.params.get("impl") if hasattr(item, "callspec") else None
        tests[item.path, item.cls, getattr(item, "originalname", item.name), id(impl)].append(i)
    kept = set()
    for places in tests.values():
        cases = [getattr(items[i], "callspec", None) for i in places]
        if None in cases:
            kept.update(places)
        else:
            kept.update(places[j] for j in every_pair([case.params for case in cases]))
    return kept


def keep(config, items, kept):
    """Deselect all of `items` but those at the indices `kept`."""
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in kept])
    items[:] = [item for i, item in enumerate(items) if i in kept]


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request):
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.fixture
def poisoned_memory():
    """`torch.empty` and its kin, C++'s too, come filled with NaN (or the largest integer)."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def no_programs():
    """What a test before this one had recorded, with what it had patched, is replayed by none."""
    replay.forget()


@pytest.fixture(autouse=True)
def two_threads():
    """Whatever the test before this one had set."""
    torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def no_tf32():
    """fp32 is fp32 on a GPU too: how two libraries round to tf32 differs by more than it does.

    In the interpreter, which multiplies in fp32 whatever is allowed, the flag stays as it is: with
    it convolutions in fp32 go by descriptors.
    """
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def faster_interpreter():
    if "TRITON_INTERPRET" in os.environ and find_spec("triton") is not None:
        fast_interpreter.install()


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
