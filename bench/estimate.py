"""`python -m bench estimate`: estimated GPU time of each launch of a model's step, without a GPU.

An estimate, not a measurement: it ranks kernels and kernel changes when no GPU is available.
`bench.launches` lists the launches by the package's launchers, `bench.compile` compiles them, and
`bench.sass` reads their SASS. For a launch of P programs

    time = max(bytes / bandwidth, bytes through L2 / its bandwidth, FLOP / rate, T / clock) + gap

and at least that of a small launch. T is the cycles of the busiest multiprocessor, which runs
n = ceil(P / multiprocessors) programs, o of them at a time (by registers, shared memory, threads):

    T = max(n · busiest pipe of a program, ceil(n / o) · one program alone)
    one program alone = first load + before + trips · loop + tiles · ends + dependent load + after

where `tiles · ends` is the end of each tile of a kernel that walks several in one loop. Where the
last program of a launch merges what all have stored, its arrival, loads and instructions come on
top, once.

A section takes the time of its busiest pipe: issue (one warp instruction per cycle and scheduler),
MIO (shuffles and shared memory, one instruction of any width per cycle), LSU (global memory) or the
tensor cores. In a program alone it takes at least `warp_cycles` per instruction of a warp, because
an instruction waits for those before it. In a loop that waits for its matrix products, instructions
that are not issued while they run add to their time. A loop whose loads are not asynchronous waits
for a load in every trip. With o = 1 the prologue and the epilogue of every tile are exposed
("latency"); with more they overlap with other programs. A launch's floor is the larger of memory
and FLOP, with every tensor moved once. Bytes through L2 are the tiles that all programs of a
convolution load, and what they store. cuDNN's convolutions take what `conv_cost` says, any other
PyTorch kernel its floor. Not modelled: bank conflicts, barriers and cold instruction caches.
"Small" launches are passes and PyTorch kernels that move less than L2 holds.

`warp_cycles` and L2's bandwidth are fitted to 24 convolutions of ResNet-50 as an H200 ran them
(bench/results/nvidia-h200-layers.jsonl, inference by the kernels of 097c104). The estimates of
those are within 28% of what was measured, 12% in root mean square; their sum is 2% low.

Source: Williams, Waterman & Patterson 2009, "Roofline", CACM 52(4). `GPUS` gives the sources of its
numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import rows
from bench.compile import Compiled, add_case_arguments, cases, compile_launches, hopper
from bench.launches import Launch, launches_of, tensors_in
from bench.sass import Sass, Section
from bench.step import Case

SCHEDULERS = 4  # per multiprocessor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Gpu:
    """Parameters of a GPU. Rates are per second; latencies and launch times are in µs.

    shared: bytes per multiprocessor; each program takes 1 KiB more than it requests. warp_cycles:
    mean cycles from an instruction of a warp to its next. meeting_us: from the sums of a part in L2
    to the atomic counter that says whether it is the last.
    calibrated: the card whose measured ceilings these are; empty for those of `GPUS`.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    multiprocessors: int = 132
    clock: float = 1.755e9
    registers: int = 65536
    shared: int = 228 << 10
    threads: int = 2048
    programs: int = 32
    l2: int = 50 << 20
    l2_bytes_per_s: float = 7e12
    warp_cycles: float = 4.4
    meeting_us: float = 1.2
    first_load_us: float = 1.0
    load_us: float = 0.8
    l2_load_us: float = 0.3
    gap_us: float = 1.0
    small_us: float = 2.5
    calibrated: str = ""

    def floor_us(self, moved: float, flops: float) -> float:
        """Minimum time of a launch that moves `moved` bytes and does `flops` operations."""
        return 1e6 * max(moved / self.bytes_per_s, flops / self.flops_per_s)

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs of `warps` warps that a multiprocessor runs at a time."""
        a_warp = max(256, cdiv(32 * registers, 256) * 256)
        by_registers = self.registers // SCHEDULERS // a_warp * SCHEDULERS // warps
        by_shared = self.shared // (shared + 1024)
        return max(1, min(by_registers, by_shared, self.threads // (32 * warps), self.programs))


# H200: what a copy reaches of the data sheet's 4.8 TB/s, and a 16-bit matmul of its 989 TFLOP/s.
# H100 SXM: the same share of its 3.35 TB/s. Clock: boost under load. Multiprocessor limits: CUDA
# programming guide, compute capability 9.0. Latencies on Hopper, rounded: first TMA load, load from
# memory, load from L2 (for a launch that moves less than L2 holds). A small launch in a CUDA graph:
# 2 to 2.5 µs. `--calibrate` replaces the values that `bench ceilings` measures.
GPUS = {
    "h200": Gpu("h200", 4.3e12, 790e12),
    "h100": Gpu("h100", 3.0e12, 790e12),
}


def _gemm_steps(a: Mapping[str, Any]) -> int:
    return cdiv(a["R"] * a["S"] * a["c_tiles"], a["SPLIT"])


def _source_steps(a: Mapping[str, Any]) -> int:
    """Steps of the projection in a convolution's launch; 0 without one."""
    return 0 if a.get("source") is None else cdiv(a["source_tiles"], a["SPLIT"])


def _pointer_steps(a: Mapping[str, Any]) -> int:
    if a["FLAT_CHANNELS"]:
        return cdiv(a["R"] * a["S"] * a["FLAT_CHANNELS"], a["BLOCK_K"])
    return cdiv(a["R"] * a["S"] * cdiv(a["channels"], a["BLOCK_K"]), a["SPLIT"])


def _dgrad_steps(a: Mapping[str, Any]) -> int:
    taps = cdiv(a["R"], a["STRIDE"]) * cdiv(a["S"], a["STRIDE"])
    if a["STRIDE"] == 2:  # the mean over the four parities
        taps = a["R"] * a["S"] / 4
    return math.ceil(taps * a["k_tiles"])


# Trips of the main loop from the kernel's parameters; kernels not listed have no loop.
TRIPS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "conv_affine_act_tma_kernel": _gemm_steps,
    "conv_moments_kernel": lambda a: a["boxes_per_program"] * a["R"] * a["S"] * a["c_tiles"],
    "conv_affine_act_kernel": _pointer_steps,
    "conv_dgrad_kernel": _dgrad_steps,
    "conv_wgrad_kernel": lambda a: a["boxes_per_split"],
    "bn_stats_kernel": lambda a: cdiv(a["tiles_per_split"], a["AT_ONCE"]),
    "bn_act_bwd_reduce_kernel": lambda a: cdiv(a["tiles_per_split"], a["AT_ONCE"]),
    "dgrad_epilogue_kernel": lambda a: cdiv(a["tiles_per_split"], a["AT_ONCE"]),
    "max_pool_bwd_kernel": lambda a: a["tiles_per_split"],
    "bn_relu_max_pool_kernel": lambda a: cdiv(a["R"] * a["S"], a["AT_ONCE"]),
    "global_avg_pool_kernel": lambda a: cdiv(a["pixels"], a["BLOCK_P"]),
    "image_stats_kernel": lambda a: cdiv(a["pixels"], a["BLOCK_P"]),
    "gated_act_bwd_reduce_kernel": lambda a: cdiv(a["pixels"], a["BLOCK_P"]),
    "merge_sums_kernel": lambda a: cdiv(a["splits"], a["BLOCK_S"]),
    "merge_tiles_kernel": lambda a: cdiv(min(a["tiles"], a["tiles_per_split"]), a["BLOCK_S"]),
    "fold_kernel": lambda a: cdiv(min(a["count"], a["per_fold"]), a["BLOCK_S"]),
}

# Trips of the loop in which the last program to arrive merges what all have stored.
MERGES: dict[str, Callable[[Mapping[str, Any], int], int]] = {
    "bn_stats_kernel": lambda a, splits: cdiv(splits, a["MERGED"] * a["BLOCK_S"]),
}


def moved(one: Launch) -> int:
    """Bytes of a launch: each tensor once. A 1x1 filter with stride 2 reads one pixel of four."""
    total = sum(_bytes(t) for t in one.tensors)
    a = one.arguments
    strided = []
    strides = "conv_affine_act_tma_kernel", "conv_moments_kernel", "conv_wgrad_kernel"
    if one.name in strides and a["STRIDE"] == 2:
        if a["R"] == a["S"] == 1:
            strided.append(a["x"])
    if _source_steps(a) and a["SOURCE_STRIDE"] == 2:
        strided.append(a["source"])
    return total - sum(_bytes(t) * 3 // 4 for t in tensors_in(strided))


def _bytes(t: torch.Tensor) -> int:
    """Bytes of t; of a view that overlaps itself, those from its first to its last element."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return min(t.numel(), max(reach, 0)) * t.element_size()


def flops(one: Launch) -> int:
    """Floating-point operations of a convolution, 2 per multiply-add; 0 for other kernels."""
    a = one.arguments
    if one.kernel is None:
        return one.flops
    if not one.name.startswith("conv"):
        return 0
    results = tensors_in([a.get("y", a.get("dy"))])[0].numel()
    depth = a["R"] * a["S"] * a["channels"] + (a["source_channels"] if _source_steps(a) else 0)
    return 2 * results * depth


def through_l2(one: Launch, trips: int) -> int:
    """Bytes that the programs of a convolution load in `trips` trips, and other tensors once.

    A trip loads a tile of both operands; those of a gradient have a tile of dy and one of z. What
    of a tile is beyond the channels or filters is not loaded.
    """
    a = one.arguments
    if one.kernel is None or not one.name.startswith("conv"):
        return moved(one)
    box = math.prod(a[f"BOX_{side}"] for side in "NPQ") if "BOX_N" in a else a["BLOCK_M"]
    channels, filters = a["channels"], a["filters"]
    rows, columns, depth = box, min(a["BLOCK_N"], filters), min(a.get("BLOCK_K", box), channels)
    if one.name == "conv_dgrad_kernel":
        columns, depth = min(a["BLOCK_N"], channels), min(a["BLOCK_K"], filters)
    elif one.name == "conv_wgrad_kernel":
        rows, columns, depth = min(a["BLOCK_M"], filters), min(a["BLOCK_N"], channels), box
    operands = {"conv_dgrad_kernel": ("dy", "z", "w"), "conv_wgrad_kernel": ("dy", "z", "x")}
    names = operands.get(one.name, ("x", "w", "source", "source_w"))
    x = getattr(a[names[0]], "base", a[names[0]])
    inputs = 2 if "z" in names and a.get("z") is not None else 1
    tile = (rows * inputs + columns) * depth
    others = [t for name, t in a.items() if name not in names and t is not None]
    rest = sum(t.numel() * t.element_size() for t in tensors_in(others))
    return math.prod(one.grid) * trips * tile * x.element_size() + rest


@dataclass(frozen=True)
class Cycles:
    """Cycles of one program on a multiprocessor: those of its busiest pipe, and its time alone."""

    busiest: float
    alone: float
    pipe: str


def program(
    code: Compiled, warps: int, trips: int, load_us: float, gpu: Gpu, first: int = 0, tiles: int = 0
) -> Cycles:
    """Cycles of a kernel with `trips` loop trips; load_us is the latency of a dependent load.

    first: trips of the loop before it. tiles: how many the loop walks.
    """
    s, share = code.sass, warps / SCHEDULERS
    pace = max(share, gpu.warp_cycles)  # cycles per instruction of a program alone

    def pipes(section: Section) -> dict[str, float]:
        return {
            "issue": section.issue * share,
            "MIO": section.mio * warps,
            "LSU": section.lsu * warps,
            "tensor": section.tensor * share,
        }

    before, loop, after, sooner, tile = map(pipes, (s.before, s.loop, s.after, s.first, s.tile))
    total = {
        name: before[name] + first * sooner[name] + trips * loop[name] + after[name]
        + tiles * tile[name]
        for name in loop
    }  # fmt: skip
    pipe = max(total, key=total.__getitem__)
    trip = max(*loop.values(), s.loop.issue * pace)
    if s.waits:
        exposed = (s.loop.issue - s.hidden) * pace
        trip = max(exposed + max(loop["tensor"], s.hidden * pace), loop["MIO"], loop["LSU"])
    if s.loop.lsu and not s.pipelined:
        trip += load_us * 1e-6 * gpu.clock
    meets = any(name.startswith("ATOM") for name in s.after.opcodes)
    latency = gpu.first_load_us + load_us * s.loads_after + gpu.meeting_us * meets
    ends = max(*before.values(), s.before.issue * pace) + max(*after.values(), s.after.issue * pace)
    ends += first * max(*sooner.values(), s.first.issue * pace)
    ends += tiles * max(*tile.values(), s.tile.issue * pace)
    alone = latency * 1e-6 * gpu.clock + ends + trips * trip
    return Cycles(total[pipe], alone, pipe)


def last_us(s: Sass, warps: int, trips: int, gpu: Gpu) -> float:
    """Time from the partial results of the last program to the end of a launch that it merges.

    Its loads are from L2: those of every trip, and channel vectors.
    """
    pace = max(warps / SCHEDULERS, gpu.warp_cycles)
    cycles = s.last.issue * pace + trips * max(s.merge.issue * pace, s.merge.lsu * warps)
    return gpu.meeting_us + (trips + 1) * gpu.l2_load_us + 1e6 * cycles / gpu.clock


def one_branch(code: Sass, branches: int) -> Sass:
    """Straight code of equal branches as a program runs it: one of them, and a test for each."""
    after = code.after
    lsu, mio = (math.ceil(count / branches) for count in (after.lsu, after.mio))
    issue = math.ceil(after.issue / branches) + 2 * branches
    return replace(code, after=replace(after, issue=issue, mio=mio, lsu=lsu))


def entry(one: Launch, code: Compiled | None, mode: str, gpu: Gpu) -> dict[str, Any]:
    """The row of a launch: its shape, its code and its estimated time."""
    from resnet_fast.kernels import conv_cost

    size, work = moved(one), flops(one)
    floor = gpu.floor_us(size, work)
    found: dict[str, Any] = {
        "kernel": one.name, "count": one.count, "grid": list(one.grid), "family": family(one, mode),
        "registers": None, "spilled_bytes": None, "shared_bytes": None, "programs_per_sm": None,
        "mb": size / 1e6, "gflop": work / 1e9, "floor_us": floor,
    }  # fmt: skip
    time, bound = floor, "memory" if floor > gpu.floor_us(0, work) else "compute"
    if one.name.startswith("cudnn "):
        kind = one.name.removeprefix("cudnn ")
        filters, channels, *_ = one.tensors[1].shape  # of x, w, y
        columns = {"fprop": filters, "wgrad": min(filters, channels)}.get(kind, channels)
        time = conv_cost.by_library(size, work, columns, channels, kind)
    if code is not None:
        if code.failure:
            raise RuntimeError(f"{one.name} {code.config}: {code.failure}")
        warps = one.options.get("num_warps", 4)
        trips = TRIPS[one.name](one.arguments) if one.name in TRIPS else 1
        beside, first = _source_steps(one.arguments), 0
        steps = trips + beside
        if code.sass.first.issue:
            first = beside
        elif beside and trips == 1:  # one step is straight code, so the loop is the projection's
            trips = beside
        if code.sass.loop.issue and one.name not in TRIPS:
            raise RuntimeError(f"{one.name}: its loop has no entry in bench.estimate.TRIPS")
        programs = math.prod(one.grid)
        resident = gpu.resident(code.registers, code.shared, warps)
        each, at_once = cdiv(programs, gpu.multiprocessors), gpu.multiprocessors * resident
        load_us = gpu.load_us if size > gpu.l2 else gpu.l2_load_us
        if isinstance(one.arguments.get("channels"), tuple):  # a program runs its norm's branch
            code = replace(code, sass=one_branch(code.sass, len(one.arguments["channels"])))
        merges = MERGES[one.name](one.arguments, one.grid[0]) if one.name in MERGES else 0
        last = last_us(code.sass, warps, merges, gpu) if merges else 0.0
        if merges:
            after = code.sass.after - code.sass.last - code.sass.merge
            code = replace(code, sass=replace(code.sass, after=after))
        tiles = one.arguments.get("boxes_per_program", 0)
        cycles = program(code, warps, trips, load_us, gpu, first, tiles)
        if beside:  # the first load of the second product
            cycles = replace(cycles, alone=cycles.alone + load_us * 1e-6 * gpu.clock)
        busy, alone = each * cycles.busiest, cdiv(each, resident) * cycles.alone
        took = 1e6 * max(busy, alone) / gpu.clock
        if took > time:
            time, bound = took, cycles.pipe if busy >= alone else "latency"
        found["l2_mb"] = through_l2(one, steps) / 1e6
        if found["l2_mb"] / gpu.l2_bytes_per_s * 1e12 > time:
            time, bound = found["l2_mb"] / gpu.l2_bytes_per_s * 1e12, "L2"
        time += last
        found |= {
            "config": code.config, "warps": warps,
            "registers": code.registers, "spilled_bytes": code.local, "shared_bytes": code.shared,
            "programs_per_sm": resident, "waves": programs / at_once,
            "last_wave_idle": 1 - programs / (at_once * cdiv(programs, at_once)),
            "trips": trips, "waits": code.sass.waits, "program_us": 1e6 * cycles.alone / gpu.clock,
            "before": code.sass.before.pipes, "loop": code.sass.loop.pipes,
            "after": code.sass.after.pipes, "last_us": last,
        }  # fmt: skip
    if time + gpu.gap_us < gpu.small_us:
        bound = "launch"
    if found["family"] in ("pass", "library") and size < gpu.l2:
        found["family"] = "small"
    found["estimate_us"], found["bound"] = max(time + gpu.gap_us, gpu.small_us), bound
    return found


def family(one: Launch, mode: str) -> str:
    """The group in which a launch is summed: a pass of training, or a kind of convolution."""
    a = one.arguments
    if one.kernel is None:
        return "library"
    if one.name in ("conv_dgrad_kernel", "conv_wgrad_kernel"):
        return one.name[len("conv_") : -len("_kernel")]
    if not one.name.startswith("conv"):
        return "pass"
    if mode == "train":
        return "fprop"
    filters = f"{a['R']}x{a['S']}"
    if _source_steps(a):
        return f"{filters} + projection"
    return filters if a["residual"] is None else f"{filters} + residual"


def estimate(
    case: Case,
    gpu: str | Gpu = "h200",
    jobs: int = 1,
    compiled: Iterable[Compiled] | None = None,
    target: Any = None,
) -> dict[str, Any]:
    """The estimate of one step: totals, and a row per distinct launch, slowest first.

    compiled: results of `compile_launches` for these launches, if already available. target: the
    GPU target; by default a Hopper with the plans and tiles of the rules, because the model has no
    times for cuDNN, which a tuning table may prefer.

    Raises:
        RuntimeError: A kernel does not compile or spills, or its loop has no entry in TRIPS.
        KeyError: The GPU is unknown. Also the errors of `launches_of`.
    """
    import triton

    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    target = hopper() if target is None else target
    launches = launches_of(case, target)
    found = compile_launches(launches, target, jobs) if compiled is None else compiled
    codes = {one.code: one for one in found}
    entries = [
        entry(one, codes[one.code] if one.kernel else None, case.mode, gpu) for one in launches
    ]
    entries.sort(key=lambda one: -one["count"] * one["estimate_us"])
    total = sum(one["count"] * one["estimate_us"] for one in entries) / 1e3
    return {
        "model": case.model, "mode": case.mode, "batch": case.batch, "dtype": case.dtype,
        "image_size": case.image_size, "gpu": gpu.name, "calibrated": gpu.calibrated,
        "what": "estimate, not a measurement",
        "triton": triton.__version__, "git_sha": rows.git_sha(), "total_ms": total,
        "floor_ms": sum(one["count"] * one["floor_us"] for one in entries) / 1e3,
        "images_per_s": 1e3 * case.batch / total,
        "launches": [{k: _rounded(v) for k, v in one.items()} for one in entries],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def families(report: Mapping[str, Any]) -> dict[str, tuple[int, float, float]]:
    """Launches, milliseconds and floor of each family of kernels, slowest first."""
    found: dict[str, tuple[int, float, float]] = {}
    for one in report["launches"]:
        n, ms, floor = found.get(one["family"], (0, 0.0, 0.0))
        count = one["count"]
        ms, floor = ms + count * one["estimate_us"] / 1e3, floor + count * one["floor_us"] / 1e3
        found[one["family"]] = n + count, ms, floor
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def title(report: Mapping[str, Any]) -> str:
    """The case of a report, and its totals."""
    return (
        f"{report['model']} {report['mode']} {report['dtype']} batch {report['batch']} on "
        f"{report['calibrated'] or report['gpu']}, ESTIMATE: {report['total_ms']:.2f} ms, "
        f"{report['images_per_s']:,.0f} "
        f"images/s, floor {report['floor_ms']:.2f} ms (Triton {report['triton']})"
    )


def text(report: Mapping[str, Any]) -> str:
    """One line per launch, slowest first; then the loss of each family against its floor."""
    lines = [
        title(report),
        f"{'kernel':20} {'n':>3} {'programs':>9} {'tile':31} {'regs':>4} {'KiB':>5} {'/SM':>3} "
        f"{'waves':>6} {'idle':>4} {'trips':>5} {'before+loop+after':>17} {'MIO':>14} {'wait':4} "
        f"{'MB':>6} {'GFLOP':>6} {'us':>7} {'floor':>7} {'share':>5} bound",
    ]
    lines += [line(one) for one in report["launches"] if one["family"] != "small"]
    lines += ["", "small launches, summed by kernel"]
    small: dict[str, tuple[int, float]] = {}
    for one in report["launches"]:
        if one["family"] == "small":
            n, us = small.get(one["kernel"], (0, 0.0))
            small[one["kernel"]] = n + one["count"], us + one["count"] * one["estimate_us"]
    for name, (n, us) in sorted(small.items(), key=lambda item: -item[1][1]):
        lines.append(f"{name.removesuffix('_kernel'):28} {n:3d} {us:8.1f} us")
    head = f"{'family':14} {'launches':>8} {'ms':>7} {'floor':>7} {'lost':>7} {'share':>5}"
    lines += ["", f"ESTIMATE by family\n{head}"]
    for name, (count, ms, floor) in families(report).items():
        lines.append(
            f"{name:14} {count:8d} {ms:7.2f} {floor:7.2f} {ms - floor:7.2f} {floor / ms:5.0%}"
        )
    return "\n".join(lines)


def line(one: Mapping[str, Any]) -> str:
    """A launch in the table."""
    code = ""
    if one["registers"] is not None:
        sections = [one[name] for name in ("before", "loop", "after")]
        parts = "+".join(str(sum(s.values()) - s["barriers"]) for s in sections)
        mio = "+".join(str(s["mio"]) for s in sections)
        code = (
            f"{math.prod(one['grid']):9d} {one['config'][:31]:31} {one['registers']:4d} "
            f"{one['shared_bytes'] / 1024:5.0f} {one['programs_per_sm']:3d} {one['waves']:6.1f} "
            f"{one['last_wave_idle']:4.0%} {one['trips']:5d} {parts:>17} {mio:>14} "
            f"{'yes' if one['waits'] else ''}"
        )
    return (
        f"{one['kernel'].removesuffix('_kernel')[:20]:20} {one['count']:3d} {code:108} "
        f"{one['mb']:6.0f} {one['gflop']:6.0f} {one['estimate_us']:7.1f} {one['floor_us']:7.1f} "
        f"{one['floor_us'] / one['estimate_us']:5.0%} {one['bound']}"
    )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Old and new total, families, and launches whose sum changed by more than 1%."""
    lines = [
        f"ESTIMATE {old['total_ms']:.2f} -> {new['total_ms']:.2f} ms "
        f"({old['total_ms'] / new['total_ms']:.3f}x)"
    ]
    before, after = families(old), families(new)
    for name in dict.fromkeys((*before, *after)):
        (n, a, _), (m, b, _) = (side.get(name, (0, 0.0, 0.0)) for side in (before, after))
        lines.append(f"{name:10} {n:4d} -> {m:4d} launches {a:8.2f} -> {b:8.2f} ms")
    sums = [
        {_name(one): one["count"] * one["estimate_us"] for one in side["launches"]}
        for side in (old, new)
    ]
    every = dict.fromkeys((*sums[0], *sums[1]))
    changed = [(name, *(side.get(name, 0.0) for side in sums)) for name in every]
    for name, a, b in sorted(changed, key=lambda item: -abs(item[1] - item[2])):
        if abs(a - b) > 0.01 * max(a, b):
            lines.append(f"  {name:60} {a:8.1f} -> {b:8.1f} us")
    return "\n".join(lines)


def _name(one: Mapping[str, Any]) -> str:
    grid = "x".join(map(str, one["grid"]))
    return f"{one['kernel']} {grid} {one.get('config', '')} {one['mb']:.4g} MB"


def calibrated(gpu: Gpu, found: Iterable[rows.Row]) -> Gpu:
    """`gpu` with the newest measured ceilings instead of those of `GPUS`.

    They are the values of a `bench ceilings` row of a GPU in 16 bits: bytes/s of the copy, FLOP/s
    of the matmul, time of a small launch. Raises ValueError without such a row.
    """
    kind = "ceilings", "cuda"
    own = [row for row in found if (row["benchmark"], row["device"]) == kind]
    own = [row for row in own if row["dtype"] in ("bf16", "fp16") and row["gb_per_s"]]
    if not own:
        raise ValueError(
            "--calibrate: expected a row of `bench ceilings` of a GPU in bf16 or fp16, found none"
        )
    newest = max(own, key=lambda row: row["date"])
    return replace(
        gpu, calibrated=newest["cpu_or_gpu"], bytes_per_s=1e9 * newest["gb_per_s"],
        flops_per_s=1e12 * newest["tflop_per_s"],
        small_us=newest.get("launch_us") or gpu.small_us,
    )  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The reports in a file that `--json` wrote. Raises ValueError for any other file."""
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON that bench estimate wrote: {error}") from None
    whole = isinstance(found, list) and all(
        isinstance(one, dict) and {"model", "mode", "batch", "launches"} <= one.keys()
        for one in found
    )
    if not whole:
        raise ValueError(f"{path}: expected a list of estimates, as written by --json")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m bench estimate`."""
    add_case_arguments(parser)
    add = parser.add_argument
    add("--gpu", choices=list(GPUS), default="h200", help="default: h200")
    add("--json", type=Path, metavar="FILE", help="also write the estimates to this file")
    add("--compare", type=Path, metavar="OLD.json", help="show changes since an earlier --json")
    add("--calibrate", type=Path, metavar="ROWS.jsonl",
        help="use bandwidth, rate and launch time measured by `bench ceilings`")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Estimate and print; 1 if a kernel has no estimate, 2 for a bad argument."""
    gpu = GPUS[args.gpu]
    try:
        if args.calibrate is not None:
            gpu = calibrated(gpu, rows.read([args.calibrate]))
        old = [] if args.compare is None else read(args.compare)
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 2
    reports, status = [], 0
    for case in cases(args):
        try:
            report = estimate(case, gpu, args.jobs)
        except (ImportError, ValueError) as error:
            print(f"estimate: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            print(f"estimate: {case}: {error}", file=sys.stderr)
            status = 1
            continue
        reports.append(report)
        before = next((one for one in old if _of(one) == _of(report)), None)
        print(text(report) if before is None else f"{title(report)}\n{compare(before, report)}")
        print(flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(_lines(reports))
    return status


def _of(report: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(report[name] for name in ("model", "mode", "batch", "dtype", "gpu"))


def _lines(reports: Sequence[Mapping[str, Any]]) -> str:
    """The reports as JSON, one line per launch, so that a diff shows changes."""
    parts = []
    for report in reports:
        head = json.dumps({k: v for k, v in report.items() if k != "launches"}, indent=1)
        launches = ",\n  ".join(json.dumps(one) for one in report["launches"])
        parts.append(f'{head[:-2]},\n "launches": [\n  {launches}\n ]\n}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"
