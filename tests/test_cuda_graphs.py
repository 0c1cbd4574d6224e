"""`graph` and `graph_step`: what a replay computes, what recording leaves alone, what is refused.

On the CPU calls run one by one, or (`taped`) by a tape that repeats the recorded ops as a CUDA
graph repeats kernels.
"""

import copy
import gc
import weakref

import pytest
import tape
import torch
import torch.nn.functional as F

import resnet_fast
from resnet_fast import cuda_graphs
from resnet_fast.cuda_graphs import graph, graph_step


@pytest.fixture(params=["called", "taped"])
def recorder(request, monkeypatch):
    if request.param == "taped":
        monkeypatch.setattr(cuda_graphs, "_record", tape.record)
    return request.param


def net(momentum=0.1, **options):
    torch.manual_seed(1)
    model = resnet_fast.ResNet(
        resnet_fast.Bottleneck, [1, 1], 10, stem="cifar", planes=8,
        norm_layer=lambda c: torch.nn.BatchNorm2d(c, momentum=momentum), **options,
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def batches(count=4, n=6):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator))
        for _ in range(count)
    ]


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-3, **options)


def fused_sgd(model):
    return sgd(model, torch.tensor(0.1), fused=True)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), torch.tensor(0.01), fused=True)


def state_of(model, optimizer):
    """Everything that a step may change."""
    tensors = {**model.state_dict()}
    for i, state in enumerate(optimizer.state_dict()["state"].values()):
        tensors |= {f"{i} {name}": value for name, value in state.items()}
    return tensors


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value is found[name] is None or torch.equal(found[name], value), name


def plain_steps(model, optimizer, work, autocast=None, schedule=None):
    losses = []
    for x, target in work:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("make", [sgd, fused_sgd, adamw])
def test_steps_are_those_of_a_loop(recorder, make, momentum):
    """Losses, weights, statistics, counts and the optimizer's state, bit for bit, from the first
    step; a schedule that changes the rate is followed.
    """
    ours, plain = net(momentum), net(momentum)
    optimizers = [make(ours), make(plain)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    work = batches()
    step = graph_step(ours, F.cross_entropy, optimizers[0], *work[0])
    assert step.in_graph == (make is not sgd)
    losses = []
    for x, target in work:
        losses.append(step(x, target).item())
        schedules[0].step()
    assert losses == plain_steps(plain, optimizers[1], work, schedule=schedules[1])
    assert losses[-1] != losses[0]
    equal(state_of(ours, optimizers[0]), state_of(plain, optimizers[1]))
    assert ours.bn1.num_batches_tracked == len(work)
    grads = [p.grad for p in ours.parameters()]
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, plain.parameters(), strict=True))


def test_plain_models_and_autocast(recorder):
    """Any module; under autocast the casts of the weights are in the graph."""
    ours, plain = net(fused=False), net(fused=False)
    optimizers, work = [sgd(ours), sgd(plain)], batches()
    step = graph_step(ours, F.cross_entropy, optimizers[0], *work[0], autocast=torch.bfloat16)
    found = [step(*batch).item() for batch in work]
    assert found == plain_steps(plain, optimizers[1], work, torch.bfloat16)
    equal(state_of(ours, optimizers[0]), state_of(plain, optimizers[1]))


@pytest.mark.parametrize("make", [sgd, fused_sgd, adamw])
def test_recording_changes_nothing(recorder, make):
    """In the middle of a training: parameters, buffers, optimizer, generator."""
    model, work = net(), batches()
    optimizer = make(model)
    plain_steps(model, optimizer, work[:2])
    before = copy.deepcopy(state_of(model, optimizer))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    graph_step(model, lambda y, t: F.cross_entropy(F.dropout(y), t), optimizer, *work[0])
    assert torch.equal(torch.rand(3), expected)
    equal(state_of(model, optimizer), before)


def test_a_fresh_optimizer_stays_fresh(recorder):
    """What the warm-up made of momentum is zero, so that the first step is a first step."""
    model, (batch, *_) = net(), batches()
    optimizer = fused_sgd(model)
    graph_step(model, F.cross_entropy, optimizer, *batch)
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert buffers and not any(buffer.any() for buffer in buffers)


def test_without_an_optimizer(recorder):
    """Gradients alone: a new batch's replace the last one's."""
    ours, plain, work = net(), net(), batches()
    step = graph_step(ours, F.cross_entropy, None, *work[0])
    for x, target in work:
        step(x, target)
        plain.zero_grad(set_to_none=True)
        F.cross_entropy(plain(x), target).backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )


def test_gradients_set_to_none_between_steps(recorder):
    ours, plain, work = net(), net(), batches()
    optimizers = [sgd(ours), sgd(plain)]
    step = graph_step(ours, F.cross_entropy, optimizers[0], *work[0])
    for batch in work:
        step(*batch)
        optimizers[0].zero_grad(set_to_none=True)
    plain_steps(plain, optimizers[1], work)
    equal(state_of(ours, optimizers[0]), state_of(plain, optimizers[1]))


def test_inference(recorder):
    """Equal to the model on new inputs, and after its weights have changed in place."""
    model = net()
    plain_steps(model, sgd(model), batches(1))
    model.eval()
    (a, _), (b, _) = batches(2)
    run = graph(model, a)
    for _ in range(2):
        for x in (a, b):
            with torch.no_grad():
                y = model(x)
            assert torch.equal(run(x), y) and not run(x).requires_grad
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    run.inputs[0].copy_(a)
    with torch.no_grad():
        assert torch.equal(run(run.inputs[0]), model(a))


def test_inference_under_autocast(recorder):
    model, ((x, _),) = net().eval(), batches(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run = graph(model, x)
        expected = model(x)
    assert expected.dtype == torch.bfloat16
    if recorder == "taped":  # recorded in bf16, replayed anywhere
        assert torch.equal(run(x), expected)
    assert torch.is_autocast_cache_enabled()


X, TARGET = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: graph(net(), X), "model: expected eval mode"),
        (lambda: graph(net().eval(), [X]), "example: expected a torch.Tensor, got a list"),
        (lambda: graph(net().eval(), X.to_sparse()), "example: expected a strided"),
        (lambda: graph(lambda x: x, X), "model: expected an nn.Module"),
        (lambda: graph(net().eval(), X, warmup=0), "warmup: expected a positive integer, got 0"),
        (lambda: graph(net().eval(), X.to("meta")), "example: expected one device, got meta"),
        (lambda: graph(net().eval(), X)(X[:1]), r"x: expected float32 \[2, 3, 8, 8\] as rec"),
        (lambda: graph(net().eval(), X)(X.double()), "x: expected float32 .*got float64"),
        (lambda: graph(net().eval(), X)(X, X), "expected x, got 2 tensors"),
        (lambda: graph(net().eval(), X)(X.numpy()), "x: expected a torch.Tensor, got a ndarray"),
        (lambda: step_of(net(), loss=0.5), "loss: expected a function of .logits, target., got 0"),
        (lambda: step_of(net(), loss=lambda a, b: a), "loss: expected a function that re"),
        (lambda: step_of(net(), optimizer=0.1), "optimizer: expected a torch.optim.Optimizer"),
        (lambda: step_of(net(), autocast="bf16"), "autocast: expected torch.bfloat16 or float16"),
        (lambda: step_of(net().eval()), "model: expected training mode"),
        (lambda: step_of(net(), optimizer=sgd(net())), "optimizer: expected an optimizer of"),
        (lambda: step_of(net())(X, TARGET[:1]), r"target: expected int64 \[2\] as recorded, got"),
    ],
)
def test_errors(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def step_of(model, optimizer=None, loss=F.cross_entropy, **options):
    return graph_step(model, loss, optimizer or sgd(model), X, TARGET, **options)


def test_half_eval_mode_is_no_inference():
    model = net().eval()
    model.bn1.train()
    with pytest.raises(ValueError, match="model: expected eval mode"):
        graph(model, X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("make", ["sgd", "fused_sgd"])
def test_on_a_gpu(make):
    """A captured step beside a loop, and a captured inference beside the model."""
    ours, plain = net().cuda(), net().cuda()
    work = [(x.cuda(), target.cuda()) for x, target in batches()]
    torch.backends.cudnn.deterministic = True
    try:
        optimizers = []
        for model in (ours, plain):
            rate = torch.tensor(0.1, device="cuda") if make == "fused_sgd" else 0.1
            optimizers.append(sgd(model, rate, fused=True))
        step = graph_step(ours, F.cross_entropy, optimizers[0], *work[0])
        assert step.in_graph == (make == "fused_sgd")
        found = [step(*batch).item() for batch in work]
        assert found == plain_steps(plain, optimizers[1], work)
        equal(state_of(ours, optimizers[0]), state_of(plain, optimizers[1]))
        run = graph(ours.eval(), work[0][0])
        with torch.no_grad():
            assert all(torch.equal(run(x), ours(x)) for x, _ in work)
    finally:
        torch.backends.cudnn.deterministic = False


def test_a_graph_keeps_its_model(monkeypatch):
    """A replay reads the parameters' memory: they live as long as the graph does."""
    monkeypatch.setattr(cuda_graphs, "_record", lambda run, device: lambda: None)  # as a GPU's
    x, target = batches(1)[0]
    for record in (
        lambda model: graph(model.eval(), x),
        lambda model: graph_step(model, F.cross_entropy, None, x, target),
    ):
        model = net()
        weights = weakref.ref(model.conv1.weight)
        recorded = record(model)
        del model
        gc.collect()
        assert weights() is not None
        del recorded
        gc.collect()
        assert weights() is None
