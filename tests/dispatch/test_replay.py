"""Chains run by their recorded steps: the same bits as run anew, and when they must not be."""

import contextlib
import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast.dispatch import backends, ops, replay
from resnet_fast.runtime import recording, tuning_tables
from resnet_fast.spec import chain

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BLOCKS = {
    "conv": lambda **o: resnet_fast.ConvBNAct2d(8, 16, 3, **o),
    "basic": lambda **o: resnet_fast.BasicBlock(16, 16, **o),
    "bottleneck": lambda **o: resnet_fast.Bottleneck(16, 8, 2, **o),
    "pre-activation": lambda **o: resnet_fast.PreActBottleneck(16, 8, 2, **o),
    "kept activations": lambda **o: resnet_fast.Bottleneck(32, 8, keep_activations=True, **o),
}


@pytest.fixture
def recorded(monkeypatch):
    """The programs that were recorded, in order; the CPU's chains are replayed as a GPU's."""
    programs = []

    def noted(*args):
        result, steps = recording.record(*args)
        programs.append(steps)
        return result, steps

    monkeypatch.setattr(replay, "record", noted)
    monkeypatch.setattr(replay, "DEVICES", {"cpu", "cuda"})
    replay.forget()
    yield programs
    replay.forget()


@contextlib.contextmanager
def anew():
    """Within it nothing is replayed."""
    before, replay.DEVICES = replay.DEVICES, set()
    try:
        yield
    finally:
        replay.DEVICES = before


def inputs(module, device, n=2, size=(6, 5), dtype=torch.float32):
    channels = next(p for p in module.parameters() if p.dim() == 4).size(1)
    x = torch.randn(n, channels, *size, dtype=dtype).to(memory_format=torch.channels_last)
    return x.to(device).requires_grad_()


def step(module, x):
    """Everything that a step gives: y, gradients, running statistics."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(torch.cos(y.detach()))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


def block_of(kind, impl, **options):
    module = BLOCKS[kind](impl=impl.name, **options).to(impl.device)
    return module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", BLOCKS)
def test_training(impl, kind, recorded):
    """Four steps, each on other data; the third and fourth are replayed."""
    impl.need(torch.float32, *ops.NAMES)
    module = block_of(kind, impl)
    again = copy.deepcopy(module)
    for i in range(4):
        x = inputs(module, impl.device)
        given = step(module, x)
        with anew():
            expected = step(again, x)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True)), i
        assert len(recorded) == 3 * (i > 0), "forward, update, backward, at their second call"
        assert None not in recorded


@pytest.mark.parametrize("kind", BLOCKS)
def test_inference(impl, kind, recorded):
    impl.need(torch.float32, *ops.NAMES)
    module = block_of(kind, impl).eval()
    with torch.no_grad():
        for _ in range(3):
            x = inputs(module, impl.device)
            given = infer(module, x)
            with anew():
                assert torch.equal(given, infer(module, x))
    assert len(recorded) == 1 and None not in recorded


def infer(module, x):
    """module(x), chain by chain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_fast.modules, "infer", lambda *args: None)
        return module(x)


@pytest.mark.slow
def test_autocast(impl, recorded):
    """Filters are cast in the program, anew in each run."""
    narrow = torch.float16 if impl.interpreted else torch.bfloat16
    impl.need(narrow, *ops.NAMES)
    module = block_of("basic", impl)
    again = copy.deepcopy(module)
    for _ in range(3):
        with torch.no_grad():
            for p, q in zip(module.parameters(), again.parameters(), strict=True):
                q.copy_(p.mul_(0.9))
        x = inputs(module, impl.device)
        with torch.autocast(impl.device, narrow):
            given = step(module, x)
            with anew():
                expected = step(again, x)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert len(recorded) == 5, "the addition takes x in fp32: a chain of its own"


def test_gradients_have_memory_of_their_own(recorded):
    """A program clones what its function does, and takes what a hook has put into other strides."""
    module = resnet_fast.BasicBlock(8, 16, 2, impl="reference").to(
        memory_format=torch.channels_last
    )
    biases = [module.bn2.bias, module.downsample[1].bias]
    x = inputs(module, "cpu")
    for unpack in [torch.clone] * 3 + [torch.Tensor.contiguous] * 3:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = module(x)
        sums, again = torch.autograd.grad(y.sum(), biases)
        torch.testing.assert_close(sums, (y > 0).sum((0, 2, 3)).float())
        assert torch.equal(sums.clone().neg_(), -again) and sums.zero_().sum() != again.sum()
    assert len(recorded) == 4 and None not in recorded, "forward, update, two times backward"
    x, residual, dy = torch.randn(3, 2, 8, 5, 4)
    for _ in range(3):
        y = resnet_fast.add_relu(x.requires_grad_(), residual.requires_grad_(), impl="reference")
        first, second = torch.autograd.grad(y, [x, residual], dy)
        first.zero_()
        assert torch.equal(second, torch.where(y > 0, dy, 0.0))


def test_what_a_program_is_known_by(recorded, monkeypatch):
    """Whatever a chain's steps depend on makes another program."""
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()

    def programs(x=None, **size):
        before = len(recorded)
        for _ in range(2):
            with torch.no_grad():
                infer(module, inputs(module, "cpu", **size) if x is None else x)
        return len(recorded) - before

    assert programs() == 1 and programs() == 0
    assert programs(n=3) == 1 and programs(size=(5, 6)) == 1 and programs() == 0
    assert programs(torch.randn(2, 8, 6, 5)) == 1, "NCHW"
    buffer = torch.randn(2 * 8 * 30 + 1)
    assert programs(buffer[1:].view(2, 6, 5, 8).permute(0, 3, 1, 2)) == 1, "alignment"
    module.bn1.eps = 1e-3
    assert programs() == 1
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", "library")
    assert programs() == 1
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    assert programs() == 1
    module.double()
    assert programs(dtype=torch.float64) == 1
    with torch.autocast("cpu", torch.bfloat16):  # which leaves double as it is
        assert programs(dtype=torch.float64) == 1
    replay.forget()
    assert programs(dtype=torch.float64) == 1


def test_full_table_starts_over(recorded, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 2)
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()
    for n in (1, 1, 2, 2, 3, 3, 1, 1):
        with torch.no_grad():
            infer(module, inputs(module, "cpu", n=n))
    assert len(recorded) == 4 and len(replay._programs) == 2


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("who", ["mode", "search", "watch", "subclass"])
def test_ordinary_way(who, recorded, monkeypatch):
    """Who looks on sees every op; a search measures; a subclass has its own ideas."""
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()
    x = inputs(module, "cpu").detach()
    around = contextlib.nullcontext()
    if who == "mode":
        around = Onlooker()
    elif who == "search":
        monkeypatch.setenv("RESNET_FAST_AUTOTUNE", "1")
    elif who == "watch":
        around = tuning_tables.watching(lambda *what: None)
    else:
        x = x.as_subclass(type("Other", (torch.Tensor,), {}))
    with torch.no_grad(), around:
        for _ in range(3):
            infer(module, x)
    assert not recorded


def test_a_profile_shows_the_replay(recorded):
    """By name, around the calls that it makes; the first runs by their ops."""
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()
    first, later = {"resnet_fast::conv_bn_act"}, {"resnet_fast::replay_infer", "aten::convolution"}
    for names in (first, first, later):
        with torch.no_grad(), torch.profiler.profile() as profile:
            infer(module, inputs(module, "cpu"))
        assert names <= {event.key for event in profile.key_averages()}
    assert len(recorded) == 1


def test_default_device_looks_at_nothing(recorded):
    """`torch.set_default_device` is a mode of PyTorch's, that keeps nobody from the short ways."""
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()
    with torch.no_grad(), torch.device("cpu"):
        assert not ops.watched()
        for _ in range(2):
            infer(module, inputs(module, "cpu"))
        assert len(recorded) == 1
        with torch.overrides.BaseTorchFunctionMode():
            assert ops.watched()


def test_same_tensor_twice(recorded):
    """x as its own residual is not known from another one: no program."""
    x, other = (torch.randn(2, 8, 6, 5) for _ in range(2))
    for _ in range(2):
        y = resnet_fast.add_relu(x, x, impl="reference")
        assert torch.equal(y, torch.relu(x + x))
    assert recorded == [None]
    assert torch.equal(resnet_fast.add_relu(x, other, impl="reference"), torch.relu(x + other))


def test_error_is_recorded_by_nobody(recorded):
    module = resnet_fast.BasicBlock(8, 8, impl="reference").eval()
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="weight: expected 7 input channels"):
            module(torch.randn(2, 7, 6, 5))
    assert not recorded and not replay._programs


def test_shared_statistics_are_not_replayed(recorded):
    """Collectives are no steps of a program."""
    x = torch.randn(2, 8, 3, 3)
    for group in (None, object()):
        one = chain.Chain((chain.Conv(),), (None, chain.Norm(group=group)))
        assert one.shared == (group is not None)
        for _ in range(2):
            assert torch.equal(replay.run(torch_add, one, (), (x,)), x + 1)
        assert len(recorded) == 1


def test_forgotten_by_another_thread(recorded, monkeypatch):
    """A key that was there may be gone when its program is asked for: it is looked up once."""
    class Forgetful(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

        def get(self, key, default=None):
            found = super().get(key, default)
            self.clear()
            return found

    monkeypatch.setattr(replay, "_programs", Forgetful())
    x, one = torch.randn(2, 8, 3, 3), chain.Chain((chain.Conv(),), (None, chain.Norm()))
    for _ in range(3):
        assert torch.equal(replay.run(torch_add, one, (), (x,)), x + 1)


def torch_add(chain, x):
    return x + 1


@pytest.fixture(params=["python", "native"])
def record(request):
    """`recording.record`, whose programs are run by Python or by the native extension."""
    native = None
    if request.param == "native":
        native, why = backends.native_module()
        if native is None:
            pytest.skip(why)

    def record(function, *tensors):
        return recording.record(function, (), tensors, {}, native)

    return record


def test_program_on_other_tensors(record):
    """Memory, views, calls with lists, numbers and names; results in any nesting."""

    class Pair(NamedTuple):
        first: torch.Tensor
        second: object

    def function(x, w, nothing):
        assert nothing is None
        y = torch.empty_like(x).copy_(x)
        rows = torch.cat([y[0], w], dim=0)
        y.mul_(2).add_(w, alpha=3)
        torch._foreach_add_([y], 1)
        low, high = torch.aminmax(rows)
        parts = torch.split(rows.new_full((2,), 7), 1)
        return Pair(y, [rows.sum(), 7, parts[1], None, {"x": x}]), (low, high)

    result, steps = record(function, torch.randn(3, 4), torch.randn(4), None)
    assert type(result[0]) is Pair
    x, w = torch.randn(3, 4), torch.randn(4)
    (y, (total, seven, part, none, named)), extremes = steps([x, w, None])
    rows = torch.cat([x[0], w])
    torch.testing.assert_close(y, 2 * x + 3 * w + 1)
    torch.testing.assert_close(total, rows.sum())
    assert seven == 7 and none is None and named["x"] is x and torch.equal(part, torch.full([1], 7))
    assert torch.equal(torch.stack(extremes), torch.stack([rows.min(), rows.max()]))
    other, _ = steps([x, w, None])
    assert other.first.data_ptr() != y.data_ptr()


@pytest.mark.parametrize("what", ["value", "stranger", "twice", "named"])
def test_no_program(record, what):
    """Of what looks at a value, or at tensors that no step knows."""
    known = torch.ones(3)

    def function(x, y):
        if what == "value":
            return x * x.sum().item()
        if what == "stranger":
            return x + known
        if what == "named":
            return torch.add(x, y, out=torch.empty(3))
        return x + y

    x = torch.ones(3)
    result, steps = record(function, x, x if what == "twice" else torch.ones(3))
    assert result.shape == (3,) and steps is None


def test_step_has_tensors_of_its_own(record):
    """What `recording.step` runs is one step, and no stranger to those that follow."""
    kept, asked = torch.arange(3.0), []

    def counters(x, count):
        asked.append(count)
        return kept[:count]

    def function(x):
        return x + recording.step(counters, x, 3)

    assert torch.equal(function(torch.ones(3)), kept + 1) and asked == [3]
    _, steps = record(function, torch.ones(3))
    kept += 5
    assert torch.equal(steps([torch.zeros(3)]), kept) and asked == [3, 3, 3]


def test_memory_of_no_use_is_not_allocated(record):
    def function(x):
        memory = [torch.empty(size) for size in (3, 5, 7)]
        return memory[0].copy_(x), memory[2]

    _, steps = record(function, torch.ones(3))
    x = torch.randn(3)
    with torch.profiler.profile() as profile:
        copied, given = steps([x])
    assert torch.equal(copied, x) and given.shape == (7,)
    events = {event.key: event.count for event in profile.key_averages()}
    assert events["aten::empty_strided"] == 2


def test_constants_of_a_program(record):
    """Lists are those of the recording; a list's items can be one tensor alone, or none."""
    sizes = [2, 3]

    def function(x):
        y = recording.step(torch.reshape, x, sizes)
        sizes[:] = [3, 2]
        return [y], [], [[*sizes]], ()

    _, steps = record(function, torch.ones(6))
    sizes[:] = [6]
    x = torch.randn(6)
    first, *others = steps([x])
    assert torch.equal(first[0], x.reshape(2, 3)) and others == [[], [[3, 2]], ()]


def test_launches_are_steps(record):
    """Launches of kernels, with descriptors of tensors among their arguments."""

    class Descriptor:
        def __init__(self, base, shape):
            self.base, self.shape = base, shape

    def kernel(described, out, factor, nothing):
        assert nothing is None and described.shape == [2, 3]
        out.copy_(described.base * factor)

    def function(x):
        out = torch.empty_like(x)
        args = (Descriptor(x, [2, 3]), out, 2.0, None)

        def start():
            kernel(*args)
            return kernel

        recording.launched(start, args)
        return out

    x = torch.randn(2, 3)
    assert torch.equal(function(x), 2 * x)
    result, steps = record(function, x)
    assert torch.equal(result, 2 * x)
    x = torch.randn(2, 3)
    assert torch.equal(steps([x]), 2 * x)


@pytest.fixture
def watch():
    """An operator that notes which of the storages given to it before are still there."""
    seen, given = [], []

    def run(x):
        gc.collect()
        seen.append([not ref.expired() for ref in given])
        given.append(StorageWeakRef(x.untyped_storage()))
        return x.new_zeros(2)

    with torch.library._scoped_library("resnet_fast_watch", "DEF") as library:
        library.define("watch(Tensor x) -> Tensor")
        library.impl("watch", run, "CompositeExplicitAutograd")
        yield SimpleNamespace(op=torch.ops.resnet_fast_watch.watch.default, seen=seen, given=given)


@pytest.mark.slow
def test_memory_goes_with_its_last_use(record, watch):
    """A program keeps no tensor, and one that runs keeps none longer than its steps need."""

    def function(x):
        for _ in range(4):
            x = watch.op(x) + 1
        return x

    _, steps = record(function, torch.ones(2))
    watch.seen.clear()
    watch.given.clear()
    ours = torch.ones(2)
    last = steps([ours])
    assert watch.seen == [[], [True], [True, False], [True, False, False]], "the first is ours"
    last = StorageWeakRef(last.untyped_storage())
    gc.collect()
    assert last.expired()


def test_errors_of_a_program(record):
    """The operator's own error, in a program too; later runs do not suffer from it."""

    def function(x, w):
        return torch.mm(x + 1, w)

    _, steps = record(function, torch.ones(2, 3), torch.ones(3, 2))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            steps([torch.ones(2, 3), torch.ones(2, 3)])
        assert torch.equal(steps([torch.ones(2, 3), torch.ones(3, 2)]), torch.full((2, 2), 6.0))


@pytest.mark.parametrize("record", ["native"], indirect=True)
def test_warnings_of_a_program(record):
    """Those of Python, as without a program. (An operator that Python calls writes to stderr.)"""
    _, steps = record(torch.var, torch.ones(3))
    with pytest.warns(UserWarning, match="degrees of freedom"):
        steps([torch.ones(1)])


def test_programs_in_threads(record):
    """One program may run in several threads at once."""
    _, steps = record(lambda x: torch.cumsum(x, 0).mul_(2).sin(), torch.ones(5000))
    xs = torch.randn(8, 5000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: steps([x]), [*xs] * 20))
    for x, y in zip([*xs] * 20, found, strict=True):
        assert torch.equal(y, torch.cumsum(x, 0).mul_(2).sin())


@pytest.mark.parametrize("name", ["python", "native"])
def test_kinds(name, monkeypatch):
    """Equal for tensors of one kind with other values, and for nothing else."""
    native, why = backends.native_module()
    if name == "python":
        monkeypatch.setattr(backends, "native_module", lambda: (None, "not asked for"))
    elif native is None:
        pytest.skip(why)
    kinds, x = replay.kind_of, torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = [kinds([x, None])]
    monkeypatch.setenv("RESNET_FAST_TRACE", "1")
    found.append(kinds([x, None]))
    monkeypatch.delenv("RESNET_FAST_TRACE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
        found.append(kinds([x, None]))
    others = [
        x[:1], x.double(), x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[0],
        torch.randn(481)[1:].view(2, 8, 6, 5),
    ]  # fmt: skip
    found += [kinds(tensors) for tensors in ([x], [x, x], [x, None, None])]
    found += [kinds([other, None]) for other in others]
    assert None not in found and len({*found, kinds([x, None])}) == len(found) + 1
    assert kinds([nn.Parameter(x), None]) == kinds([torch.randn(2, 8, 6, 5), None])
    other = x.as_subclass(type("Other", (torch.Tensor,), {}))
    assert kinds([other]) is kinds([x, other]) is kinds([x, x.to("meta")]) is None
