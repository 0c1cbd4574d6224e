"""Norms as other packages write them, and units of convolution, norm and activation."""

import torch
import torch.nn.functional as F
from torch import nn


class NormAct(nn.BatchNorm2d):
    """As timm writes it: a batch norm with a dropout, mostly the identity, and an activation."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4-D input")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        kept = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if kept else None,
            self.running_var if kept else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class Frozen(nn.Module):
    """As torchvision writes it: four buffers, an affine map in training too."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        mean = self.running_mean.reshape(1, -1, 1, 1)
        var = self.running_var.reshape(1, -1, 1, 1)
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class FrozenConstant(Frozen):
    """As DETR writes it: eps is a number of the forward."""

    def forward(self, x):
        eps = 1e-5
        scale = (self.weight * (self.running_var + eps).rsqrt()).view(1, -1, 1, 1)
        shift = self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale
        return x * scale + shift


class FrozenBranch(Frozen):
    """As detectron2 writes it: another spelling where x needs no gradient."""

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            scale, bias = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
            return x * scale.to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            training=False, eps=self.eps,
        )  # fmt: skip


class FrozenAct(Frozen):
    """A frozen norm with an activation."""

    def __init__(self, channels, act=nn.ReLU):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Unit(nn.Module):
    """A convolution and a norm that activates, as timm's ConvNormAct."""

    def __init__(self, channels, planes, kernel=1, stride=1, groups=1, act=nn.ReLU, norm=NormAct):
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(
            channels, planes, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn = norm(planes, act)
        self.aa = nn.Identity()

    def forward(self, x):
        return self.aa(self.bn(self.conv(x)))


class Ordered(nn.Module):
    """As mmcv's ConvModule: layers by an order of names, the norm under a name of its own."""

    def __init__(self, channels, planes, kernel=3, stride=1, act=True):
        super().__init__()
        self.order, self.activated = ("conv", "norm", "act"), act
        self.conv = nn.Conv2d(channels, planes, kernel, stride, kernel // 2, bias=False)
        self.norm_name = "bn"
        self.add_module(self.norm_name, nn.BatchNorm2d(planes))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.activated:
                x = self.activate(x)
        return x


class Functional(nn.Module):
    """As GoogLeNet's and Inception's convolutions: ReLU is a function."""

    def __init__(self, channels, planes, **conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, planes, bias=False, **conv)
        self.bn = nn.BatchNorm2d(planes, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def conv_norm(channels, planes, kernel=3, stride=1, groups=1, act=nn.ReLU, dilation=1):
    """The layers of conv, BatchNorm2d and, unless `act` is None, an activation."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(
        channels, planes, kernel, stride, padding, dilation, groups=groups, bias=False
    )
    layers = [conv, nn.BatchNorm2d(planes)]
    return layers if act is None else [*layers, act(inplace=True)]
