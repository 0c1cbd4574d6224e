"""What README says the package works with, where no other test or example shows it.

Each test holds a fused model to plain PyTorch, and to having run the fused ops: beside another
framework a plain forward would be as right, and silently slow.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision_ops
from foreign_models import ResNet
from processes import Processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import resnet_fast

NORMS = 10  # of `net`, one fused convolution each


class Ops(TorchDispatchMode):
    """Counts the calls of every op that runs within."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op).removesuffix(".default")
        self.counts[name] = self.counts.get(name, 0) + 1
        return op(*args, **(kwargs or {}))

    def assert_fused(self, trained=1, inferred=0):
        """So many forward and backward passes, and inferences, of `net` ran fused."""
        count = self.counts.get
        assert count("resnet_fast.conv_fprop", 0) == trained * NORMS
        assert count("resnet_fast.conv_bprop", 0) == trained * NORMS
        assert count("resnet_fast.conv_bn_act", 0) == inferred * NORMS
        assert count("aten.convolution", 0) == count("aten.native_batch_norm", 0) == 0


def net():
    """A foreign model in double, and its fused copy that shares nothing with it."""
    torch.manual_seed(0)
    plain = ResNet().double()
    return plain, resnet_fast.fuse(copy.deepcopy(plain))


def batch(n=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=generator)
    return x.to(memory_format=torch.channels_last), torch.arange(n)


def train(model, parts, steps=2):
    """SGD on the mean loss of parts, which normalize by their own statistics."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in parts:
            (F.cross_entropy(model(x), y) / len(parts)).backward()
        optimizer.step()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    started = Processes(2, tmp_path_factory.mktemp("works-with"))
    yield started
    started.close()


def parts_of(x, y):
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


def by_ddp(rank):
    _, fused = net()
    wrapped = nn.parallel.DistributedDataParallel(fused)
    with Ops() as ops:
        train(wrapped, [parts_of(*batch())[rank]])
    ops.assert_fused(trained=2)
    return dict(wrapped.module.named_parameters())


def by_fsdp(rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    _, fused = net()
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (*fused.layer1, *fused.layer2, fused):
        fully_shard(module, mesh=mesh)
    with Ops() as ops:
        train(fused, [parts_of(*batch())[rank]])
        fused.eval()
        with torch.no_grad():
            logits = fused(batch()[0])
    ops.assert_fused(trained=2, inferred=1)
    with torch.no_grad():
        close(fused(batch()[0]), logits)  # by kernels that keep packed filters
    state = get_model_state_dict(fused, options=StateDictOptions(full_state_dict=True))
    return state, logits


def test_ddp(processes):
    """Around a fused foreign model: as plain PyTorch in one process."""
    plain, _ = net()
    train(plain, parts_of(*batch()))
    for parameters in processes.run(by_ddp):
        close(parameters, dict(plain.named_parameters()))


def test_fsdp2(processes):
    """Blocks and model sharded: trained, run and saved as plain PyTorch in one process."""
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        pytest.skip(str(error))
    plain, _ = net()
    train(plain, parts_of(*batch()))
    parameters = dict(plain.named_parameters())
    (state, logits), _ = processes.run(by_fsdp)
    assert state.keys() == plain.state_dict().keys()
    close({name: state[name] for name in parameters}, parameters)
    plain.load_state_dict(state)  # with the first process's running statistics
    close(logits, plain.eval()(batch()[0]))


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing(reentrant):
    """Fused foreign blocks run a second time in the backward pass, fused; their gradients."""
    plain, fused = net()
    x, y = batch()
    F.cross_entropy(plain(x), y).backward()
    blocks = (*fused.layer1, *fused.layer2)
    h = fused.maxpool(fused.relu(fused.bn1(fused.conv1(x))))
    with Ops() as ops:
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        F.cross_entropy(fused.fc(h.mean((2, 3))), y).backward()
    again = NORMS - 1  # all but the stem's
    assert ops.counts["resnet_fast.conv_fprop"] == 2 * again
    assert ops.counts["resnet_fast.conv_bprop"] == again
    expected = {name: p.grad for name, p in plain.named_parameters()}
    close({name: p.grad for name, p in fused.named_parameters()}, expected)


def test_autocast():
    """Fused foreign models run fused under autocast (its results: test_never_differs)."""
    _, fused = net()
    fused.float()
    x, y = batch()
    with Ops() as ops:
        with torch.autocast("cpu", torch.bfloat16):
            logits = fused(x.float())
        assert logits.dtype == torch.bfloat16
        F.cross_entropy(logits.float(), y).backward()
    ops.assert_fused()


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(strict):
    """A fused foreign model in eval mode: its graph holds the fused ops."""
    plain, fused = net()
    x, _ = batch()
    with torch.no_grad():
        program = torch.export.export(fused.eval(), (x,), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("resnet_fast.conv_bn_act.default") == NORMS
        close(program.module()(x), plain.eval()(x))


def needed(name):
    """The package `name`, or skip with why it cannot be imported."""
    if (reason := torchvision_ops.why_not(name)) is not None:
        pytest.skip(reason)
    return __import__(name)


def test_lightning(tmp_path):
    """The Trainer calls fused ops, and what it trains is what a loop in plain PyTorch does."""
    lightning = needed("lightning")
    plain, fused = net()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fused

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=True, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), 4)
    with Ops() as ops:
        trainer.fit(Module(), loader)
    ops.assert_fused(trained=2)
    train(plain, [batch()])
    close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    """A prepared model runs fused, also with the forward that mixed precision wraps."""
    accelerate = needed("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    plain, fused = net()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    x, y = batch()
    if precision == "bf16":
        fused, x = fused.float(), x.float()
    optimizer = torch.optim.SGD(fused.parameters(), 0.05, momentum=0.9)
    fused, optimizer = accelerator.prepare(fused, optimizer)
    with Ops() as ops:
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(fused(x), y))
            optimizer.step()
    ops.assert_fused(trained=2)
    if precision == "no":
        train(plain, [batch()])
        close(fused.state_dict(), plain.state_dict())


def test_timm_average():
    """ModelEmaV3's copy of a fused model is fused, and averages as that of a plain one."""
    utils = needed("timm").utils
    plain, fused = net()
    averages = [utils.ModelEmaV3(model, decay=0.5) for model in (plain, fused)]
    for model, average in zip((plain, fused), averages, strict=True):
        for _ in range(2):
            train(model, [batch()], steps=1)
            average.update(model)
        average.eval()
    x, _ = batch()
    with torch.no_grad(), Ops() as ops:
        logits = averages[1](x)
    ops.assert_fused(trained=0, inferred=1)
    close(logits, averages[0](x))


def test_torchvision_features():
    """With its blocks as leaves, create_feature_extractor keeps them fused."""
    needed("torchvision")
    from torchvision.models import resnet
    from torchvision.models.feature_extraction import create_feature_extractor

    plain = resnet.resnet18().double().eval()
    names = {f"layer{i}": f"c{i}" for i in range(2, 5)}
    kept = {"leaf_modules": [resnet.BasicBlock]}
    features = create_feature_extractor(resnet_fast.fuse(plain), names, tracer_kwargs=kept)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = create_feature_extractor(plain, names)(x)
        with Ops() as ops:
            found = features(x)
    close(dict(found), dict(expected))
    assert ops.counts["resnet_fast.conv_bn_act"] == 19, "all but the stem"
