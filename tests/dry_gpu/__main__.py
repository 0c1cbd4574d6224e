"""`python -m dry_gpu COMMAND ...`: `python -m bench COMMAND ...` on the dry GPU."""

import sys

import dry_gpu
from bench.__main__ import main

dry_gpu.install()
sys.exit(main(sys.argv[1:]))
