"""When a call may run fused: one check for resnet_fast's modules and for modules fused by `fuse`.

A fused forward uses only the tensors and numbers of layers. It calls neither the layers nor the
user's code around them. So each layer must behave exactly as its PyTorch class (`refusal`), and
fused ops must support the call (`fusible`). Otherwise the plain forward runs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from ..spec.layers import NORMS, Parts, windows_of

TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor, FunctionalTensor))
LAYERS = (  # the layers of a chain
    nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d, nn.Identity, nn.Sequential,
)  # fmt: skip
FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (*LAYERS, nn.Linear)}
CONV_FORWARD, ITER, CALL = nn.Conv2d._conv_forward, nn.Sequential.__iter__, nn.Module.__call__
CONV, POOL, AROUND = (nn.Conv2d,), (nn.MaxPool2d,), (nn.ReLU, nn.Identity, nn.Sequential)


def fusible(x: Tensor, parts: Parts) -> bool:
    """Whether a fused call on x computes the same as calls of the modules of `parts`."""
    return not plain_call(x) and obstacle(parts) is None


def plain_call(*inputs: Tensor) -> bool:
    """Whether a call on `inputs` must be plain: they are `transformed`, or calls are `watched`."""
    return watched() or any(map(transformed, inputs))


def watched() -> bool:
    """Whether global module hooks or a replaced `nn.Module.__call__` observe every module call."""
    if _has_any_global_hook():
        return True
    return nn.Module.__call__ is not CALL and not torch.compiler.is_compiling()


def obstacle(parts: Parts) -> tuple[nn.Module, str] | None:
    """The first module of `parts` that cannot be fused, and why; None if all can."""
    roles = (
        ((*parts.convs, parts.projection), CONV),
        ((*parts.norms, parts.projection_norm), NORMS),
        (parts.around, AROUND),
        ((parts.pool,), POOL),
    )
    for modules, kinds in roles:
        for module in modules:
            if module is not None and (why := refusal(module, kinds)) is not None:
                return module, why
    return None


def transformed(x: Tensor) -> bool:
    """Whether x needs PyTorch's own ops, because fused ops do not support it.

    True under a transform of `torch.func`, forward-mode AD, `torch.fx`, `torch.jit.trace` or a
    function mode, and for a tensor of another class or layout.
    """
    if type(x) not in TENSORS or forward_ad._current_level >= 0:
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or x.layout is not torch.strided or function_modes()


def function_modes() -> bool:
    """Whether a function mode is active, other than the one of `torch.set_default_device`."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    stack = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in stack)


def refusal(module: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> str | None:
    """Why a fused call cannot replace a call of `module` as one of `kinds`, such as "has hooks".

    None if it can. It runs for every layer at every fused call, so it only reads dictionaries.
    """
    cls = type(module)
    kind = cls if cls in FORWARDS else _kind(cls)
    if kind not in kinds:
        return f"is of class {cls.__name__}, which cannot be fused here"
    held = module.__dict__
    if hooked(module):
        if isinstance(module, LazyModuleMixin):
            return "is lazy; run the model once, then fuse it"
        return "has hooks (weight_norm and pruning are hooks too); remove them to fuse"
    if cls is not kind and "parametrizations" in held["_modules"]:
        return "has parametrizations; remove them to fuse"
    own = (
        cls.forward is not FORWARDS[kind]
        or "forward" in held
        or cls.__call__ is not nn.Module.__call__
    )
    if kind is nn.Conv2d:
        own = own or cls._conv_forward is not CONV_FORWARD or "_conv_forward" in held
    elif kind is nn.Sequential:
        own = own or cls.__iter__ is not ITER
    if own:
        return f"overrides the forward of nn.{kind.__name__} (class {cls.__name__})"
    for name, t in held["_parameters"].items():
        if t is not None and type(t) not in TENSORS:
            return f"has a {name} of class {type(t).__name__}, expected nn.Parameter"
    if kind is nn.Conv2d:
        if module.padding_mode != "zeros":
            return f"has padding_mode={module.padding_mode!r}; only 'zeros' can be fused"
        if isinstance(module.padding, str):
            return f"has padding={module.padding!r}; only integer padding can be fused"
    elif kind is nn.MaxPool2d:
        try:
            windows_of(module)
        except ValueError as reason:
            return f"cannot be fused ({reason})"
    return None


@functools.cache
def _kind(cls: type) -> type[nn.Module] | None:
    """The class of `LAYERS` that `cls` derives from, or None."""
    return next((kind for kind in LAYERS if issubclass(cls, kind)), None)


def hooked(module: nn.Module) -> bool:
    """Whether `module` has forward or backward hooks."""
    held = module.__dict__
    return bool(
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
    )
