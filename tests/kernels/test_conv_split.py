"""Split-K: every split against fp64, the same bits in any order of arrival, the rule."""

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from judge import judge
from test_kernels import DEVICE, ROOT, Launches

from bench.estimate import GPUS
from bench.layers import layers_of
from resnet_fast import kernels
from resnet_fast.kernels import (
    config_select,
    conv,
    conv_cost,
    conv_plan,
    conv_split,
    conv_train,
    counters,
    launch,
)
from resnet_fast.spec import chain, reference
from resnet_fast.verify.op_cases import CONVOLUTIONS, Conv, Draw, projection

interpreted = pytest.mark.skipif(not launch.INTERPRETING, reason="of the interpreter alone")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = {  # several tiles, none full; 3, 9 or 18 steps of GEMM_K in bf16, no split divides all
    "1x1": Conv((1, 168, 7, 5), 72, (1, 1)),
    "3x3": Conv((2, 16, 6, 7), 40, (3, 3), padding=(1, 1)),
    "3x3-stride2": Conv((1, 64, 10, 14), 40, (3, 3), (2, 2), (1, 1)),
    "dilated": Conv((1, 80, 7, 8), 24, (3, 3), padding=(2, 3), dilation=(2, 3)),
    "grouped": Conv((1, 32, 7, 5), 48, (3, 3), padding=(1, 1), groups=2),
    "one-pixel": Conv((1, 136, 3, 3), 8, (3, 3)),
    "empty": Conv((0, 16, 5, 5), 8, (3, 3)),
}


@pytest.fixture
def large_gpu(monkeypatch):
    """An interpreter of 132 multiprocessors, that splits as far as there are steps."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target(90, 132, "interpreter"))
    monkeypatch.setattr(conv_split, "LEAST_STEPS", 1)
    conv_split.with_splits.cache_clear()
    yield
    conv_split.with_splits.cache_clear()


@pytest.fixture
def take(monkeypatch):
    """take(i): convolutions run with the i-th of their configurations that are split."""
    taken = []

    def nth(i):
        def choose(kernel, key, configs, rule, x, start, why=""):
            if not kernel.startswith("conv_affine_act"):
                return configs[rule]
            split = [config for config in configs if config[-1] > 1]
            taken.append(split[i % len(split)])
            last[0] = i + 1 >= len(split)
            return taken[-1]

        last = [True]
        monkeypatch.setattr(config_select, "choose", choose)
        return last

    nth.taken = taken
    return nth


def call(name, dtype, tma, variant="conv_bn_act:bias-residual"):
    """Arguments of the op and the same convolution by one of both kernels."""
    args = CONVOLUTIONS[variant](Draw(dtype, torch.channels_last, DEVICE), SHAPES[name])
    x, w, bias, weight, shift, mean, var, residual, relu, eps, *geometry = args
    affine = reference.bn_fold(x, [bias, weight, shift, mean, var], [eps])
    fusion = conv.Fusion(*affine, residual=residual, relu=relu)
    geometry = chain.Conv(*map(tuple, geometry[:3]), geometry[3])
    return args, lambda: conv.conv_fused(x, w, geometry, fusion, tma=tma)[0]


def counted():
    """All counters that launches have been given."""
    return torch.cat([kept for kept in counters._of_stream.values()])


@pytest.mark.parametrize(
    ("dtype", "tma"),
    [(torch.float64, False), (torch.float32, False), (torch.float16, False),
     (torch.float16, True)],
    ids=["fp64", "fp32", "fp16", "fp16-descriptors"],
)  # fmt: skip
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.leave_out(cases=lambda case: case.tma and case.name == "grouped")
def test_every_split(large_gpu, take, name, dtype, tma):
    """Every split of every tile against fp64; what each leaves is zero counters."""
    args, run = call(name, dtype, tma)
    for i in itertools.count():
        last = take(i)
        judge("conv_bn_act", args, f"{name} split {i}", run)
        if last[0]:
            break
    if name == "empty":
        assert take.taken == []
        return
    found = {config[-1] for config in take.taken}
    assert found >= ({2} if name == "1x1" else {2, 4, 8})
    assert not counted().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", ["1x1", "3x3", "one-pixel"])
def test_every_split_with_a_projection(large_gpu, take, monkeypatch, name, dtype):
    """Its steps come first: parts have only those, those and the convolution's, or only these."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    draw = Draw(dtype, torch.channels_last, DEVICE)
    args = projection(stride=2, channels=192)(draw, SHAPES[name])
    x, w, scale, shift, source, source_w, *affine = args[:8]
    source_w = source_w.contiguous(memory_format=torch.channels_last)
    source = conv_plan.Source(source, source_w, 2, *affine)
    fusion = conv.Fusion(scale, shift, source=source)
    geometry = chain.Conv(*map(tuple, args[9:12]), args[12])

    def run():
        return conv.conv_fused(x, w, geometry, fusion, tma=True)[0]

    for i in itertools.count():
        last = take(i)
        judge("conv_add_projection", args, f"{name} split {i}", run)
        if last[0]:
            break
    assert {config[-1] for config in take.taken} >= {2, 4}
    assert not counted().any()


def test_training_forward_of_a_split(large_gpu, take, monkeypatch):
    """The statistics of every tile, which its last program gathers."""
    monkeypatch.setenv("RESNET_FAST_TRITON_CONV", "fused")
    draw = Draw(torch.float16, torch.channels_last, DEVICE)
    args = CONVOLUTIONS["conv_fprop:prologue"](draw, SHAPES["3x3"])

    def fused(*args):
        return conv.conv_fused(*args, tma=False)

    monkeypatch.setattr(conv_train, "conv_fused", fused)
    for i in (0, 4):
        take(i)
        judge("conv_fprop", args, f"split {i}", lambda: kernels.conv_fprop(*args))
    assert [config[-1] for config in take.taken] == [2, 4]


@interpreted
@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
def test_same_bits_in_any_order_of_arrival(large_gpu, take, monkeypatch, tma):
    """The programs of the grid run forwards, backwards and in between: nothing else changes."""
    from triton.runtime import interpreter

    _, run = call("grouped" if not tma else "3x3", torch.float16, tma)
    take(5)
    builder, results = interpreter.interpreter_builder, []
    place = builder.set_grid_idx
    for turn in (0, 1, 3):

        def moved(*at, turn=turn):
            place(*((i + turn) % n if turn < 3 else n - 1 - i
                    for i, n in zip(at, builder.grid_dim, strict=True)))  # fmt: skip

        monkeypatch.setattr(builder, "set_grid_idx", moved)
        results.append(run())
    assert take.taken[0][-1] > 2
    assert all(torch.equal(result, results[0]) for result in results)
    assert not counted().any()


def test_one_launch(large_gpu, take, monkeypatch):
    """Counters are zeroed by the kernel and by nothing else."""
    _, run = call("3x3", torch.float16, True)
    take(0)
    run()
    with Launches(monkeypatch) as launches:
        run()
    assert launches.kernels == ["conv_affine_act_tma_kernel"] and launches.calls == []


def plan(batch, layer):
    """Configurations of a layer of a bf16 model on an H200, and the rule's."""
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in (layer.shapes(batch)[0], layer.weight_shape))  # fmt: skip
    residual = x if layer.residual else None  # only whether there is one
    gemm = conv_plan.gemm_of(x, w, layer.conv, conv_plan.Fusion(residual=residual))
    configs = conv_plan.eligible(conv_plan.NARROW, layer.filters, 227 << 10)
    every, taken = conv_split.with_splits(configs, gemm, 132, 227 << 10)
    return every, every[taken], [conv_cost.microseconds(c, gemm, 132, 227 << 10) for c in every]


def test_rule_takes_the_least_estimated_time():
    """At batch 1 long GEMM_Ks in parts; at batch 256 none."""
    split = {}
    layers = [layer for layer in layers_of("resnet50") if layer.channels > 3]
    for batch, layer in itertools.product((1, 256), layers):
        every, taken, times = plan(batch, layer)
        assert taken == every[times.index(min(times))]
        if taken[-1] > 1:
            split.setdefault(batch, {})[str(layer)] = taken[-1]
    assert split == {
        1: {
            "3x3/2 128>128 @56": 4, "3x3/1 128>128 @28": 4, "3x3/2 256>256 @28": 8,
            "3x3/1 256>256 @14": 8, "3x3/2 512>512 @14": 8, "3x3/1 512>512 @7": 8,
            "1x1/1 1024>256 @14": 4, "1x1/1 1024>512 @14": 4, "1x1/2 1024>2048 @14": 4,
            "1x1/1 2048>512 @7": 8,
        }
    }  # fmt: skip


GEMM = conv_cost.Gemm(50176, 256, 9, 256, 1, 2, 4096)


def estimated(gemm):
    return conv_cost.microseconds((128, 128, 64, 8, 3, 1), gemm, 132, 227 << 10)


@pytest.mark.parametrize(
    "change", [{"pixels": 100352}, {"taps": 18}, {"channels": 512}, {"groups": 2}], ids=str
)
def test_twice_the_work_takes_twice_as_long(change):
    """If all multiprocessors have many tiles."""
    assert 1.6 < estimated(GEMM._replace(**change)) / estimated(GEMM) < 2.4


def test_an_epilogue_takes_time():
    """Where there are few steps before it."""
    short = GEMM._replace(taps=1, channels=64)
    assert estimated(short._replace(residual=True)) > 1.2 * estimated(short)


@pytest.mark.parametrize("change", [{"pixels": 100352}, {"taps": 18}, {"channels": 512}], ids=str)
def test_moments_of_twice_the_work(monkeypatch, change):
    """A program walks its tiles, one after another; L2 and memory bound all of them."""
    config = (128, 128, 64, 8, 3, 1)
    gemms = GEMM, GEMM._replace(**change)
    one, two = (conv_cost.with_moments.__wrapped__(config, gemm, 132) for gemm in gemms)
    assert 1.8 < two / one < 2.1
    monkeypatch.setattr(conv_cost, "L2", 1e20)
    free = conv_cost.with_moments.__wrapped__(config, GEMM, 132)
    each = conv_cost.tiles_of_program(50176 // 128, 2, 132)
    assert each == 6 and one > 1.3 * free
    cycles = each * (36 * 160 * 4.4 + 540 * 4.4) + (700 + 20 * 64) * 4.4
    assert free == pytest.approx(1 + cycles / 1755)


def test_programs_that_fit():
    """Registers for so many programs, and tiles of so many: no program has two columns."""
    assert [conv_cost.registers_of(8, n) for n in (1, 2)] == [255, 128]
    assert [conv_cost.registers_of(4, n) for n in (2, 3, 4)] == [255, 168, 128]
    assert conv_cost.tiles_of_program(98, 16, 132) == 13
    assert conv_cost.tiles_of_program(5, 200, 132) == 5


def test_constants_are_the_clocks():
    clock = GPUS["h200"]
    assert (conv_cost.PACE, conv_cost.CLOCK) == (clock.warp_cycles, clock.clock / 1e6)
    assert (conv_cost.MEMORY, conv_cost.L2) == (clock.bytes_per_s / 1e6, clock.l2_bytes_per_s / 1e6)
    assert (conv_cost.FIRST_LOAD, conv_cost.LOAD) == (clock.first_load_us, clock.load_us)
    assert (conv_cost.SMALL, conv_cost.GAP) == (clock.small_us, clock.gap_us)
    assert conv_cost.RATE == clock.flops_per_s / 1e6
    assert (conv_cost.REGISTERS, conv_cost.THREADS) == (clock.registers, clock.threads)


def native(tile, gemm, monkeypatch, **constants):
    with monkeypatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(conv_cost, name, value)
        return conv_cost.by_native(conv_cost.NativeTile(*tile), gemm, 132)


def test_native_tiles(monkeypatch):
    """A pingpong tile hides its epilogue behind the other's steps; a cluster reads filters once."""
    deep = conv_cost.Gemm(256 * 49, 512, 9, 512, 1, 2, 4096)
    free = {"L2": 1e20, "RATE": 1e20, "MEMORY": 1e20}
    steps, rounds = 9 * 8, -(-98 * 4 // 132)
    main = steps * 512
    for tile, each in (
        ((128, 128, 65, 1300), main),
        ((128, 128, 65, 9300), (main + 4.4 * 9300) / 2),
        ((256, 128, 88, 1300), 2 * main + 4.4 * 1300),
    ):
        alone = main * tile[0] // 128 + 4.4 * tile[3]
        count = -(-49 * 256 // tile[0] * 4 // 132) if tile[0] == 256 else rounds
        expected = 1 + ((count - 1) * each + alone) / 1755
        assert native(tile, deep, monkeypatch, **free) == pytest.approx(expected)
    flat = conv_cost.Gemm(256 * 49, 512, 1, 2048, 1, 2, 4096)
    through = [98 * 8 * 32 * (128 + 64) * 128, 98 * 4 * 32 * (128 + 64) * 128]
    for tile, size in zip(((128, 64, 1, 0), (128, 128, 1, 0)), through, strict=True):
        found = native(tile, flat, monkeypatch, CLOCK=1e9, FIRST_LOAD=0.0, MEMORY=1e20)
        assert found == pytest.approx((size + 256 * 49 * 512 * 2) / 7e6, rel=1e-3)


def test_native_rule_is_that_of_the_source():
    """The tiles and their order, and the largest that fills the GPU and is not too wide."""
    text = (ROOT / "csrc" / "cuda" / "conv_tiles.h").read_text()
    listed = re.search(r"namespace sm90 \{.*?kTiles\[\] = \{(.*?)\};", text, re.DOTALL)[1]
    found = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+), (\d+),", listed)]
    assert found == [tile[:2] for tile in conv_cost.NATIVE_TILES]
    for pixels, filters, expected in (
        (256 * 3136, 64, (256, 64)), (256 * 3136, 256, (256, 128)), (256 * 3136, 72, (256, 128)),
        (128 * 66, 256, (256, 64)), (128 * 66, 136, (128, 128)), (128 * 40, 256, (128, 64)),
        (3136, 256, (64, 64)), (131 * 128, 64, (64, 64)),
    ):  # fmt: skip
        gemm = conv_cost.Gemm(pixels, filters, 1, 64, 1, 2, 4096)
        assert conv_cost.native_tile(gemm, 132)[:2] == expected


def test_measured_tiles_of_an_h200():
    """Within 30% of what ran on an H200 (nvidia-h200-layers.jsonl) where the kernel is the same:
    3x3 convolutions, whose loop takes most of the time.
    """
    measured = {(64, 56): 210.6, (128, 28): 128.7, (256, 14): 122.8, (512, 7): 142.2}
    tiles = {64: (128, 64, 64, 8, 4, 1), 128: (128, 128, 64, 8, 4, 1),
             256: (128, 256, 64, 8, 3, 1), 512: (128, 256, 64, 8, 3, 1)}  # fmt: skip
    for (channels, size), us in measured.items():
        gemm = conv_cost.Gemm(256 * size * size, channels, 9, channels, 1, 2, 4096)
        found = conv_cost.microseconds(tiles[channels], gemm, 132, 227 << 10)
        assert found == pytest.approx(us, rel=0.3)


def test_what_is_offered():
    """No part shorter than LEAST_STEPS, no more parts than the GPU has use for, no wide tiles."""
    small, large = (plan(batch, layer) for batch, layer in
                    itertools.product((1, 256), [list(layers_of("resnet50"))[-1]]))  # fmt: skip
    assert {config[-1] for config in small[0]} == {1, 2, 4, 8}
    assert all(config[-1] == 1 for config in large[0])
    for batch, layer in itertools.product((1, 4, 32), layers_of("resnet50")):
        steps = layer.kernel[0] * layer.kernel[1] * -(-layer.channels // 64)
        for *tile, split in plan(batch, layer)[0]:
            n, p, q = batch, *layer.out_size
            grid = -(-n * p * q // tile[0]) * -(-layer.filters // tile[1])
            if split > 1:
                assert tile[1] <= 64 and steps >= 4 * split and grid * split < 2 * 132


@pytest.mark.slow
def test_order_of_memory():
    """Sums stored, a barrier, the count released and acquired, a barrier, sums from L2: in PTX.

    The interpreter, a program at a time, has no other order; this one is a GPU's.
    """
    script = (
        "import torch\n"
        "from triton.runtime import driver\n"
        "from bench import kernels as bench\n"
        "from resnet_fast.kernels import launch\n"
        "driver.set_active(bench.OfflineDriver(90))\n"
        "target = launch.Target(90, 132, 'sm_90')\n"
        "cases = dict(bench.small_cases('', bench.LAYERS['3x3@7'], torch.bfloat16))\n"
        "asked = []\n"
        "with launch.compile_for(target, lambda *what: asked.append(what), every=False):\n"
        "    cases['']()\n"
        "(kernel, _, arguments, options), = asked\n"
        "print(kernel.warmup(*arguments, grid=(1,), **options).asm['ptx'])\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {
        "st.global.v4.b32": "store", "bar.sync": "barrier", "ld.global.cg": "load",
        "atom.global.gpu.acq_rel.add": "count", "ld.global.v": "other",
    }  # fmt: skip
    seen = [
        kind for line in done.stdout.splitlines() for name, kind in kinds.items() if name in line
    ]
    count = seen.index("count")
    before, after = seen[:count], seen[count + 1 :]
    assert seen.count("count") == 1 and before.count("store") >= 4 and after.count("load") >= 4
    assert "load" not in before and before[-1] == "barrier" and after[0] == "barrier"
    assert after.index("load") < after.index("other"), "no sums by way of L1"
