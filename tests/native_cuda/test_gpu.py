"""On an NVIDIA GPU: every layer of ResNet-50 in every dtype, CUDA graphs, streams, devices."""

import copy
import gc
import shutil
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton")

import resnet_fast
from bench import ceilings, layers
from bench.layers import layers_of, tensors
from resnet_fast.dispatch import backends, ops
from resnet_fast.runtime import tuning_tables
from resnet_fast.spec import reference
from resnet_fast.spec.tolerance import assert_close, compare
from resnet_fast.verify.op_cases import CONVOLUTIONS, Conv, Draw, cast, op_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
LAYERS = list(layers_of("resnet50"))
IMPLS = ("triton", "native")
SANITIZED = 8  # parts of what runs under compute-sanitizer, each in a test of its own


def skip_unless(impl, op, dtype):
    reason = backends.refusal(impl, op, "cuda", dtype)
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32],
                         ids=["bf16", "fp16", "fp32"])  # fmt: skip
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_resnet50(layer, dtype, impl):
    """conv + BN (+ residual) + ReLU at the size of the model, against fp64."""
    skip_unless(impl, "conv_bn_act", dtype)
    x, w, norm, residual = tensors(layer, 4, dtype, torch.device("cuda"))
    args = [x, w, None, *norm, residual, layer.relu, 1e-5, *layer.conv.args()]
    same, exact = reference.conv_bn_act(*args), reference.conv_bn_act(*cast(args))
    assert_close(ops.conv_bn_act(*args, impl), same, exact, str(layer))


def folded(x, norm):
    """scale and shift of the norm (weight, bias, mean, var)."""
    return reference.bn_fold(x, [None, *norm], [1e-5])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.relu], ids=str)
def test_inference_by_cudnns_fused_launch(layer, dtype, monkeypatch):
    """The plan that only a tuning table names: filters that include scale, bias, addition, ReLU."""
    from resnet_fast.kernels import config_select, conv_plan

    skip_unless("triton", "conv_bn_act", dtype)
    x, w, norm, residual = tensors(layer, 4, dtype, torch.device("cuda"))
    args = [x, w, None, *norm, residual, layer.relu, 1e-5, *layer.conv.args()]
    same, exact = reference.conv_bn_act(*args), reference.conv_bn_act(*cast(args))
    monkeypatch.setattr(config_select, "choose", lambda kernel, *args: conv_plan.CUDNN)
    assert_close(ops.conv_bn_act(*args, "triton"), same, exact, str(layer))


def training_args(variant, layer, dtype, device="cuda", n=4):
    """Arguments of a training op at a layer's size."""
    conv = Conv(
        (n, layer.channels, layer.height, layer.width), layer.filters, layer.kernel,
        layer.conv.stride, layer.conv.padding, layer.conv.dilation, layer.conv.groups,
    )  # fmt: skip
    return CONVOLUTIONS[variant](Draw(dtype, torch.channels_last, device), conv)


@pytest.mark.parametrize("plan", ["fused", "library"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32],
                         ids=["bf16", "fp16", "fp32"])  # fmt: skip
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_training_layers_of_resnet50(layer, dtype, plan, monkeypatch):
    """fprop with prologue and statistics, dgrad and wgrad with all that surrounds them."""
    skip_unless("triton", "conv_bprop", dtype)
    if dtype == torch.float32 and plan == "fused" and layer.kernel == (7, 7):
        pytest.skip("49 taps by pointers on CUDA cores: nobody asks for it")
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", plan)
    for variant in ("conv_fprop:prologue", "conv_bprop:residual-masked"):
        op = op_of(variant)
        args = training_args(variant, layer, dtype)
        same, exact = getattr(reference, op)(*args), getattr(reference, op)(*cast(args))
        found = getattr(ops, op)(*args, "triton")
        for i, results in enumerate(zip(found, same, exact, strict=True)):
            assert_close(*results, f"{variant} result {i} of {layer}", gradient=op == "conv_bprop")


@pytest.mark.parametrize("layer", LAYERS[1:5], ids=str)
def test_tf32_is_pytorchs_to_allow(layer, monkeypatch):
    """With the flag on, errors are tf32's and no more; all other tests run with it off."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    skip_unless("triton", "conv_bn_act", torch.float32)
    x, w, norm, residual = tensors(layer, 2, torch.float32, torch.device("cuda"))
    args = [x, w, None, *norm, residual, layer.relu, 1e-5, *layer.conv.args()]
    same, exact = reference.conv_bn_act(*args), reference.conv_bn_act(*cast(args))
    verdict = compare(ops.conv_bn_act(*args, "triton"), same, exact)
    error = (ops.conv_bn_act(*args, "triton").double() - exact).norm() / exact.norm()
    assert verdict.ok or error < 2**-10, verdict


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_native_convolutions_at_other_batches(layer, batch):
    """Batches whose grids are of other tiles: large ones of the largest, one image of the least."""
    skip_unless("native", "conv_bn_act", torch.bfloat16)
    x, w, norm, residual = tensors(layer, batch, torch.bfloat16, torch.device("cuda"))
    args = [x, w, None, *norm, residual, layer.relu, 1e-5, *layer.conv.args()]
    same, exact = reference.conv_bn_act(*args), reference.conv_bn_act(*cast(args))
    assert_close(ops.conv_bn_act(*args, "native"), same, exact, str(layer))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(32, 256, 56, 56), (8, 2048, 7, 7)], ids=str)
def test_memory_bound_kernels_at_size(shape, dtype, impl):
    """Statistics, join and backward of a layer of ResNet-50, against fp64."""
    skip_unless(impl, "bn_act", dtype)
    c = shape[1]

    def draw():
        value = torch.randn(shape, device="cuda") + 0.5
        return value.to(dtype).contiguous(memory_format=torch.channels_last)

    z, residual, dy = draw(), draw(), draw()
    scale, shift, mean, rstd, b = (torch.rand(c, device="cuda") + 0.5 for _ in range(5))
    other = residual, shift, scale, b
    mask = ops.bn_act(z, scale, shift, residual, None, None, True, True, impl)[1]
    windows = [3, 3], [2, 2], [1, 1]
    pooled, index = reference.bn_relu_max_pool(z, scale, shift, *windows, True)
    for op, args in {
        "bn_stats": [z],
        "bn_act": [z, scale, shift, residual, None, None, True, True],
        "bn_act_bwd_reduce": [dy, mask, z, mean, rstd, scale, *other],
        "bn_act_bwd_apply": [dy, mask, scale, z, mean, b, shift, residual],
        "bn_relu_max_pool": [z, scale, shift, *windows, True],
        "max_pool_bwd": [pooled, index, z, mean, rstd, *windows],
        "global_avg_pool": [z],
    }.items():
        found = getattr(ops, op)(*args, impl)
        same, exact = getattr(reference, op)(*args), getattr(reference, op)(*cast(args))
        if isinstance(found, torch.Tensor):
            found, same, exact = (found,), (same,), (exact,)
        for i, results in enumerate(zip(found, same, exact, strict=True)):
            if results[0].is_floating_point():
                assert_close(*results, f"{op} result {i}", gradient="bwd" in op)


def model(name="resnet18", impl="auto"):
    net = resnet_fast.create_model(name, num_classes=10, impl=impl)
    return net.to("cuda", torch.bfloat16, memory_format=torch.channels_last).eval()


def images(n=4, size=64):
    x = torch.randn(n, 3, size, size, device="cuda", dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
def test_cuda_graph(impl):
    """A captured forward pass gives the same bits, on new inputs too."""
    skip_unless(impl, "conv_bn_act", torch.bfloat16)
    net, x, other = model(impl=impl), images(), images()
    with torch.inference_mode():
        net(x)
        torch.cuda.synchronize()
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.cuda.graph(graph):
            y = net(static)
        for value in (x, other):
            static.copy_(value)
            graph.replay()
            assert torch.equal(y, net(value))


def captured(run):
    """A CUDA graph of run(), which has run before, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


@pytest.mark.parametrize("mode", layers.MODES)
def test_layers_can_be_timed(mode, monkeypatch):
    """Every provider of `bench layers` can be captured, alone and behind a write of L2's size."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    skip_unless("triton", "conv_bprop", torch.bfloat16)
    make = layers.infer if mode == "infer" else layers.train(mode)
    device = torch.device("cuda")
    with torch.no_grad():
        runs = make(LAYERS[3], 2, torch.bfloat16, device, "auto")
        for name, run in runs.items():
            assert min(ceilings.sample_ms(run, device, 2, cold=True)) > 0, name
    assert ceilings.small_launch_us(device) > 0


def test_a_copy_is_slower_with_a_cold_cache():
    """8 MiB read and 8 written: by memory, not by an L2 cache that holds both."""
    x, device = torch.randn(1 << 21, device="cuda"), torch.device("cuda")
    y = torch.empty_like(x)
    hot = ceilings.best_ms(lambda: y.copy_(x), device)
    assert 1e3 * ceilings.median_ms(lambda: y.copy_(x), device) > 1.1e3 * hot
    assert tuning_tables.microseconds(lambda: y.copy_(x)) > 1.1e3 * hot


@pytest.fixture
def forced(monkeypatch):
    """forced[0] = i: convolutions run with the i-th of `forced[1:]`, their split configurations."""
    skip_unless("triton", "conv_bn_act", torch.bfloat16)
    from resnet_fast.kernels import config_select

    state = [0]

    def choose(kernel, key, configs, rule, x, start, why=""):
        state[1:] = [config for config in configs if config[-1] > 1]
        return state[1:][state[0]] if state[1:] else configs[rule]

    monkeypatch.setattr(config_select, "choose", choose)
    return state


@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_splits_of_one_image(layer, tma, forced):
    """Every split of every tile of one image, against fp64; the same bits again and in a graph."""
    from resnet_fast.kernels import counters
    from resnet_fast.kernels.conv import conv_fused
    from resnet_fast.kernels.conv_plan import Fusion, refuse_tma

    x, w, norm, residual = tensors(layer, 1, torch.bfloat16, torch.device("cuda"))
    if tma and refuse_tma(x, w, layer.conv, residual) is not None:
        pytest.skip(f"descriptors: {refuse_tma(x, w, layer.conv, residual)}")
    args = [x, w, None, *norm, residual, layer.relu, 1e-5, *layer.conv.args()]
    same, exact = reference.conv_bn_act(*args), reference.conv_bn_act(*cast(args))
    fusion = Fusion(*folded(x, norm), residual=residual, relu=layer.relu)

    def run():
        return conv_fused(x, w, layer.conv, fusion, tma=tma)[0]

    run()
    if not forced[1:]:
        pytest.skip("many tiles, or a short GEMM_K: never split")
    for i in range(len(forced) - 1):
        forced[0] = i
        y = run()
        assert_close(y, same, exact, f"{layer} {forced[1 + i]}")
        graph, static = captured(run)
        for _ in range(20):
            assert torch.equal(run(), y)
            static.zero_()
            graph.replay()
            assert torch.equal(static, y)
    torch.cuda.synchronize()
    assert not any(kept.any() for kept in counters._of_stream.values())


def test_counters_of_a_graph(forced):
    """200 captured calls take one set of counters, and it comes back when the graph is gone."""
    from resnet_fast.kernels import counters
    from resnet_fast.kernels.conv import conv_fused
    from resnet_fast.kernels.conv_plan import Fusion

    layer = LAYERS[-1]
    x, w, norm, residual = tensors(layer, 1, torch.bfloat16, torch.device("cuda"))
    fusion = Fusion(*folded(x, norm), residual=residual)

    def run():
        return conv_fused(x, w, layer.conv, fusion)[0]

    def sets(before):
        new = [own for number, own in counters._captured.items() if number not in before]
        return [kept.data_ptr() for own in new for _, kept in own.taken]

    alone = run()
    before = set(counters._captured)
    graph, results = captured(lambda: [run() for _ in range(200)])
    (first,) = sets(before)
    graph.replay()
    assert all(torch.equal(y, alone) for y in results)
    again, y = captured(run)
    assert len({first, *sets(before)}) == 2, "another graph has another set"
    del graph, results
    gc.collect()
    torch.cuda.synchronize()
    limit = time.monotonic() + 10  # the driver destroys user objects in a thread of its own
    while first in sets(before) and time.monotonic() < limit:
        counters._return_ended()
    assert len(sets(before)) == 1 and first not in sets(before)
    assert first in [piece.data_ptr() for piece in counters._free[x.device]]
    again.replay()
    assert torch.equal(y, alone)


def test_splits_at_once(forced):
    """Two graphs and two eager streams at the same time: no launch counts at another's tiles."""
    from resnet_fast.kernels.conv import conv_fused
    from resnet_fast.kernels.conv_plan import Fusion

    layer = LAYERS[-1]
    assert layer.channels == layer.filters == 512
    calls, streams = [], [torch.cuda.Stream() for _ in range(4)]
    forced[0] = -1  # the last configuration: the most parts
    for _ in streams:
        x, w, norm, residual = tensors(layer, 1, torch.bfloat16, torch.device("cuda"))
        fusion = Fusion(*folded(x, norm), residual=residual)
        calls.append(lambda x=x, w=w, fusion=fusion: conv_fused(x, w, layer.conv, fusion)[0])
    alone = [call() for call in calls]
    assert forced[-1][-1] == 8
    graphs = [captured(call) for call in calls[:2]]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i < 2:
                    graphs[i][0].replay()
                    results.append(graphs[i][1].clone())
                else:
                    results.append(calls[i]())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_streams(impl):
    """Two nets at once on two streams give what each gives alone."""
    skip_unless(impl, "conv_bn_act", torch.bfloat16)
    nets, inputs = [model(impl=impl), model(impl=impl)], [images(8), images(8)]
    with torch.inference_mode():
        alone = [net(x) for net, x in zip(nets, inputs, strict=True)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in nets]
        results = [None, None]
        for _ in range(5):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    results[i] = nets[i](inputs[i])
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, alone, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_current():
    net = model().to("cuda:1")
    x = images().to("cuda:1")
    with torch.inference_mode():
        y = net(x)
        assert y.device == x.device and torch.cuda.current_device() == 0
        with torch.cuda.device(1):
            assert torch.equal(y, net(x))


def test_same_bits_twice():
    """Forward, gradients and statistics of a training step."""
    x = images(8).float()

    def step():
        torch.manual_seed(0)
        net = resnet_fast.create_model("resnet18", num_classes=10)
        net.to("cuda", memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            net(x).float().square().sum().backward()
        return [*(p.grad for p in net.parameters()), *net.buffers()]

    torch.backends.cudnn.deterministic = True
    try:
        first, second = step(), step()
    finally:
        torch.backends.cudnn.deterministic = False
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_whole_models():
    """ResNet-50 in bf16 by "auto" is as near to fp64 as plain PyTorch."""
    net = model("resnet50")
    plain, x = resnet_fast.unfuse(net), images(4, 96)
    assert backends.chosen("conv_bn_act", "auto", "cuda", torch.bfloat16) == "triton"
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(x.double())
        assert_close(net(x), plain(x), exact, "logits", rms=True)


@pytest.mark.sanitizer
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("part", range(SANITIZED), ids=lambda part: f"{part} of {SANITIZED}")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, part):
    """A part of the native kernels' tests under NVIDIA's checkers, in a process of their own."""
    skip_unless("native", "bn_act", torch.bfloat16)
    tests = [sys.executable, *"-m pytest -q -p no:cacheprovider tests/dispatch/test_ops.py".split()]
    chosen = "native-cuda and bf16 and channels_last and (test_pointwise or test_convolution)"
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *tests, "-k", chosen]
    command += ["--shard", f"{part}/{SANITIZED}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
