"""What a convolution is surrounded by, which kernel can take it, and with which tiles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import settings
from ..spec.chain import Conv
from ..spec.layout import memory_format
from .config_select import Config, Configs
from .launch import INTERPRETING, target
from .sizes import cdiv, next_power_of_2

# GEMM_M, GEMM_N, GEMM_K of a tile (GEMM_K in 2-byte elements), warps, stages of the pipeline
CONFIGS = (
    (128, 256, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 5),
    (64, 32, 64, 4, 5),
)
POINTER_CONFIGS = (
    (128, 128, 64, 8, 3),
    (128, 64, 32, 8, 4),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 32, 64, 4, 3),
)
FLAT_CONFIGS = ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3), (64, 16, 32, 4, 3))
IEEE_CONFIGS = ((64, 64, 32, 8, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 3))
DOUBLE_CONFIGS = ((64, 64, 64, 8, 2), (32, 32, 64, 8, 2))
DGRAD_CONFIGS = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3))
WGRAD_CONFIGS = ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 32, 64, 4, 3))
DOUBLE_WGRAD_CONFIGS = ((32, 32, 256, 8, 2),)
FUSED, LIBRARY = (1,), (0,)  # plans of a convolution forward: one launch, or the library and passes


class Fusion(NamedTuple):
    """What a convolution does besides, all of it optional.

    On load: x becomes relu(in_scale·x + in_shift), zero where the padding is.
    On store: y = relu(BN(z + bias) + res_scale·residual + res_shift), and with `stats` the mean and
    centred second moment of every channel of y as stored.
    """

    bias: Tensor | None = None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    res_scale: Tensor | None = None
    res_shift: Tensor | None = None
    in_scale: Tensor | None = None
    in_shift: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    relu: bool = True
    stats: bool = False

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """The channel vectors in the order in which the kernels take them."""
        return self[:9]


class GradOut(NamedTuple):
    """What makes the gradient dz of a convolution's output: a·dy' + b·(z − mean) + c.

    dy' is dy where the bits of `mask` are set; what is None is left out, b with z, mean and c.
    """

    mask: Tensor | None = None
    a: Tensor | None = None
    z: Tensor | None = None
    mean: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None


class GradIn(NamedTuple):
    """What is done to the gradient of a convolution's input x, and what x was seen through.

    residual, under its mask, is added; φ(x) = relu(scale·x + shift) was the convolution's input;
    with mean and rstd the sums of the normalization that scale and shift are of are wanted.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    residual: Tensor | None = None
    residual_mask: Tensor | None = None


NOTHING = GradIn()


class Plan(NamedTuple):
    """Who does what of conv_bprop: 1 is a kernel of ours, 0 is a pass of its own or the library.

    on_load: dz and φ(x) are made by the kernels that use them. As long as one of the gradients is
    the library's there must be a dz in memory, and then both read it.
    """

    on_load: int
    dgrad: int
    wgrad: int


PLANS = (Plan(1, 1, 1), Plan(0, 1, 1), Plan(0, 1, 0), Plan(0, 0, 1), Plan(0, 0, 0))


class Plans(NamedTuple):
    """What may run a convolution: plans, the one to take until a GPU has measured them, and why."""

    plans: Configs
    rule: int
    why: str


def forward_plans(x: Tensor, w: Tensor, conv: Conv, training: bool) -> Plans:
    """FUSED, one launch of ours, or LIBRARY, cuDNN's convolution between passes of ours.

    Inference fuses. Training takes the library where there are no tensor descriptors, but not in
    double, which gathers: that choice is to be measured.
    """
    plans, why = _asked((FUSED, LIBRARY), FUSED)
    refusal = refuse_tma(x, w, conv)
    if len(plans) == 1:
        return Plans(plans, 0, why)
    if not training or x.dtype == torch.float64 or refusal is None:
        return Plans(plans, plans.index(FUSED), "one launch")
    return Plans(plans, plans.index(LIBRARY), f"no tensor descriptors: {refusal}")


def backward_plans(x: Tensor, w: Tensor, conv: Conv) -> Plans:
    """Plans of both gradients.

    Ours where descriptors can; 1x1 with everything on load, as memory bounds it. A larger filter
    would make dz and φ(x) again for each tap, which by estimate takes longer than the tensor cores
    do: there they are made once, and in double. The stem's 49 taps of three channels fill no tile.
    In double all else is ours, by pointers.
    """
    refusal = refuse_gradients(x, w, conv)
    if refusal is not None:
        return Plans(PLANS[-1:], 0, f"no kernel: {refusal}")
    # Not in double: Triton 3.6 compiles no bit mask beside its product. The interpreter runs it.
    masks_on_load = x.dtype != torch.float64 or INTERPRETING
    plans, why = _asked(PLANS if masks_on_load else PLANS[1:], *PLANS[:2])
    taps = w.size(2) * w.size(3)
    refusal = None if x.dtype == torch.float64 else refuse_tma(x, w, conv)
    if refusal is not None or taps > 9:
        best, reason = PLANS[-1], f"no tensor descriptors: {refusal}" if refusal else "many taps"
    elif taps == 1 and masks_on_load:
        best, reason = PLANS[0], "1x1: dz and its input made on load"
    else:
        best, reason = PLANS[1], "several taps: dz and its input made once"
    return Plans(plans, plans.index(best), reason) if best in plans else Plans(plans, 0, why)


def _asked(plans: Configs, *fused: Config) -> tuple[Configs, str]:
    """Those of `plans` that RESNET_FAST_TRITON_CONV leaves, the last of them the library's."""
    asked = settings.TRITON_CONV.read()
    if asked == "library":
        plans = plans[-1:]
    elif asked == "fused":
        plans = tuple(plan for plan in plans if plan in fused)
    return plans, f"{settings.TRITON_CONV.variable}={asked}"


def refuse_tma(x: Tensor, w: Tensor, conv: Conv, *beside: Tensor | None) -> str | None:
    """Why the descriptor kernel cannot run this convolution; None when it can.

    beside: other activations that it is to move.
    """
    if not target(x).has_tma:
        return "the GPU has no tensor descriptors (sm_90 and later)"
    if x.dtype == torch.float64:
        return "descriptors carry no fp64"
    if x.dtype == torch.float32 and precision(x) == "ieee":
        return "fp32 without tf32 multiplies on CUDA cores"
    if conv.groups != 1:
        return "groups"
    dense = [t for t in (x, w, *beside) if t is not None]
    if any(memory_format(t) != torch.channels_last and not flat(t) for t in dense):
        return "NCHW"
    size = x.element_size()
    if w.size(1) * size % 16 or w.size(0) * size % 16:
        return "channels or filters are no multiple of 16 bytes"
    if any(t.data_ptr() % 16 for t in dense):
        return "a tensor does not start at a multiple of 16 bytes"
    if conv.stride == (2, 2):
        if x.size(2) % 2 or x.size(3) % 2 or w.size(1) * size % 128:
            return "stride 2 over an odd size, or channels that are no multiple of 128 bytes"
    elif conv.stride != (1, 1):
        return f"stride {conv.stride}"
    return None


def flat(x: Tensor) -> bool:
    """Whether dense x is NHWC whatever its strides say: one channel, or one pixel an image."""
    return x.size(1) == 1 or x.size(2) * x.size(3) == 1


def precision(x: Tensor) -> str:
    """How fp32 is multiplied: "tf32" only where `torch.backends.cudnn` allows it."""
    exact = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return "ieee" if exact or x.dtype == torch.float64 else "tf32"


@functools.cache
def box_of(block_m: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """Sides (powers of two, product `block_m`) of the box that covers N × P × Q in fewest boxes.

    Of equals the one whose rows are longest: 56 = 7·8, 28 = 7·4, 14 = 7·2 leave nothing over.
    """
    powers = [1 << i for i in range(block_m.bit_length())]
    boxes = [(block_m // (bp * bq), bp, bq) for bq in powers for bp in powers if bp * bq <= block_m]

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        count = cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2])
        return count, -box[2], -box[1]

    return min((box for box in boxes if max(box) <= 256), key=cost)


def eligible(configs: Configs, filters: int, shared: int) -> Configs:
    """Those of `configs` no wider than the filters need, whose stages fit in `shared` bytes."""
    narrowest = min(config[1] for config in configs)
    width = max(narrowest, next_power_of_2(filters))
    return tuple(
        config
        for config in configs
        if config[1] <= width and (config[0] + config[1]) * config[2] * 2 * config[4] <= shared
    )


def refuse_gradients(x: Tensor, w: Tensor, conv: Conv) -> str | None:
    """Why the kernels of both gradients cannot run this convolution at all; None when they can."""
    if conv.groups != 1:
        return "groups"
    if memory_format(x, w) != torch.channels_last:
        return "NCHW"
    if conv.stride != (1, 1) and (conv.stride != (2, 2) or conv.dilation != (1, 1)):
        return f"stride {conv.stride}, dilation {conv.dilation}"
    if max(x.numel() // x.size(1), 1) >= 2**31 - 512:
        return "2^31 pixels"
    return None


def double_configs(x: Tensor) -> Configs:
    """Configurations in double: the smaller tile where Triton multiplies doubles by no tensor core
    (sm_100 and later), whose operands are in registers.
    """
    return DOUBLE_CONFIGS[1:] if target(x).capability >= 100 else DOUBLE_CONFIGS


def gradient_configs(x: Tensor, w: Tensor, tma: bool, grad_out: GradOut) -> Configs:
    """Configurations of `conv_dgrad`: dz as GEMM_M × GEMM_K from one tensor or two, C wide."""
    if x.dtype == torch.float64:
        return eligible(double_configs(x), w.size(1), target(x).shared)
    if not tma and precision(x) == "ieee":
        return eligible(IEEE_CONFIGS, w.size(1), target(x).shared)
    pieces = 1 + (grad_out.z is not None)
    return tuple(
        config
        for config in eligible(DGRAD_CONFIGS, w.size(1), target(x).shared)
        if (pieces * config[0] + config[1]) * config[2] * 2 * config[4] <= target(x).shared
    )


def wgrad_configs(x: Tensor, w: Tensor, tma: bool, grad_out: GradOut) -> Configs:
    """Configurations of `conv_wgrad`: GEMM_M filters, GEMM_N channels, GEMM_K pixels."""
    if x.dtype == torch.float64:
        return DOUBLE_WGRAD_CONFIGS
    pieces = 1 + (grad_out.z is not None)
    # Addresses of two pieces beside the widest tile's sums are more registers than there are.
    configs = WGRAD_CONFIGS[1:] if pieces > 1 and not tma else WGRAD_CONFIGS
    configs = eligible(configs, w.size(1), target(x).shared)
    tallest = max(64, next_power_of_2(w.size(0)))
    fits = tuple(
        config
        for config in configs
        if config[0] <= tallest
        and (pieces * config[0] + config[1]) * config[2] * 2 * config[4] <= target(x).shared
    )
    return fits


def gradient_key(
    x: Tensor, w: Tensor, conv: Conv, grad_out: GradOut, grad_in: GradIn
) -> tuple[Any, ...]:
    """What a table of tiles or of plans is looked up by."""
    kinds = (
        ("mask", grad_out.mask), ("frozen", grad_out.a if grad_out.b is None else None),
        ("bn", grad_out.b),
        ("relu", grad_in.scale), ("sums", grad_in.mean), ("residual", grad_in.residual),
    )  # fmt: skip
    return _key(x, w, conv, kinds)


def pick(configs: Configs, pixels: int, filters: int, processors: int) -> int:
    """The rule: the first tile whose grid fills the GPU, else the last, which is the smallest."""
    for i, config in enumerate(configs):
        if cdiv(pixels, config[0]) * cdiv(filters, config[1]) >= processors:
            return i
    return len(configs) - 1


def key(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> tuple[Any, ...]:
    """What a table of tiles is looked up by."""
    kinds = (
        ("prologue", f.in_scale), ("residual", f.residual), ("scaled", f.res_scale),
        ("stats", f.stats or None),
    )  # fmt: skip
    return _key(x, w, conv, kinds)


def _key(x: Tensor, w: Tensor, conv: Conv, kinds: Sequence[tuple[str, Any]]) -> tuple[Any, ...]:
    shapes = ("x".join(map(str, t.shape)) for t in (x, w))
    kind = "+".join(name for name, there in kinds if there is not None) or "plain"
    stride = "x".join(map(str, conv.stride))
    return *shapes, f"stride{stride}", f"groups{conv.groups}", kind, x.dtype, precision(x)
