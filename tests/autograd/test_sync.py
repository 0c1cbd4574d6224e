"""SyncBatchNorm through the fused blocks: several processes give what one with all images gives.

The judge is plain PyTorch, `nn.BatchNorm2d` over the whole batch in one process.
"""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import twins
from processes import Processes
from torch import nn

import resnet_fast
from resnet_fast.dispatch import backends
from resnet_fast.models import ResNet

WORLD = 3
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def stem():
    """A foreign one: what `fuse` finds in a Sequential."""
    conv = nn.Conv2d(3, 8, 3, 2, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def small_resnet():
    return resnet_fast.create_model("small_resnet", planes=8)


def preact_net():
    """A whole net whose head has a norm too."""
    return ResNet(resnet_fast.PreActBasicBlock, (1, 1), 5, stem="cifar", planes=4)


# The module, and C, H, W of an image.
MODULES = {
    "BasicBlock": (lambda: resnet_fast.BasicBlock(8, 8), (8, 6, 5)),
    "Bottleneck": (lambda: resnet_fast.Bottleneck(16, 4), (16, 5, 5)),
    "Bottleneck-projection": (lambda: resnet_fast.Bottleneck(8, 4, 2), (8, 6, 5)),
    "PreActBottleneck": (lambda: resnet_fast.PreActBottleneck(8, 4, 2), (8, 6, 5)),
    "stem": (stem, (3, 12, 12)),
    "small_resnet": (small_resnet, (3, 8, 8)),
    "preact-net": (preact_net, (3, 8, 8)),
}
IMPLS = pytest.mark.parametrize("impl", ["reference", "native"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    started = Processes(WORLD, tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def live(request):
    impl = getattr(request.node, "callspec", None) and request.node.callspec.params.get("impl")
    reason = impl and backends.refusal(impl, "bn_act", "cpu", torch.float32)
    if reason:
        pytest.skip(reason)


@functools.cache
def first_two():
    """The group of processes 0 and 1; all processes have to call this."""
    return dist.new_group([0, 1])


def synchronized(module, impl, group=None):
    """`module` as its user would make it run over several processes."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    module = resnet_fast.fuse(module, impl=impl, inplace=True)
    assert {row.state for row in resnet_fast.explain(module).rows} == {"fused"}
    assert not any(isinstance(child, nn.BatchNorm2d) for child in module.modules())
    return module


def part(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def step(rank, module, impl, dtype, x, dy, sizes):
    """One step of `module` on the images of this process; None where it has no part in it."""
    group = first_two()
    if rank >= len(sizes):
        return None
    module = synchronized(module.to(dtype), impl, group if len(sizes) == 2 else None)
    own = part(rank, sizes)
    return twins.module_step(module, x[own].to(dtype), dy[own].to(dtype))


@functools.cache
def draw(name, images):
    """A module, images and a gradient, in fp32, away from the ReLUs' kinks."""
    build, shape = MODULES[name]
    module, x = twins.settled(lambda: (build(), torch.randn(images, *shape)))
    return module, x, torch.randn_like(twins.plain(module)(x))


def plain_step(module, x, dy, dtype=torch.float64):
    """One step of plain PyTorch on all images."""
    module = twins.plain(module).to(dtype)
    return twins.module_step(module, x.to(dtype), dy.to(dtype))


def close(actual, expected):
    """Both ran in fp64 and do the same sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_plain(found, module, x, dy):
    """Results are those of plain PyTorch: in fp64 by the digits, in fp32 by the one rule."""
    exact = plain_step(module, x, dy)
    if found["y"].dtype == torch.float64:
        close(found, exact)
    else:
        again = functools.partial(plain_step, module, x, dy, torch.float32)
        twins.judge(found, again(), exact, again=again)


def together(found):
    """The results of all processes as those of one: images strung together, gradients summed.

    What every process has for itself must be the same to the last bit.
    """
    whole = {}
    for name, first in found[0].items():
        values = [results[name] for results in found]
        if name in ("y", "dx"):
            whole[name] = torch.cat(values)
        elif name.endswith(STATISTICS):
            assert all(torch.equal(value, first) for value in values), name
            whole[name] = first
        else:
            whole[name] = sum(values)
    return whole


@pytest.mark.slow
@IMPLS
@DTYPES
@pytest.mark.parametrize("sizes", [(3, 5), (0, 4), (4, 1, 3)], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_is_one_process_with_the_whole_batch(processes, name, sizes, dtype, impl):
    """Outputs, gradients, running statistics, in a group of two and in the default group."""
    module, x, dy = draw(name, sum(sizes))
    found = processes.run(step, module, impl, dtype, x, dy, sizes)
    assert found[len(sizes) :] == [None] * (WORLD - len(sizes))
    assert_plain(together(found[: len(sizes)]), module, x, dy)


@IMPLS
@DTYPES
def test_means_far_from_zero(processes, dtype, impl):
    """Mean 1000 and deviation 1 in a process, another mean in the next: right to x's last place."""
    sizes, channels = (2, 3, 1), 32
    module = resnet_fast.ConvBNAct2d(channels, channels, 1, relu=False)
    module.conv.weight.data = torch.eye(channels)[:, :, None, None]  # z is x, its mean as large
    x = torch.randn(sum(sizes), channels, 9, 7) + 1000.0
    for rank in range(WORLD):
        x[part(rank, sizes)] += 0.5 * rank
    dy = torch.randn_like(x)
    found = together(processes.run(step, module, impl, dtype, x, dy, sizes))
    exact = plain_step(module, x, dy)
    place = 1000 * torch.finfo(dtype).eps
    for name in ("y", "dx", "bn.running_mean", "bn.running_var"):
        assert (found[name] - exact[name]).abs().max() < 2 * place, name


def with_mixed_wishes(rank, module, impl, x, dy):
    """Process 0 alone wants the gradient of x, process 1 alone that of the first norm."""
    module = synchronized(module, impl)
    for parameter in module.bn1.parameters():
        parameter.requires_grad_(rank == 1)
    x, dy = (t[part(rank, (2, 2, 2))] for t in (x, dy))
    x.requires_grad_(rank == 0)
    module(x).backward(dy)
    return x.grad, module.bn1.weight.grad, module.conv1.weight.grad


@IMPLS
def test_processes_that_want_different_gradients(processes, impl):
    module = resnet_fast.PreActBasicBlock(4, 4).double()
    x, dy = torch.randn(2, 6, 4, 5, 5, dtype=torch.float64)
    exact = plain_step(module, x, dy)
    found = processes.run(with_mixed_wishes, module, impl, x, dy)
    dx, dnorm, dconv = zip(*found, strict=True)
    assert [grad is None for grad in dx] == [False, True, True]
    assert [grad is None for grad in dnorm] == [True, False, True]
    close(dx[0], exact["dx"][:2])
    close(sum(dconv), exact["dconv1.weight"])


class Counting:
    """Counts the collectives that run inside."""

    NAMES = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce", "broadcast")

    def __enter__(self):
        self.calls, self.patches = [], []
        for name in self.NAMES:
            if hasattr(dist, name):
                self.patches.append(mock.patch.object(dist, name, self.count(getattr(dist, name))))
        for patch in self.patches:
            patch.start()
        return self.calls

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()

    def count(self, run):
        def counted(*args, **kwargs):
            self.calls.append(run.__name__)
            return run(*args, **kwargs)

        return counted


def collectives(rank, module, impl, x, mode):
    """How many a forward pass makes, and its backward pass."""
    group = first_two() if mode == "two" else None
    if mode == "alone":
        group = [dist.new_group([r]) for r in range(WORLD)][rank]
    module = synchronized(module, impl, group).train(mode != "eval")
    with Counting() as forward:
        y = module(x)
    with Counting() as backward:
        y.sum().backward()
    return len(forward), len(backward)


@IMPLS
@pytest.mark.parametrize(
    ("mode", "taking_part"), [("train", 3), ("two", 2), ("eval", 0), ("alone", 0)]
)
def test_one_collective_a_norm_and_none_without_need(processes, mode, taking_part, impl):
    """In evaluation, alone in a group, and outside of it a process exchanges nothing."""
    module = resnet_fast.Bottleneck(8, 4, 2)
    found = processes.run(collectives, module, impl, torch.randn(2, 8, 5, 5), mode)
    assert found == [(4, 4)] * taking_part + [(0, 0)] * (WORLD - taking_part)


def outcome(rank, impl, sizes):
    """What a step on `sizes` images of one pixel gives: y and the running statistics, or an error.

    Then a step on larger ones, which shows that no process waits for another still.
    """
    module = synchronized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).double(), impl)
    x = torch.arange(3.0 * sum(sizes), dtype=torch.float64).view(-1, 3, 1, 1).square()
    try:
        told = module(x[part(rank, sizes)]), {k: v.clone() for k, v in module.named_buffers()}
    except ValueError as error:
        told = str(error)
    module(torch.ones(2, 3, 2, 2, dtype=torch.float64))
    return told


@IMPLS
def test_a_single_value_in_all_processes(processes, impl):
    """It raises everywhere, as one process does; two values, in two processes, are enough."""
    errors = processes.run(outcome, impl, (0, 1, 0))
    assert all("more than 1 value per channel" in error for error in errors)
    y, buffers = zip(*processes.run(outcome, impl, (1, 0, 1)), strict=True)
    x = torch.tensor([[0.0, 1, 4], [9, 16, 25]], dtype=torch.float64).view(2, 3, 1, 1)
    norm = nn.BatchNorm2d(3).double()
    close(torch.cat(y), F.relu(norm(x)))
    close(buffers[1]["0.running_var"], norm.running_var)


@IMPLS
def test_no_value_in_any_process(processes, impl):
    """As `nn.BatchNorm2d` on an empty batch: no statistics, no error."""
    for y, buffers in processes.run(outcome, impl, (0, 0, 0)):
        assert y.shape == (0, 3, 1, 1) and buffers["0.num_batches_tracked"] == 1
        assert torch.equal(buffers["0.running_mean"], torch.zeros(3, dtype=torch.float64))
        assert torch.equal(buffers["0.running_var"], torch.ones(3, dtype=torch.float64))


def gradients_of_nothing(rank, impl):
    """The gradients of one step on a batch of no images."""
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    module = synchronized(nn.Sequential(*layers).double(), impl)
    module(torch.empty(0, 3, 5, 5, dtype=torch.float64)).sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


@IMPLS
def test_gradients_without_a_value_in_any_process(processes, impl):
    """They are zero, not NaN from a division by the number of values."""
    for gradients in processes.run(gradients_of_nothing, impl):
        assert len(gradients) == 4
        for name, gradient in gradients.items():
            assert gradient is not None and gradient.abs().max() == 0, (name, gradient)


def train(model, x, labels, rank=None):
    """The state of `model` after two steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.state_dict()


def train_in_parallel(rank, model, impl, x, labels):
    """Wrapped first: on a CPU DistributedDataParallel refuses what is converted already."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    synchronized(wrapped.module, impl)
    own = part(rank, (2, 2, 2))
    train(wrapped, x[own], labels[own])
    return wrapped.module.state_dict()


@IMPLS
def test_training_in_parallel(processes, impl):
    """DistributedDataParallel: parameters and statistics as of one process with all images."""
    model = small_resnet().double()
    x, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6)
    found = processes.run(train_in_parallel, model, impl, x, labels)
    expected = train(twins.plain(model), x, labels)
    assert not torch.equal(expected["fc.weight"], model.fc.weight)
    for state in found:
        close(dict(state), dict(expected))


def compiled_step(rank, module, impl, x, dy):
    module = synchronized(module, impl)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    return twins.module_step(module, x[part(rank, (3, 2, 3))], dy[part(rank, (3, 2, 3))], run=run)


@pytest.mark.slow
def test_compiled(processes):
    """The collectives are in the graph."""
    module = resnet_fast.BasicBlock(8, 8).double()
    x = torch.randn(8, 8, 6, 5, dtype=torch.float64)
    dy = torch.randn_like(module(x))
    found = together(processes.run(compiled_step, module, "reference", x, dy))
    assert_plain(found, module, x, dy)


def copied(rank, model):
    """The classes of an unfused copy's norms; that and a fused one have the model's processes."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model, first_two())
    fused = resnet_fast.fuse(model)
    plain = resnet_fast.unfuse(fused)
    norms = [[m for m in tree.modules() if hasattr(m, "process_group")] for tree in (fused, plain)]
    assert all(norm.process_group is first_two() for norm in (*norms[0], *norms[1]))
    return [type(norm) for norm in norms[1]]


def test_a_copy_keeps_its_processes(processes):
    """`fuse` and `unfuse` of a model with a `process_group`, which cannot be copied."""
    assert processes.run(copied, stem()) == [[nn.SyncBatchNorm]] * WORLD


def step_on_gpu(rank, module, x, dy, sizes):
    module = synchronized(module.double(), "auto").to(f"cuda:{rank}")
    own = part(rank, sizes)
    found = twins.module_step(module, x[own].double().cuda(), dy[own].double().cuda())
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.gpu
def test_on_gpus(tmp_path):
    """The same by NCCL, a GPU a process."""
    gpus = torch.cuda.device_count()
    if gpus < 2 or not dist.is_nccl_available():
        pytest.skip("NCCL and two GPUs are needed")
    started = Processes(2, tmp_path, "nccl")
    module, x, dy = draw("Bottleneck-projection", 8)
    try:
        found = started.run(step_on_gpu, module, x, dy, (3, 5))
    finally:
        started.close()
    assert_plain(together(found), module, x, dy)


class TestInOneProcess:
    """Without torch.distributed: as nn.BatchNorm2d."""

    @IMPLS
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_is_an_ordinary_norm(self, training, impl):
        module, shape = resnet_fast.Bottleneck(8, 4, 2).train(training).double(), (3, 8, 6, 5)
        x = torch.randn(shape, dtype=torch.float64)
        dy = torch.randn_like(module(x))
        found = twins.module_step(synchronized(copy.deepcopy(module), impl), x, dy)
        assert_plain(found, module, x, dy)

    def test_norm_layer(self):
        """Built with it, at every depth; unfused it is PyTorch's, with the same children."""
        model = resnet_fast.create_model("small_resnet", norm_layer=nn.SyncBatchNorm).double()
        kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        assert kinds == {nn.SyncBatchNorm}
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        plain = resnet_fast.unfuse(copy.deepcopy(model))
        close(model(x), plain(x))
        assert {row.state for row in resnet_fast.explain(plain).rows} == {"fusible"}
