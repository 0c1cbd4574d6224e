"""List every launch of a model's step, on any machine.

The model runs on meta tensors under `launch.compile_for`: the package's launchers choose kernels,
tiles and grids for a GPU that need not exist here. The list also has the PyTorch operators between
them. Nothing is computed or compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

import resnet_fast
from bench.step import Case
from resnet_fast.dispatch import ops
from resnet_fast.runtime.recording import MEMORY
from resnet_fast.spec.dtypes import PRECISIONS
from resnet_fast.spec.layout import memory_format

aten = torch.ops.aten
NO_LAUNCH = MEMORY | {aten.as_strided_.default}


@dataclass(frozen=True)
class Launch:
    """`count` equal launches.

    kernel: a Triton kernel, or None, with an unknown grid, for a PyTorch operator ("aten.…") and
    for each product of a convolution ("cudnn fprop", "cudnn dgrad", "cudnn strided dgrad", "cudnn
    wgrad"). arguments: by the kernel's parameter names; without a kernel the tensors, of a product
    its operands and result. flops: only without a kernel.
    """

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    kernel: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    flops: int = 0
    count: int = 1

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it reads or writes, each once, including those of descriptors."""
        return list({id(t): t for t in tensors_in(tuple(self.arguments.values()))}.values())

    @property
    def code(self) -> tuple[Any, ...]:
        """What the compiled code depends on; launches of equal code are compiled once.

        Triton specializes on integers that are 1, a multiple of 16 or wider than 32 bits.
        """
        parts: list[Any] = [self.name, *sorted(self.options.items())]
        for parameter in () if self.kernel is None else self.kernel.params:
            parts.append(_kind(self.arguments[parameter.name], parameter.is_constexpr))
        return tuple(map(str, parts))

    @property
    def key(self) -> str:
        """Key of equal launches: code, grid and all arguments except tensor addresses."""
        return str((self.code, self.grid, [(n, _shape(v)) for n, v in self.arguments.items()]))


def _kind(value: Any, is_constexpr: bool) -> Any:
    if isinstance(value, tuple):
        return [_kind(v, is_constexpr) for v in value]
    if isinstance(value, int) and not is_constexpr:
        return value == 1, value % 16 == 0, value >= 2**31
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(getattr(value, "base", None), Tensor):
        return value.base.dtype, *value.block_shape
    return value


def _shape(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_shape(v) for v in value]
    base = getattr(value, "base", value)
    return (*base.shape, base.dtype) if isinstance(base, Tensor) else value


def launches_of(case: Case, target: Any) -> list[Launch]:
    """The launches of one step of `case` on `target` (`kernels.launch.Target`), equal ones counted.

    They are in order of first appearance. The step is that of `bench.step`, by the Triton kernels
    and RESNET_FAST_TRITON_CONV. In training the classifier's parameters count as already cast by
    autocast, and there is no optimizer update. Raises as `launches_by`.
    """
    return launches_by(lambda: _step(case), target)


def launches_by(run: Callable[[], object], target: Any) -> list[Launch]:
    """The launches of `run()`, which calls the package's ops on meta tensors.

    Raises:
        ImportError: Triton is missing.
        ValueError: Triton interprets its kernels, which then have no launches.
    """
    from resnet_fast.kernels import launch

    if launch.INTERPRETING:
        raise ValueError("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    found: dict[str, Launch] = {}

    def add(one: Launch) -> None:
        key = one.key
        found[key] = replace(one, count=found[key].count + 1) if key in found else one

    def sink(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, _outlines(args), strict=True))
        add(Launch(kernel.fn.__name__, tuple(grid), arguments, kernel, dict(options)))

    with launch.compile_for(target, sink, every=False), _Operators(add):
        run()
    return list(found.values())


def _step(case: Case) -> None:
    """A step on meta tensors."""
    dtype = PRECISIONS[case.dtype]
    with _disable_current_modes(), torch.device("meta"):  # making a model launches nothing
        net = resnet_fast.create_model(case.model, impl="triton")
        x = torch.empty(case.batch, 3, case.image_size, case.image_size)
        target = torch.zeros(case.batch, dtype=torch.long)
        net = net.to(memory_format=torch.channels_last).train(case.mode == "train")
        x = x.contiguous(memory_format=torch.channels_last)
        if case.mode == "infer":
            net, x = net.to(dtype), x.to(dtype)
        else:
            net.fc.to(dtype)
    if case.mode == "infer":
        with torch.inference_mode():
            net(x)
        return
    loss = F.cross_entropy(net(x.to(dtype)).float(), target)
    loss.backward()


class _Operators(TorchDispatchMode):
    """Sends the package's ops to their Triton launchers and lists PyTorch's own launches."""

    def __init__(self, add: Any) -> None:
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        from resnet_fast import kernels

        kwargs = kwargs or {}
        if func in ops.IMPLEMENTATIONS:
            with self:
                return kernels.OPS[func._schema.name.partition("::")[2]](*args[:-1])
        if func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is aten.convolution.default:  # cuDNN keeps channels_last, the meta kernel does not
            result = result.contiguous(memory_format=memory_format(args[0], args[1]))
            self._add_product("fprop", *args[:2], result, args[3])
        elif func is aten.convolution_backward.default:
            for gradient, result_of_it in zip(("dgrad", "wgrad"), result[:2], strict=True):
                if result_of_it is not None:
                    x = args[1] if gradient == "wgrad" else result_of_it
                    self._add_product(gradient, x, args[2], args[0], args[4])
        elif func not in NO_LAUNCH and not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=result)
            name = str(func).rpartition(".")[0]
            self._add_operator(name, tensors_in((args, tuple(kwargs.values()), result)), flops)
        return result

    def _add_product(self, kind: str, x: Tensor, w: Tensor, y: Tensor, stride: Any) -> None:
        """A product of a convolution of x; a 1x1 filter reads the pixels of its stride only."""
        if kind == "dgrad" and max(stride) > 1:
            kind = "strided dgrad"
        elif w.size(2) * w.size(3) == 1:
            x = x[:, :, :: stride[0], :: stride[1]]
        self._add_operator(f"cudnn {kind}", [x, w, y], 2 * y.numel() * w[0].numel())

    def _add_operator(self, name: str, tensors: Sequence[Tensor], flops: int) -> None:
        if tensors:
            named = {str(i): t for i, t in enumerate(_outlines(tensors))}
            self._add(Launch(name, (), named, flops=flops))


def _outlines(values: Sequence[Any]) -> list[Any]:
    """`values` with each tensor replaced by a new one of the same shape.

    Autograd takes over a gradient only if nothing else holds it, and copies it otherwise.
    """
    known: dict[int, Tensor] = {}

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device="meta"
                )
            return known[id(value)]
        if isinstance(getattr(value, "base", None), Tensor):
            return replace(value, base=outline(value.base))
        return tuple(map(outline, value)) if isinstance(value, tuple) else value

    with _disable_current_modes():
        return [outline(value) for value in values]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, with those of descriptors."""
    value = getattr(value, "base", value)  # of a descriptor
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [t for v in value for t in tensors_in(v)]
    return []
