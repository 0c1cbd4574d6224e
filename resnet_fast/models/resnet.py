"""`ResNet`: every residual network of resnet_fast as one class.

    stem      conv1, bn1, ReLU, max-pool (fused)
    stages    layer1 … : blocks of one class; each stage halves the image and doubles the planes
    head      pre-activation: bn_last, ReLU (fused); global average pool, fc

Children have torchvision's names and order, so state dicts load in both directions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..blocks import ResidualBlock
from ..dispatch.guard import fusible, hooked, refusal
from ..dispatch.native_inference import Everything, infer_again
from ..modules import PLAIN, Fused, GlobalAvgPool2d, run_fused, run_inference
from ..spec.checks import check_impl, check_keep
from ..spec.layers import Parts
from ..spec.values import check_callable, check_flag, check_list, integer
from .copies import copy_modules

STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """Residual network: logits [N, num_classes] of images x [N, in_channels, H, W].

    Convolutions are initialized from N(0, 2 / fan_out) (He initialization, arXiv:1502.01852),
    BatchNorms with weight 1 and bias 0, fc as `nn.Linear`: for the same seed, the parameters equal
    torchvision's.

    A net of pre-activation blocks follows He et al. 2016 (arXiv:1603.05027, appendix). The stem's
    activation is also that of the first block, so `layer1[0].bn1` is None. Another activation
    (`bn_last`, ReLU) follows the last addition.

    Args:
        block: `resnet_fast.BasicBlock`, `Bottleneck`, `PreActBasicBlock` or `PreActBottleneck`.
        layers: number of blocks in each stage.
        num_classes: outputs of fc.
        zero_init_residual: True initializes every residual branch to zero, so a block starts as its
            shortcut (arXiv:1706.02677, section 5.1): the weight of the last BatchNorm is 0. In a
            pre-activation block it is the weight of the last convolution, because a zero BatchNorm
            before a ReLU would block the gradient.
        groups: groups of the 3×3 convolutions of bottlenecks (ResNeXt).
        width_per_group: width of a bottleneck's group per 64 planes (ResNeXt, Wide ResNet).
        replace_stride_with_dilation: one flag per stage after the first: dilate instead of stride.
        norm_layer: function of a channel count that returns an `nn.BatchNorm2d` or
            `nn.SyncBatchNorm`; None is `nn.BatchNorm2d`.
        shortcut: None (projections where shapes change: option B of He et al. 2015, section 3.3),
            "zero_pad" (option A), "projection" (everywhere: option C), or "none" (a plain net).
        stem: "imagenet" (7×7 convolution of stride 2, 3×3 max-pool of stride 2) or "cifar" (3×3
            convolution, no pooling).
        planes: channels of the stem, and planes of the first stage.
        in_channels: channels of x.
        impl: "auto", "reference", "native" or "triton", for every fused part.
        keep_activations: True stores activations for the backward pass, False recomputes them,
            "auto" is True on a GPU.
        fused: False builds the plain PyTorch model with the same parameters and state dict.

    Attributes:
        fused: Whether stem and head run fused. The class of each block decides for itself.
        impl: Implementation of stem and head.
        keep_activations: The argument, for stem and head.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """

    def __init__(
        self,
        block: type[ResidualBlock],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        shortcut: str | None = None,
        stem: str = "imagenet",
        planes: int = 64,
        in_channels: int = 3,
        impl: str = "auto",
        keep_activations: bool | str = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        flags = replace_stride_with_dilation or []
        check_list(layers, "layers")
        check_list(flags, "replace_stride_with_dilation")
        for flag in flags:
            check_flag(flag, "replace_stride_with_dilation")
        check_flag(zero_init_residual, "zero_init_residual")
        check_keep(keep_activations)
        check_flag(fused, "fused")
        check_callable(norm_layer, "norm_layer")
        dilate = [False, *(flags or [False] * (len(layers) - 1))]
        block = block if fused else cast(type[ResidualBlock], PLAIN.get(block, block))
        _check(block, fused, layers, dilate, stem, shortcut, zero_init_residual)
        for name, value in {
            "num_classes": num_classes, "groups": groups, "width_per_group": width_per_group,
            "planes": planes, "in_channels": in_channels,
        }.items():  # fmt: skip
            integer(value, name, "a positive integer", 1)
        if not fused and impl != "auto":
            raise ValueError(f"impl: expected 'auto' with fused=False, got {impl!r}")
        self.fused, self.impl, self.keep_activations = fused, check_impl(impl), keep_activations
        self.stages = len(layers)
        norm_layer = norm_layer or nn.BatchNorm2d
        options = {"impl": impl, "keep_activations": keep_activations} if fused else {}

        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, planes, kernel, stride, kernel // 2, bias=False)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels, dilation = planes, 1
        for i, count in enumerate(layers):
            stride, before = 1 if i == 0 else 2, dilation
            if dilate[i]:
                stride, dilation = 1, dilation * stride
            stage = []
            for j in range(count):
                steps, spread = (stride, before) if j == 0 else (1, dilation)
                changes = steps != 1 or channels != planes * block.expansion
                stage.append(
                    block(
                        channels, planes, steps, None, groups, width_per_group, spread, norm_layer,
                        shortcut=None if shortcut == "zero_pad" and not changes else shortcut,
                        **options,
                    )
                )  # fmt: skip
                channels = stage[-1].out_channels
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            planes *= 2
        if block.preactivation:
            cast(Any, self).layer1[0].bn1 = None
            self.bn_last = norm_layer(channels)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        self.switch(fused)
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():  # second pass: a block precedes its convolutions
            if zero_init_residual and isinstance(module, ResidualBlock):
                last = "conv" if module.preactivation else "bn"
                nn.init.zeros_(getattr(module, f"{last}{module.depth}").weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] for x [N, in_channels, H, W]."""
        logits = infer_again(self, x, self.impl)
        if logits is not None:
            return logits
        stages = [getattr(self, f"layer{i}") for i in range(1, self.stages + 1)]
        stem, pooled = self._stem()
        if not self.fused or not fusible(x, stem):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            chains = self._chains(stages, x) if pooled and not self.training else None
            y = None
            if chains is not None:
                y = run_inference((stem, *chains), x, self.impl, self._everything)
            if y is not None:  # one call ran stem and stages
                x, stages = y, []
            else:
                x = self._run(stem, x)
                x = x if pooled else self.maxpool(x)
        for stage in stages:
            x = stage(x)
        head = self._head()
        if head is not None:
            fused = self.fused and fusible(x, head)
            x = self._run(head, x) if fused else self.relu(self.bn_last(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def _stem(self) -> tuple[Parts, bool]:
        """The stem as a chain, and whether the chain includes the pooling."""
        ends = refusal(self.maxpool, (nn.MaxPool2d,)) is None
        bn, pool = cast(Any, self.bn1), cast(Any, self.maxpool if ends else None)
        stem = Parts((self.conv1,), (None, bn), True, "none", pool=pool, around=(self.relu,))
        return stem, ends or refusal(self.maxpool, (nn.Identity,)) is None

    def _head(self) -> Parts | None:
        """BatchNorm and ReLU after the last addition of pre-activation blocks, or None."""
        norm: Any = self._modules.get("bn_last")
        return None if norm is None else Parts((), (norm,), True, "none", around=(self.relu,))

    def chains(self) -> list[Parts]:
        """The chains that the net itself runs: its stem, and its head if it has one."""
        return [parts for parts in (self._stem()[0], self._head()) if parts is not None]

    def _chains(self, stages: Sequence[nn.Module], x: Tensor) -> list[Parts] | None:
        """The chains of all blocks; None if running them differs from calling the stages."""
        chains = []
        for stage in stages:
            if refusal(stage, (nn.Sequential,)) is not None:
                return None
            for block in stage._modules.values():
                if not isinstance(block, Fused) or type(block).forward is not Fused.forward:
                    return None
                if hooked(block) or "forward" in vars(block):
                    return None
                parts = block.parts() if block.impl == self.impl else None
                if parts is None or not fusible(x, parts):
                    return None
                chains.append(parts)
        return chains

    def _everything(self) -> Everything:
        """All modules, and the ops after the stages; none if there are other ops than these."""
        pool, fc = self.avgpool, self.fc
        own = refusal(pool, (GlobalAvgPool2d,)) or refusal(fc, (nn.Linear,))
        if own is not None or pool.impl != self.impl or self._head() is not None:
            return [], []
        pooling = "resnet_fast_native::global_avg_pool", ()
        return list(self.modules()), [pooling, ("aten::linear", (fc.weight, fc.bias))]

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that `torch.jit.script` compiles: the plain children in sequence."""
        children = dict(copy_modules(self).named_children()) | {"flatten": nn.Flatten()}
        names = ["conv1", "bn1", "relu", "maxpool"]
        names += [f"layer{i}" for i in range(1, self.stages + 1)]
        if "bn_last" in children:
            children["relu_last"] = children["relu"]
            names += ["bn_last", "relu_last"]
        names += ["avgpool", "flatten", "fc"]
        return nn.Sequential(OrderedDict((name, children[name]) for name in names))

    def switch(self, fused: bool) -> None:
        """Run stem and pooling fused by `self.impl`, or plain; blocks do not change."""
        pool: Any = self.avgpool
        self.fused = fused
        if fused and type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)):
            pool.__class__ = GlobalAvgPool2d
        elif not fused and type(pool) is GlobalAvgPool2d:
            cast(Any, pool).__class__ = nn.AdaptiveAvgPool2d
        if type(pool) is GlobalAvgPool2d:
            pool.impl = self.impl

    def _run(self, parts: Parts, x: Tensor) -> Tensor:
        return run_fused(parts, x, impl=self.impl, keep_activations=self.keep_activations)

    def extra_repr(self) -> str:
        return f"impl={self.impl!r}" if self.fused else "fused=False"


def _check(block, fused, layers, dilate, stem, shortcut, zero_init_residual) -> None:
    kind = isinstance(block, type) and issubclass(block, ResidualBlock)
    if not kind or issubclass(block, Fused) != fused:
        raise ValueError(f"block: expected a residual block class of resnet_fast, got {block!r}")
    if len(layers) == 0:
        raise ValueError("layers: expected the number of blocks of at least one stage, got none")
    for count in layers:
        integer(count, "layers", "a positive integer", 1)
    if len(dilate) != len(layers):
        raise ValueError(
            f"replace_stride_with_dilation: expected {len(layers) - 1} flags, one per stage after "
            f"the first, got {len(dilate) - 1}"
        )
    if stem not in STEMS:
        raise ValueError(f"stem: expected one of {STEMS}, got {stem!r}")
    if zero_init_residual and shortcut == "none":
        raise ValueError("zero_init_residual: a net with shortcut='none' would output zeros")
