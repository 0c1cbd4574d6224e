"""resnet_fast: fused residual networks for PyTorch."""

__version__ = "0.1.0"

from .cuda_graphs import graph, graph_step
from .dispatch import flops
from .dispatch.backends import empty_cache
from .functional import add_relu, bn_act, conv_bn_act
from .fusion.api import explain, fuse, unfuse
from .models import ResNet, create_model, list_models
from .modules import BasicBlock, Bottleneck, ConvBNAct2d, PreActBasicBlock, PreActBottleneck
from .runtime import cpu_info

cpu_info.keep_onednn_from_unusable_amx()
flops.register_once_imported()

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ConvBNAct2d",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResNet",
    "add_relu",
    "bn_act",
    "conv_bn_act",
    "create_model",
    "empty_cache",
    "explain",
    "fuse",
    "graph",
    "graph_step",
    "list_models",
    "unfuse",
]
