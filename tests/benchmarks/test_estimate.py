"""The clock: every launch of a step, what its SASS says, and the time that is estimated from it."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import cutlass, estimate, rows, sass
from bench.__main__ import main
from bench.compile import Compiled
from bench.estimate import GPUS, Gpu
from bench.launches import Launch
from bench.layers import layers_of
from bench.sass import Sass, Section

ROOT = Path(__file__).resolve().parents[2]
H200 = GPUS["h200"]
REQUIRED = {
    "kernel", "count", "grid", "registers", "shared_bytes", "programs_per_sm", "estimate_us",
    "floor_us", "bound",
}  # fmt: skip


def disassembly(text):
    """Instructions and labels of `text` as nvdisasm prints them."""
    lines, at = ["\t.section\t.text.kernel", "        /*0000*/ \t.byte\t0x00, 0x01"], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        lines.append(f"        /*{at:04x}*/                   {line} ;  /* 0x000000000000781c */")
        lines.append("                                                 /* 0x003fde0003f8e870 */")
        at += 16
    return "\n".join(lines)


GEMM = """
    S2R R0, SR_TID.X
    UTMALDG.4D [UR8], [UR4]
.L_x_5:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], RZ
    @!P1 BRA `(.L_x_5)
.L_x_0:
    LDSM.16.M88.4 R88, [R16]
    HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0
    IADD3 R1, R1, 1, RZ
    IADD3 R2, R2, 1, RZ
    {wait}
    BAR.SYNC.DEFER_BLOCKING 0x0
    UTMALDG.4D [UR8], [UR4]
    @P0 BRA `(.L_x_0)
    SHFL.BFLY PT, R3, R3, 0x10, 0x1f
    STS.128 [R4], R8
    LDG.E.128 R8, [R2.64]
    BAR.SYNC.DEFER_BLOCKING 0x0
    STG.E.64 [R2.64], R8
    EXIT
.L_x_9:
    SHFL.BFLY PT, R3, R3, 0x10, 0x1f
    BRA `(.L_x_0)
    RET.REL.NODEC R2
"""


@pytest.mark.parametrize("waits", [True, False])
def test_sections_of_a_gemm(waits):
    """Around the loop with tensor cores, without spinning on a barrier and without cold code."""
    wait = f"WARPGROUP.DEPBAR.LE gsb0, 0x{0 if waits else 1}"
    found = sass.read(disassembly(GEMM.replace("{wait}", wait)))
    assert (found.before.issue, found.loop.issue, found.after.issue) == (4, 8, 6)
    assert (found.before.mio, found.loop.mio, found.after.mio) == (0, 1, 2)
    assert (found.before.lsu, found.loop.lsu, found.after.lsu) == (1, 1, 4 + 2)
    assert found.loop.tensor == 64 and found.before.tensor == found.after.tensor == 0
    assert (found.loop.barriers, found.after.barriers) == (1, 1)
    assert found.loop.pipes == {"tensor": 1, "mio": 1, "lsu": 1, "alu": 5, "barriers": 1}
    assert found.pipelined and found.loads_after and found.waits == waits
    assert found.hidden == (3 if waits else 8)


def test_products_that_run_into_the_next_trip_are_hidden_there():
    loop = """
    .L_x_0:
        IADD3 R1, R1, 1, RZ
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        FADD R3, R3, R3
        HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
        @P0 BRA `(.L_x_0)
        EXIT
    """
    found = sass.read(disassembly(loop))
    assert found.waits and found.hidden == 3 and found.loop.tensor == 128


TWO_PRODUCTS = """
    MOV R1, R1
.L_x_0:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
    @P0 BRA `(.L_x_0)
    FADD R3, R3, R3
    FADD R3, R3, R3
.L_x_1:
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
    IADD3 R1, R1, 1, RZ
    @P0 BRA `(.L_x_1)
    STG.E.64 [R2.64], R8
    EXIT
"""


def test_a_kernel_of_two_products():
    """The last of equal loops is the main one; what is between them is before it."""
    found = sass.read(disassembly(TWO_PRODUCTS))
    parts = found.before, found.first, found.loop, found.after
    assert [part.issue for part in parts] == [1 + 2, 2, 3, 2]
    assert found.first.tensor == found.loop.tensor == 32
    fewer = TWO_PRODUCTS.replace("HGMMA.64x64x16", "HGMMA.64x32x16", 1)
    assert sass.read(disassembly(fewer)).first.issue == 0


TILES = """
    MOV R1, R1
.L_x_0:
    @P1 BRA `(.L_x_1)
    IMAD R5, R5, R5, RZ
    IMAD R6, R6, R6, RZ
.L_x_1:
    UTMALDG.3D [UR8], [UR6]
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    @P0 BRA `(.L_x_2)
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    STS [R2], R3
    UTMASTG.4D [UR8], [UR6]
    @P2 BRA `(.L_x_3)
    SHFL.BFLY PT, R3, R3, 0x10, 0x1f
    FADD R3, R3, R3
.L_x_3:
    FADD R4, R4, R4
.L_x_2:
    IADD3 R1, R1, 1, RZ
    @P3 BRA `(.L_x_0)
    SHFL.BFLY PT, R3, R3, 0x10, 0x1f
    EXIT
"""


def test_a_loop_over_the_steps_of_several_tiles():
    """What a branch skips is the end of a tile; an exchange that one in it skips is done once."""
    found = sass.read(disassembly(TILES))
    parts = found.before, found.loop, found.tile, found.after
    assert [part.issue for part in parts] == [1, 7, 2 + 5, 2 + 2]
    assert (found.loop.mio, found.tile.mio, found.after.mio) == (0, 1, 2)
    assert found.loop.tensor == 32 and not found.waits and found.pipelined
    one = sass.read(disassembly(TILES.replace("UTMASTG.4D", "UTMALDG.4D")))
    assert one.tile.issue == 0 and one.loop.issue == 7 + 7 + 2, "a loop that stores no tile"


def test_tiles_of_a_program():
    """Each takes its steps and its end; the first load is exposed once."""
    code = compiled(loop=100, registers=255)
    tile = dataclasses.replace(code, sass=dataclasses.replace(code.sass, tile=Section(50)))
    trips = {"R": 1, "S": 1, "c_tiles": 4, "boxes_per_program": 6}
    one = dataclasses.replace(conv_launch(132, **trips), name="conv_moments_kernel")
    without, found = of(one, code), of(one, tile)
    assert found["trips"] == without["trips"] == 24
    cycles = 1755 * (found["program_us"] - without["program_us"])
    assert cycles == pytest.approx(6 * 50 * H200.warp_cycles)


@pytest.mark.parametrize("mode", ["fprop", "dgrad", "wgrad"])
def test_times_of_cudnn_are_those_of_an_h200(mode):
    """Each convolution of ResNet-50 within 30%, the stem too, and their sum within 2%."""
    conv_cost = pytest.importorskip("resnet_fast.kernels.conv_cost")
    layers = {str(layer): layer for layer in layers_of("resnet50")}
    measured = {
        row["layer"]: 1e3 * row["ms_p50"]
        for row in map(json.loads, (ROOT / "bench/results/nvidia-h200-layers.jsonl").open())
        if (row["mode"], row["provider"]) == (mode, "torch conv")
    }
    assert len(measured) == (23 if mode == "dgrad" else 24)
    total = 0.0
    for name, us in measured.items():
        layer = layers[name]
        filters, channels = layer.weight_shape[:2]
        strided = mode == "dgrad" and layer.conv.stride[0] == 2
        moved = layer.bytes(256, 2, "fprop")  # x, filters and z, whichever of them is written
        if strided:
            moved = 2 * sum(math.prod(shape) for shape in layer.shapes(256))
        columns = {"fprop": filters, "dgrad": channels, "wgrad": min(filters, channels)}[mode]
        kind = "strided dgrad" if strided else mode
        estimate = conv_cost.by_library(moved, layer.flops(256), columns, channels, kind)
        assert estimate == pytest.approx(us, rel=0.3), name
        total += estimate
    assert total == pytest.approx(sum(measured.values()), rel=0.02)


def test_straight_code_ends_its_prologue_with_the_last_product():
    found = sass.read(disassembly("""
        LDG.E R2, [R2.64]
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
        HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
        FADD R3, R3, R3
        EXIT
    """))  # fmt: skip
    assert (found.before.issue, found.loop.issue, found.after.issue) == (3, 0, 2)
    assert found.before.tensor == 64 and not found.loads_after


def test_all_loops_of_a_kernel_without_tensor_cores():
    """Nested ones count once, with the outermost; their loads are waited for."""
    found = sass.read(disassembly("""
    .L_x_0:
        LDG.E.64 R2, [R2.64]
    .L_x_1:
        FADD R3, R3, R3
        @P1 BRA `(.L_x_1)
        @P0 BRA `(.L_x_0)
        MOV R1, R1
    .L_x_2:
        LDG.E R2, [R2.64]
        @P0 BRA `(.L_x_2)
        EXIT
    """))  # fmt: skip
    assert (found.before.issue, found.loop.issue, found.after.issue) == (0, 6, 2)
    assert found.loop.lsu == 3 and not found.pipelined and not found.waits


def test_the_last_program_runs_what_follows_an_atomic_operation():
    """Its loop is neither part of the main loop nor of what every program runs."""
    found = sass.read(disassembly("""
    .L_x_0:
        LDG.E.64 R2, [R2.64]
        @P0 BRA `(.L_x_0)
        STG.E [R2.64], R3
        BAR.SYNC.DEFER_BLOCKING 0x0
        ATOMG.E.ADD.STRONG.GPU PT, R7, [R4.64], R7
        @P0 EXIT
    .L_x_1:
        LDG.E.64.STRONG.GPU R4, [R4.64]
        FADD R3, R3, R4
        @P0 BRA `(.L_x_1)
        STG.E [R2.64], R3
        EXIT
    """))  # fmt: skip
    assert (found.loop.issue, found.merge.issue, found.last.issue) == (2, 3, 4)
    every = found.after - found.last - found.merge
    assert every.issue == 2 and not every.opcodes["ATOMG"]
    took = estimate.last_us(found, 4, 10, H200)
    waits = H200.meeting_us + 11 * H200.l2_load_us
    assert took == pytest.approx(waits + (4 + 30) * H200.warp_cycles / 1755)


def test_disassembly_without_instructions_is_an_error():
    with pytest.raises(ValueError, match="disassembly: expected the instructions"):
        sass.read("nothing")


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(168, 32768, 8, 1), (128, 32768, 8, 2), (128, 113 << 10, 8, 2), (128, 114 << 10, 8, 1),
     (64, 0, 4, 8), (32, 0, 4, 16), (16, 0, 1, 32), (255, 227 << 10, 8, 1)],
)  # fmt: skip
def test_programs_of_a_multiprocessor(registers, shared, warps, programs):
    """65,536 registers, 228 KiB with one kept for each program, 2,048 threads, 32 programs."""
    assert H200.resident(registers, shared, warps) == programs


class Parameter:
    def __init__(self, name, is_constexpr):
        self.name, self.is_constexpr = name, is_constexpr


class Kernel:
    params = (Parameter("x", False), Parameter("count", False), Parameter("BLOCK", True))


def a_launch(programs, size=1 << 20, name="bn_act_fwd_kernel"):
    x = torch.empty(size, dtype=torch.bfloat16, device="meta")
    return Launch(name, (programs,), {"x": x, "count": 32, "BLOCK": 8}, Kernel, {"num_warps": 8})


def compiled(registers=168, loop=0, after=2000, mio=0, waits=False, trips_hidden=0, tensor=0):
    parts = Section(100), Section(loop, tensor=tensor), Section(after, mio=mio)
    return Compiled(
        "k", "sm_90", registers, shared=32768,
        sass=Sass(*parts, trips_hidden, waits, True, False),
    )  # fmt: skip


def of(one, code, gpu=H200, mode="train"):
    return estimate.entry(one, code, mode, gpu)


def test_a_tile_alone_exposes_its_prologue_and_epilogue():
    """One program a multiprocessor: each takes its first load and all of its code, in turn."""
    found = of(a_launch(132 * 10), compiled())
    a_tile = 1.0 + H200.warp_cycles * (100 + 2000) / 1755
    assert found["programs_per_sm"] == 1 and found["bound"] == "latency"
    assert found["estimate_us"] == pytest.approx(10 * a_tile + H200.gap_us)


def test_two_programs_overlap():
    """They hide each other's loads and waits; many leave only the issue slots of all."""
    found = of(a_launch(132 * 10), compiled(registers=128))
    assert found["programs_per_sm"] == 2 and found["bound"] == "latency"
    a_tile = 1.0 + H200.warp_cycles * 2100 / 1755
    assert found["estimate_us"] == pytest.approx(5 * a_tile + H200.gap_us)
    assert found["waves"] == 5 and found["last_wave_idle"] == 0
    many = of(a_launch(132 * 12), compiled(registers=32))
    assert many["programs_per_sm"] == 6 and many["bound"] == "issue"
    assert many["estimate_us"] == pytest.approx(12 * 2 * 2100 / 1755 + H200.gap_us)


def test_the_last_wave_is_a_whole_one():
    some, more = (of(a_launch(132 * 10 + i), compiled())["estimate_us"] for i in (0, 1))
    assert more == pytest.approx(some * 1.1, rel=0.01)


def test_shuffles_bind_a_statistics_epilogue():
    """Of 1,700 or more instructions a warp: then eight warps take longer to issue the MIO's."""
    found = of(a_launch(132), compiled(after=0, mio=1500))
    before = 100 * H200.warp_cycles / 1755
    assert found["estimate_us"] - H200.gap_us - 1.0 == pytest.approx(before + 1500 * 8 / 1755)


def test_a_loop_that_waits_for_its_products_adds_them_up():
    one = dataclasses.replace(a_launch(132), name="fold_kernel")
    one.arguments.update(per_fold=800, BLOCK_S=8)
    one.arguments["count"] = 800
    free = of(one, compiled(loop=300, tensor=256))
    bound = of(one, compiled(loop=300, tensor=256, waits=True, trips_hidden=50))
    assert free["trips"] == bound["trips"] == 100
    pace = H200.warp_cycles
    assert bound["estimate_us"] - free["estimate_us"] == pytest.approx(
        100 * (pace * 250 + 512 - pace * 300) / 1755
    )


def conv_launch(programs, **changes):
    """A 1x1 convolution of 64 channels in tiles of 128 pixels and 64 filters."""
    x, y = (torch.empty(128 * programs, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    sizes = {"N": 1, "P": 1, "Q": 128 * programs, "filters": 64, "channels": 64, "R": 1, "S": 1}
    sizes |= {"BOX_N": 1, "BOX_P": 1, "BOX_Q": 128, "BLOCK_N": 64, "BLOCK_K": 64, "STRIDE": 1}
    arguments = {"x": x, "w": x[:64], "residual": None, "y": y, "c_tiles": 1, "SPLIT": 1}
    arguments |= sizes | changes
    name = "conv_affine_act_tma_kernel"
    return Launch(name, (programs, 1), arguments, Kernel, {"num_warps": 8})


def test_bytes_through_l2():
    """Every program's tiles of both operands in every trip, as far as they are there, and y."""
    one = conv_launch(1000)
    narrow = conv_launch(1000, BLOCK_N=128, BLOCK_K=128)
    assert estimate.through_l2(narrow, 1) == estimate.through_l2(one, 1)
    assert estimate.through_l2(one, 1) == 1000 * (128 + 64) * 64 * 2 + 128e3 * 64 * 2
    assert estimate.through_l2(one, 3) - estimate.through_l2(one, 1) == 2000 * 192 * 128
    found = of(conv_launch(200000, R=9, S=1), compiled(registers=64, loop=10), mode="infer")
    assert found["trips"] == 9 and found["bound"] == "L2"
    assert found["estimate_us"] == pytest.approx(found["l2_mb"] / 7 + H200.gap_us)


def test_a_projection_in_the_launch():
    """Its steps, bytes, operations and tiles, and the first load of the second product."""
    source = torch.empty(4 * 128 * 132, 192, dtype=torch.bfloat16, device="meta")
    both = {"source": source, "source_w": source[:64], "source_channels": 192, "source_tiles": 3,
            "SOURCE_STRIDE": 2}  # fmt: skip
    alone, one = conv_launch(132, c_tiles=5), conv_launch(132, c_tiles=5, **both)
    assert estimate.flops(one) == estimate.flops(alone) * (64 + 192) // 64
    read = source.numel() // 4 + 64 * 192  # one pixel of four
    assert estimate.moved(one) == estimate.moved(alone) + 2 * read
    assert estimate.through_l2(one, 8) == estimate.through_l2(alone, 8)
    code = compiled(loop=100)
    first = dataclasses.replace(code, sass=dataclasses.replace(code.sass, first=Section(30)))
    without, found = (of(*pair, mode="infer") for pair in ((alone, code), (one, first)))
    pace = H200.warp_cycles / 1755
    assert found["program_us"] - without["program_us"] == pytest.approx(
        3 * 30 * pace + H200.l2_load_us
    )
    assert found["family"] == "1x1 + projection" and found["trips"] == 5
    straight = conv_launch(132, c_tiles=1, **both)  # its step is no loop: that is the projection's
    assert of(straight, code, mode="infer")["trips"] == 3


def test_a_program_runs_one_branch():
    """Of 10 norms one, and 10 tests of two instructions."""
    one = dataclasses.replace(a_launch(1), name="bn_fold_kernel")
    one.arguments["channels"] = (64,) * 10
    found = of(one, compiled(after=2000))
    cycles = H200.warp_cycles * (100 + 200 + 20)
    assert found["estimate_us"] == pytest.approx(1.0 + cycles / 1755 + H200.gap_us)
    assert estimate.one_branch(compiled(mio=30).sass, 10).after.mio == 3


def test_windows_that_overlap_are_moved_once():
    t = torch.empty(1000, dtype=torch.bfloat16, device="meta")
    t = t.as_strided((10, 32, 100), (100, 1, 8))
    one = dataclasses.replace(a_launch(1), arguments={"x": t})
    assert estimate.moved(one) == 2 * (9 * 100 + 31 + 99 * 8 + 1)
    t = torch.empty(10, 20, device="meta").expand(3, 10, 20)
    assert estimate.moved(dataclasses.replace(one, arguments={"x": t})) == 4 * 200


def test_bytes_bind_where_the_code_is_short():
    found = of(a_launch(132, 1 << 30), compiled(after=10))
    assert found["bound"] == "memory" and found["mb"] == pytest.approx(2147.5, abs=0.1)
    assert found["estimate_us"] == pytest.approx(2**31 / 4.3e6 + 1)
    assert found["floor_us"] == pytest.approx(2**31 / 4.3e6)


def test_a_small_launch_takes_what_a_small_launch_takes():
    found = of(a_launch(1, 64), compiled(after=10))
    assert (found["estimate_us"], found["bound"], found["family"]) == (2.5, "launch", "small")


def test_a_loop_without_trips_is_an_error():
    one = dataclasses.replace(a_launch(1), name="new_kernel")
    with pytest.raises(RuntimeError, match="new_kernel: its loop has no entry"):
        of(one, compiled(loop=10))
    failed = dataclasses.replace(compiled(), failure="spills 8 bytes a thread")
    with pytest.raises(RuntimeError, match="spills 8 bytes"):
        of(a_launch(1), failed)


def ceilings_row(**values):
    given = {
        "benchmark": "ceilings", "device": "cuda", "date": "2026-01-01", "cpu_or_gpu": "NVIDIA X",
        "gb_per_s": 4000.0, "tflop_per_s": 700.0, "launch_us": 2.1, "dtype": "bf16", **values,
    }  # fmt: skip
    return rows.layer_row({}, **given)


def test_measured_ceilings_replace_the_tables():
    found = [ceilings_row(), ceilings_row(date="2026-02-01", tflop_per_s=750.0, launch_us=None)]
    gpu = estimate.calibrated(H200, found)
    assert gpu == dataclasses.replace(
        H200, calibrated="NVIDIA X", bytes_per_s=4e12, flops_per_s=750e12, small_us=2.5
    )
    others = ({"device": "cpu"}, {"benchmark": "layers"}, {"dtype": "fp32"}, {"gb_per_s": None})
    for none in ([], *([ceilings_row(**other)] for other in others)):
        with pytest.raises(ValueError, match="--calibrate: expected a row"):
            estimate.calibrated(H200, none)


def test_bad_files_are_named(tmp_path, capsys):
    bad = tmp_path / "bad.json"
    for text, said in (("{", "expected JSON"), ('[{"model": 1}]', "expected a list of estimates")):
        bad.write_text(text)
        assert main(["estimate", "--compare", str(bad)]) == 2
        assert f"{bad}: {said}" in capsys.readouterr().err
    assert main(["estimate", "--calibrate", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def offline(*arguments, **settings):
    """`python -m bench` where Triton compiles: without the interpreter that the tests set."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, env={**env, **settings},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    pytest.importorskip("triton")
    return tmp_path_factory.mktemp("triton")


OF_A_SMALL_NET = ("--model", "cifar_resnet20", "--image-size", "32", "--jobs", "1")


@pytest.fixture(scope="module")
def small(cache):
    """The estimate of a small net, by a cache that was empty."""
    out = cache / "old.json"
    done = offline(
        "estimate", *OF_A_SMALL_NET, "--mode", "infer", "--batch", "64", "--json", str(out),
        TRITON_CACHE_DIR=str(cache),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_report(small):
    """All that the JSON promises, sums that are the launches', and the word estimate."""
    said, (report,) = small
    assert {"model", "mode", "batch", "dtype", "gpu", "total_ms", "floor_ms"} <= report.keys()
    assert report["what"] == "estimate, not a measurement" and "ESTIMATE" in said
    launches = report["launches"]
    assert all(REQUIRED <= one.keys() for one in launches)
    total = sum(one["count"] * one["estimate_us"] for one in launches) / 1e3
    assert report["total_ms"] == pytest.approx(total, rel=1e-3)
    assert report["images_per_s"] == pytest.approx(64e3 / total, rel=1e-3)
    assert all(one["estimate_us"] >= max(one["floor_us"], 2.5) for one in launches)
    convs = [one for one in launches if one["kernel"].startswith("conv")]
    library = sum(one["count"] for one in launches if one["kernel"].startswith("cudnn fprop"))
    assert library < 10 and sum(one["count"] for one in convs) == 19 - library
    assert all(one["loop"]["tensor"] + one["before"]["tensor"] > 0 for one in convs)
    assert all(one["registers"] > 0 and one["programs_per_sm"] > 0 for one in convs)


@pytest.mark.slow
def test_a_warm_cache_compiles_nothing(small, cache):
    step = (*OF_A_SMALL_NET, "--mode", "infer", "--batch", "64")
    done = offline("compile", *step, TRITON_CACHE_DIR=str(cache))
    kernels = len(done.stdout.splitlines()) - 1
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kernels} kernels, {kernels} from the cache, 0 failed" in done.stdout


def test_compared_with_an_earlier_one(small):
    """Families and launches that changed by 1%, and nothing of the others."""
    _, (old,) = small
    assert estimate.compare(old, old).splitlines()[0].endswith("(1.000x)")
    assert " us" not in estimate.compare(old, old)
    new = json.loads(json.dumps(old))
    changed = max(new["launches"], key=lambda one: one["count"] * one["estimate_us"])
    changed["estimate_us"] *= 2
    new["total_ms"] += changed["count"] * changed["estimate_us"] / 2e3
    *_, last = estimate.compare(old, new).splitlines()
    before = changed["count"] * changed["estimate_us"] / 2
    assert changed["kernel"] in last and last.endswith(f"{before:8.1f} -> {2 * before:8.1f} us")


@pytest.mark.slow
def test_commands_say_why_they_cannot(cache):
    for command in ("compile", "estimate"):
        done = offline(command, *OF_A_SMALL_NET, "--batch", "2", TRITON_INTERPRET="1")
        assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr


LAUNCHES = """
import json, torch
from bench.compile import hopper
from bench.launches import launches_of
from bench.estimate import flops, moved
from bench.step import Case
for name, mode, batch in (
    ("resnet50", "train", 256), ("resnet50", "infer", 256), ("resnet50", "infer", 1),
    ("resnext50_32x4d", "train", 64), ("resnext50_32x4d", "infer", 64),
):
    case = Case(name, mode, batch, "bf16", torch.device("cuda"))
    found = launches_of(case, hopper())
    print(json.dumps([[one.name, one.count, flops(one), moved(one)] for one in found]))
    print(len({one.code for one in found if one.kernel}))
"""


@pytest.fixture(scope="module")
def launches():
    """Launches in training and inference: [name, count, FLOP, bytes] each."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = ("train", "infer", "one", "grouped train", "grouped infer")
    return dict(zip(names, lines[::2], strict=True)), lines[1::2]


def test_launches_of_resnet50(launches):
    """Every convolution once in each pass, and what runs beside them.

    Projections run in the launch of another, and forward convolutions by cuDNN, where that takes
    less time by estimate.
    """
    found, distinct = launches
    counts = {mode: Counter() for mode in found}
    for mode, own in found.items():
        for name, count, *_ in own:
            counts[mode][name] += count
    train = counts["train"]
    ours, library = train["conv_moments_kernel"], train["cudnn fprop"]
    assert ours + library == 52 and ours >= 15 and train["conv_affine_act_kernel"] == 1
    dgrads = train["cudnn dgrad"] + train["cudnn strided dgrad"]
    assert train["conv_dgrad_kernel"] + dgrads == 52 and dgrads >= 25
    assert train["conv_wgrad_kernel"] + train["cudnn wgrad"] == 53
    assert train["cudnn wgrad"] >= 35
    norms, blocks = 53, 16
    assert train["merge_tiles_kernel"] == ours + 2, "the stem's has many tiles"
    assert train["bn_stats_kernel"] == library
    assert train["merge_sums_kernel"] == 2 * blocks + blocks + 1
    assert train["fold_kernel"] <= train["conv_wgrad_kernel"] + 4, "and of tiles with sums"
    assert train["bn_act_bwd_apply_kernel"] == norms
    assert train["bn_act_fwd_kernel"] == blocks + 2 * 2 * blocks
    assert train["aten._foreach_copy_"] == train["update_running_kernel"] == blocks + 1
    assert not any(train[f"aten._foreach_{name}"] for name in ("add_", "div", "lerp_"))
    assert train["bn_finalize_kernel"] == 0 and train["bn_bwd_finalize_kernel"] == 1
    small = sum(
        count for name, count in train.items()
        if not name.startswith(("conv", "cudnn", "dgrad", "bn_act", "bn_stats", "max_pool"))
    )  # fmt: skip
    assert small <= 182
    copies = train["aten.clone"] + train["aten.copy_"]
    assert copies <= 6, "but for the biases of four projections no gradient is copied"
    for mode in ("infer", "one"):
        library = counts[mode]["cudnn fprop"]
        joined = 1 if mode == "infer" else 4
        assert counts[mode]["conv_affine_act_tma_kernel"] == 52 - library - joined
        assert counts[mode]["conv_affine_act_kernel"] == counts[mode]["bn_fold_kernel"] == 1
        assert counts[mode]["pad_pixels_kernel"] == 2
        assert sum(counts[mode].values()) == 56 + 3 + library - joined
        assert library == (3 if mode == "infer" else 0)
    assert distinct[0] > distinct[1] > 0


def test_operations_of_resnet50(launches):
    """Forward 4.09 G multiply-adds an image, backward twice that but for the image's gradient."""
    found, _ = launches
    forward = sum(count * work for name, count, work, _ in found["infer"])
    assert forward / 256 == pytest.approx(2 * 4.09e9, rel=0.02)  # 1.5% are padding of the stem
    step = sum(count * work for name, count, work, _ in found["train"])
    assert step == pytest.approx(3 * forward, rel=0.03)
    step, forward = (
        sum(count * work for _, count, work, _ in found[f"grouped {mode}"])
        for mode in ("train", "infer")
    )
    assert step == pytest.approx(3 * forward, rel=0.03), "a group's channels alone"
    moved = sum(count * size for _, count, _, size in found["train"]) / 256
    assert 255e6 < moved < 1.3 * 255e6  # the ideal schedule's and what is made again


def test_committed_estimates(launches):
    """Whole, called estimates, and of the launches that the package makes now."""
    files = sorted((ROOT / "bench" / "results" / "estimates").glob("*.json"))
    assert files
    for path in files:
        reports = {(one["mode"], one["batch"]): one for one in estimate.read(path)}
        for key, name in ((("train", 256), "train"), (("infer", 256), "infer"),
                          (("infer", 1), "one")):  # fmt: skip
            report = reports[key]
            assert report["what"] == "estimate, not a measurement" and not report["calibrated"]
            assert all(REQUIRED <= one.keys() for one in report["launches"])
            counts, now = Counter(), Counter()
            for one in report["launches"]:
                counts[one["kernel"]] += one["count"]
            for kernel, count, *_ in launches[0][name]:
                now[kernel] += count
            assert counts == now, f"{path.name}: renew it (CONTRIBUTING.md)"


def test_a_gpu_has_a_floor():
    assert Gpu("x", 1e12, 1e15).floor_us(2e6, 1e9) == 2.0
    assert Gpu("x", 1e12, 1e15).floor_us(1e6, 3e9) == 3.0


PERSISTENT = """
    S2R R0, SR_TID.X
.L_x_0:
    {before}
.L_x_1:
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
    IADD3 R1, R1, 1, RZ
    @P0 BRA `(.L_x_1)
    {after}
    @P1 BRA `(.L_x_0)
    EXIT
"""


def test_tile_of_a_persistent_kernel():
    """Its loop over steps, what follows per tile, and the pixels that two warp groups share."""
    some = "\n    ".join(["FADD R3, R3, R3"] * 20)
    peeled = "\n".join(["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24"] * 4)
    code = disassembly(PERSISTENT.format(before=some + "\n" + peeled, after=some))
    found = cutlass.tile_of("Pingpong", code)
    assert found == (64, 128, 6, 24 + 6 + 20 + 1 - 2 * 6)
    assert cutlass.tile_of("KernelCooperative", code)[:2] == (128, 128)
    with pytest.raises(ValueError, match=r"^Kernel: expected a loop of wgmma products"):
        cutlass.tile_of("Kernel", disassembly("EXIT"))


def test_table_of_native_tiles(monkeypatch, capsys):
    conv_cost = pytest.importorskip("resnet_fast.kernels.conv_cost")
    tiles = list(conv_cost.NATIVE_TILES)
    monkeypatch.setattr(cutlass, "compiled", lambda: tiles)
    monkeypatch.setattr(cutlass.shutil, "which", lambda name: name)
    monkeypatch.setattr(cutlass.cuda, "sources", lambda: ([], ""))
    assert main(["cutlass", "--batch", "64"]) == 0
    said = capsys.readouterr().out
    assert "ESTIMATE" in said and "256x128: 88 instructions a step, 1341 after" in said
    assert len(re.findall(r"^\dx\d/\d ", said, re.MULTILINE)) == 23
    tiles[0] = tiles[0]._replace(epilogue=int(1.2 * tiles[0].epilogue))
    assert main(["cutlass"]) == 1 and "NATIVE_TILES" in capsys.readouterr().err
    del tiles[0]
    assert main(["cutlass"]) == 1 and "NATIVE_TILES" in capsys.readouterr().err
    monkeypatch.setattr(cutlass.cuda, "sources", lambda: ([], "CUTLASS not found"))
    assert main(["cutlass"]) == 2 and "CUTLASS not found" in capsys.readouterr().err
