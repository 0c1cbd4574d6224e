"""`python -m dry_gpu COMMAND ...`: `python -m bench COMMAND ...` on the dry GPU.

`gpu` has the clock's estimates where times would stand; `host` times the host, which is real.
"""

import sys

from bench import gpu
from bench.__main__ import main
from dry_gpu import untimed

gpu.PRELOAD += (untimed.__name__,)  # in the processes of its stages too
sys.exit(main(sys.argv[1:]))
