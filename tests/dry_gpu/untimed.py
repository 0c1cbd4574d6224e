"""`bench` on the dry GPU, from when this module is imported: no times, no comparisons of values.

Every call is made and every graph is recorded, but nothing is computed and nothing takes the time
that a GPU would. So times are NaN, null in the rows, comparisons look at shapes, and the device of
every row is "... (dry)".
"""

import math
import os

import torch

import dry_gpu
from bench import ceilings, gate, host, layers, passes, profile, timing
from dry_gpu import plugin
from resnet_fast.spec import tolerance


def launches(run):
    """As `bench.host.launches`, by the runtime's count: there is nothing that a profiler sees."""
    before = dry_gpu.runtime().dry_launches()
    run()
    return dry_gpu.runtime().dry_launches() - before


def recorded(run, replays=profile.REPLAYS):
    """As `bench.profile.recorded`, by the runtime's count: a graph's launches have no names."""
    count = launches(lambda: [run(i) for i in range(replays)])
    return [{"name": "a launch", "ts": 0.0, "dur": math.nan}] * count


def interleave(steps, **options):
    """As `bench.timing.interleave`, one round."""
    for run in steps.values():
        run(0)
    return {name: [math.nan] for name in steps}


def untimed(function):
    """`function` with NaN in place of the milliseconds that it gives."""

    def run(*args, **options):
        found = function(*args, **options)
        return [math.nan] * len(found) if isinstance(found, list) else math.nan

    return run


def relative(value, expected):
    """As `bench.gate.relative`, by shapes."""
    return 0.0 if value is not None and value.shape == expected.shape else math.inf


def gate_of_pass(run, impl):
    """As `bench.passes.gate`, without a comparison."""
    for name in (impl, "reference"):
        run(name)


os.environ["TORCHINDUCTOR_SIZE_ASSERTS"] = "0"  # the stand-in for cuDNN has layouts of its own
dry_gpu.install()
host.launches, profile.recorded, timing.interleave = launches, recorded, interleave
ceilings.sample_ms = untimed(ceilings.sample_ms)
ceilings.small_launch_us = untimed(ceilings.small_launch_us)
tolerance.compare, torch.equal = plugin.compare, plugin.equal
gate.relative, passes.gate, layers.difference = relative, gate_of_pass, lambda *_: 0.0
gate.Check.ok = property(lambda check: check.kind == "loss" or check.error == 0)
