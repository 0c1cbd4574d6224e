"""`python -m dry_gpu COMMAND ...`: `python -m bench COMMAND ...` on the dry GPU."""

import sys

import dry_gpu
from bench import host
from bench.__main__ import main


def launches(run):
    """As `bench.host.launches`, by the runtime's count: there is nothing that a profiler sees."""
    before = dry_gpu.runtime().dry_launches()
    run()
    return dry_gpu.runtime().dry_launches() - before


dry_gpu.install()
host.launches = launches
sys.exit(main(sys.argv[1:]))
