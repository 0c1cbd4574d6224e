"""Benchmarks of resnet_fast: `python -m bench models|table|…`, and `pytest bench/ops.py`."""

import os

# bench.memory profiles every provider, and Kineto would log each profile to stderr. Kineto reads
# its log level only once, when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
