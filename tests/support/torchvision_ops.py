"""Lets torchvision import beside a torch whose build its extension does not load with.

torchvision from PyPI is built for CUDA. Beside a CPU build of torch its extension does not load and
its import stops at the first op that the extension would have defined; lightning and timm, which
import it, stop there too. Nothing here calls those ops, so names without kernels are enough.

`python torchvision_ops.py SCRIPT [ARGUMENT ...]` runs a script after that.
"""

import importlib.util
import runpy
import sys

import torch

OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
defined = []  # a library that is freed takes its ops along


def why_not(name):
    """Why the package `name` cannot be imported here, or None."""
    define()
    try:
        importlib.import_module(name)
    except Exception as error:  # absent, or made for another torch
        return f"{name}: {type(error).__name__}: {error}"
    return None


def define():
    """Name torchvision's ops, unless its own extension has or torchvision is not installed."""
    if defined or "torchvision" in sys.modules or not importlib.util.find_spec("torchvision"):
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        defined.append(torch.library.Library("torchvision", "FRAGMENT"))
        for op, schema in OPS.items():
            if not hasattr(torch.ops.torchvision, op):
                defined[0].define(op + schema)


if __name__ == "__main__":
    define()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
