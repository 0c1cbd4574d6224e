"""`python -m resnet_fast`: the command line of `resnet_fast.cli`."""

import sys

from .cli import main

sys.exit(main())
