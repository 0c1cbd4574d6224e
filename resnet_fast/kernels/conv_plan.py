"""Plans of a convolution: what is fused with it, which kernels can run it, with which tiles."""

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
from .conv_cost import (
    FEW,
    GAP,
    HOST,
    Gemm,
    by_library,
    by_native,
    microseconds,
    native_tile,
    with_fold,
    with_moments,
    with_pass,
)
from .conv_split import with_splits
from .launch import Target, target
from .sizes import cdiv, next_power_of_2

# GEMM_M, GEMM_N, GEMM_K of a tile (GEMM_K in 2-byte elements), warps, stages of the pipeline
NARROW = (
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 5),
    (64, 32, 64, 4, 5),
)
CONFIGS = ((128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (256, 64, 64, 8, 3), *NARROW)
# The same numbers, then the programs that a multiprocessor runs at a time
MOMENTS_CONFIGS = (
    (128, 128, 64, 8, 3, 1),
    (256, 64, 64, 8, 3, 1),
    (128, 64, 64, 8, 3, 2),
    (64, 64, 64, 4, 3, 4),
    (64, 32, 64, 4, 4, 4),
)
# sm_100 and later: a thread has one row of the tile, so sums take more registers
MOMENTS_CONFIGS_100 = ((128, 64, 64, 8, 3, 1), (64, 64, 64, 4, 3, 2), (64, 32, 64, 4, 4, 4))
POINTER_CONFIGS = (
    (256, 64, 32, 8, 3),
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
LIBRARY_GAIN = 1.1  # least estimated gain for which cuDNN and a pass replace one launch
# Forward plans: one launch; cuDNN between separate passes, or for `conv_add_projection` two calls;
# cuDNN's own fused launch.
FUSED, LIBRARY, CUDNN = (1,), (0,), (2,)


class Source(NamedTuple):
    """A residual that is the projection scale·conv1x1(x, w) + shift, with `stride`."""

    x: Tensor
    w: Tensor
    stride: int
    scale: Tensor | None = None
    shift: Tensor | None = None


class Fusion(NamedTuple):
    """Operations fused into a convolution, all optional.

    y = relu(scale·z + shift + residual). Vectors have the accumulation dtype. The residual may
    instead be the projection of a `source`. stats: also the mean and centred second moment of
    every channel of y as stored, where y = z.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = True
    stats: bool = False
    source: Source | None = None

    @property
    def plain(self) -> bool:
        """Whether no moments or projection take registers beside the tile."""
        return not self.stats and self.source is None


STATS = Fusion(relu=False, stats=True)


class GradIn(NamedTuple):
    """Epilogue of dgrad: dx + residual where scale·x + shift > 0, else 0.

    residual is added where the bits of its mask are set. With mean and rstd, those of the
    normalization that gave scale and shift, the sums Σdx and Σdx·xhat(x) are computed too.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    residual: Tensor | None = None
    residual_mask: Tensor | None = None


NO_EPILOGUE = GradIn()


class Plan(NamedTuple):
    """Kernels of conv_bprop: 1 is a Triton kernel; 0 is cuDNN, and after dgrad a separate pass."""

    dgrad: int
    wgrad: int


PLANS = (Plan(1, 1), Plan(1, 0), Plan(0, 1), Plan(0, 0))


class Plans(NamedTuple):
    """Candidate plans of a convolution, the index of the rule's choice, and its reason."""

    plans: Configs
    rule: int
    why: str


def forward_plans(x: Tensor, w: Tensor, conv: Conv, f: Fusion, training: bool) -> Plans:
    """FUSED, one Triton launch, or LIBRARY, cuDNN's convolution between Triton passes.

    A tuning table may also name CUDNN, its convolution with bias, addition and ReLU, in inference.
    Rule: in 16 bits on Hopper LIBRARY if its estimated time is shorter (`conv_cost`) by more than
    the estimates' error, else FUSED. In training LIBRARY takes at least HOST, because the GPU waits
    for the host in a step of small tensors. Elsewhere inference takes FUSED. So does training, but
    LIBRARY where tensor descriptors cannot be used, except in fp64, by pointers, which is still to
    be measured, and on Hopper in 16 bits and channels_last for few channels, for which cuDNN is
    slow.
    """
    own = x.is_cuda and x.element_size() == 2 and f.scale is not None and f.relu
    own = own and memory_format(x, w) == torch.channels_last
    plans, why = _asked((FUSED, CUDNN, LIBRARY) if own else (FUSED, LIBRARY), FUSED)
    refusal = refuse_tma(x, w, conv)
    if len(plans) == 1:
        return Plans(plans, 0, why)
    if refusal is None and _estimated(x):
        passed = int(f.stats) if training else 2 + (f.residual is not None)
        fused, library = fused_us(x, w, conv, f), with_pass(gemm_of(x, w, conv, f), passed)
        library = max(library, HOST) if training else library
        said = f"estimate {fused:.0f} us by Triton, {library:.0f} us by cuDNN and a pass"
        best = FUSED if fused <= LIBRARY_GAIN * library else LIBRARY
        return Plans(plans, plans.index(best), said)
    few = training and x.size(1) < FEW and conv.groups == 1 and _estimated(x)
    few = few and memory_format(x, w) == torch.channels_last
    if not training or x.dtype == torch.float64 or refusal is None or few:
        return Plans(plans, plans.index(FUSED), "few channels" if few else "one launch")
    return Plans(plans, plans.index(LIBRARY), f"no tensor descriptors: {refusal}")


def projection_plans(
    x: Tensor, w: Tensor, conv: Conv, f: Fusion, stride: tuple[int, ...]
) -> Plans:
    """FUSED, one launch for a convolution and the projection of its residual, or LIBRARY, two calls
    of `conv_bn_act`; `stride` is the projection's.

    Rule: FUSED where tensor descriptors can be used, if its estimated time is shorter.
    """
    source = f.source
    assert source is not None
    refusal = refuse_tma(x, w, conv) or refuse_tma(source.x, source.w, Conv(stride))
    if refusal is not None:
        return Plans((LIBRARY,), 0, f"no tensor descriptors: {refusal}")
    plans, why = _asked((FUSED, LIBRARY), FUSED)
    if len(plans) == 1:
        return Plans(plans, 0, why)
    one, half = fused_us(x, w, conv, f), Fusion(f.scale, f.shift, relu=f.relu)
    two = planned_us(x, w, conv, half._replace(residual=x)) + GAP
    two += planned_us(source.x, source.w, Conv(stride), half)
    said = f"estimate {one:.0f} us together, {two:.0f} us in two calls"
    return Plans(plans, plans.index(FUSED if one <= two else LIBRARY), said)


def implementations_us(x: Tensor, w: Tensor, conv: Conv, residual: bool) -> dict[str, float]:
    """Estimated times of `conv_bn_act` by "triton", with its best plan, and by the "native" kernels
    of CUTLASS; {} for tensors and GPUs without an estimate.
    """
    if conv.groups != 1 or not _estimated(x) or refuse_tma(x, w, conv) is not None:
        return {}
    f = Fusion(residual=x if residual else None)
    gemm, processors = gemm_of(x, w, conv, f), target(x).multiprocessors
    native = by_native(native_tile(gemm, processors), gemm, processors)
    return {"triton": planned_us(x, w, conv, f) + GAP, "native": native + GAP}


def planned_us(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> float:
    """Estimated time of `conv_bn_act` in inference, by one launch or by cuDNN and a pass."""
    fused = fused_us(x, w, conv, f)
    moved = 2 + (f.residual is not None)
    return min(fused, with_pass(gemm_of(x, w, conv, f), moved)) if _estimated(x) else fused


def fused_us(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> float:
    """Estimated time of one launch of `conv_tma` or `conv_moments` with its rule's tile."""
    gpu, gemm = target(x), gemm_of(x, w, conv, f)
    if f.stats:
        configs, rule = moments_configs(gemm, gpu)
        return with_moments(configs[rule], gemm, gpu.multiprocessors)
    size = gpu.multiprocessors, gpu.shared
    configs, rule = with_splits(forward_configs(f, w.size(0), gpu.shared), gemm, *size)
    return microseconds(configs[rule], gemm, *size)


def _estimated(x: Tensor) -> bool:
    """Whether `conv_cost` was fitted to such GPUs and dtypes."""
    return target(x).capability == 90 and x.element_size() == 2


def forward_configs(f: Fusion, filters: int, shared: int) -> Configs:
    """Tiles of `conv_tma`: with a projection no wide ones, which would spill on sm_100."""
    return eligible(CONFIGS if f.plain else NARROW, filters, shared)


def moments_configs(gemm: Gemm, gpu: Target) -> tuple[Configs, int]:
    """Tiles of `conv_moments`, and the index of the one of least estimated time."""
    configs = MOMENTS_CONFIGS if gpu.capability < 100 else MOMENTS_CONFIGS_100
    configs = eligible(configs, gemm.filters, gpu.shared)
    times = [with_moments(config, gemm, gpu.multiprocessors) for config in configs]
    return configs, times.index(min(times))


def backward_plans(x: Tensor, w: Tensor, conv: Conv, grad_in: GradIn) -> Plans:
    """Plans of both gradients.

    Rule: in 16 bits on Hopper, each gradient by cuDNN if its estimated time, at least HOST, is
    shorter (`conv_cost`) by more than the estimates' error, else by Triton. Elsewhere Triton where
    tensor descriptors can be used, and in fp64 by pointers. Above 9 taps cuDNN: the stem's 49 of 3
    channels fill no tile.
    """
    refusal = refuse_gradients(x, w, conv)
    if refusal is not None:
        return Plans(PLANS[-1:], 0, f"no kernel: {refusal}")
    plans, why = _asked(PLANS, PLANS[0])
    if len(plans) == 1:
        return Plans(plans, 0, why)
    refusal = None if x.dtype == torch.float64 else refuse_tma(x, w, conv)
    if refusal is not None:
        return Plans(plans, plans.index(PLANS[-1]), f"no tensor descriptors: {refusal}")
    if w.size(2) * w.size(3) > 9:
        return Plans(plans, plans.index(PLANS[-1]), "many taps")
    if not _estimated(x):
        return Plans(plans, plans.index(PLANS[0]), "one launch each")
    pairs = dgrad_us(x, w, conv, grad_in), wgrad_us(x, w, conv)
    times = [(ours, max(library, HOST)) for ours, library in pairs]
    best = Plan(*(int(ours <= LIBRARY_GAIN * library) for ours, library in times))
    said = "; ".join(
        f"{name} {ours:.0f} us by Triton, {library:.0f} us by cuDNN"
        for name, (ours, library) in zip(("dgrad", "wgrad"), times, strict=True)
    )
    return Plans(plans, plans.index(best), f"estimate: {said}")


def dgrad_us(x: Tensor, w: Tensor, conv: Conv, grad_in: GradIn) -> tuple[float, float]:
    """Estimated times of dgrad by one launch of `conv_dgrad`, and by cuDNN and a pass."""
    gpu, gemm = target(x), _dgrad_gemm(x, w, conv, grad_in)
    configs, rule = dgrad_configs(x, w, conv, True)
    ours = microseconds((*configs[rule], 1), gemm, gpu.multiprocessors, gpu.shared)
    passed = (grad_in.scale is not None) + (grad_in.residual is not None)
    kind = "dgrad" if conv.stride == (1, 1) else "strided dgrad"
    return ours, with_pass(gemm, passed + 2 if passed else 0, kind)


def wgrad_us(x: Tensor, w: Tensor, conv: Conv) -> tuple[float, float]:
    """Estimated times of wgrad by `conv_wgrad` and the sum of its splits, and by cuDNN."""
    gemm = gemm_of(x, w, conv, Fusion())
    read = min(1.0, gemm.taps / (conv.stride[0] * conv.stride[1]))  # the part of x that is read
    moved = int(read * x.numel() + gemm.pixels * gemm.filters) * gemm.size
    flops = 2 * gemm.pixels * gemm.filters * gemm.taps * gemm.channels
    config = wgrad_configs(x, w)[0]
    return (
        with_fold(config, gemm, moved, target(x).multiprocessors),
        by_library(moved, flops, min(gemm.filters, gemm.channels), gemm.channels, "wgrad"),
    )


def _asked(plans: Configs, fused: Config) -> tuple[Configs, str]:
    """The subset of `plans` that RESNET_FAST_TRITON_CONV allows; plans[-1] is cuDNN's."""
    asked = settings.TRITON_CONV.read()
    if asked == "library":
        plans = plans[-1:]
    elif asked == "fused":
        plans = (fused,)
    return plans, f"{settings.TRITON_CONV.variable}={asked}"


def refuse_tma(x: Tensor, w: Tensor, conv: Conv, *beside: Tensor | None) -> str | None:
    """Why tensor descriptors cannot be used for this convolution; None when they can.

    beside: other activations that the kernel moves.
    """
    if not target(x).has_tma:
        return "compute capability below 9.0"
    if x.dtype == torch.float64:
        return "fp64"
    if x.dtype == torch.float32 and precision(x) == "ieee":
        return "fp32 without tf32 runs on CUDA cores"
    if conv.groups != 1:
        return "groups"
    dense = [t for t in (x, w, *beside) if t is not None]
    if any(memory_format(t) != torch.channels_last and not flat(t) for t in dense):
        return "NCHW"
    size = x.element_size()
    if w.size(1) * size % 16 or w.size(0) * size % 16:
        return "channels or filters are not a multiple of 16 bytes"
    if any(t.data_ptr() % 16 for t in dense):
        return "a tensor does not start at a multiple of 16 bytes"
    if conv.stride == (2, 2):
        if x.size(2) % 2 or x.size(3) % 2 or w.size(1) * size % 128:
            return "stride 2 with an odd size or channels that are not a multiple of 128 bytes"
    elif conv.stride != (1, 1):
        return f"stride {conv.stride}"
    return None


def flat(x: Tensor) -> bool:
    """Whether dense x is NHWC in memory with any strides: one channel, or one pixel per image."""
    return x.size(1) == 1 or x.size(2) * x.size(3) == 1


def precision(x: Tensor) -> str:
    """Input precision of fp32 products: "tf32" only if `torch.backends.cudnn.allow_tf32`."""
    exact = x.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    return "ieee" if exact or x.dtype == torch.float64 else "tf32"


@functools.cache
def box_of(block_m: int, n: int, p: int, q: int) -> tuple[int, int, int]:
    """Sides (powers of two, product `block_m`) of the box that covers N × P × Q in fewest boxes.

    Ties go to the longest rows. 56 = 7·8, 28 = 7·4 and 14 = 7·2 divide without remainder.
    """
    powers = [1 << i for i in range(block_m.bit_length())]
    boxes = [(block_m // (bp * bq), bp, bq) for bq in powers for bp in powers if bp * bq <= block_m]

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        count = cdiv(n, box[0]) * cdiv(p, box[1]) * cdiv(q, box[2])
        return count, -box[2], -box[1]

    return min((box for box in boxes if max(box) <= 256), key=cost)


def eligible(configs: Configs, filters: int, shared: int) -> Configs:
    """The `configs` that are no wider than `filters` and whose stages fit in `shared` bytes."""
    narrowest = min(config[1] for config in configs)
    width = max(narrowest, next_power_of_2(filters))
    return tuple(
        config
        for config in configs
        if config[1] <= width and (config[0] + config[1]) * config[2] * 2 * config[4] <= shared
    )


def refuse_gradients(x: Tensor, w: Tensor, conv: Conv) -> str | None:
    """Why the dgrad and wgrad kernels cannot run this convolution at all; None when they can."""
    if conv.groups != 1:
        return "groups"
    if memory_format(x, w) != torch.channels_last:
        return "NCHW"
    if conv.stride != (1, 1) and (conv.stride != (2, 2) or conv.dilation != (1, 1)):
        return f"stride {conv.stride}, dilation {conv.dilation}"
    if max(x.numel() // x.size(1), 1) >= 2**31 - 512:
        return "about 2^31 pixels or more"
    return None


def double_configs(x: Tensor) -> Configs:
    """Configurations in fp64: only the smaller tile on sm_100 and later.

    There Triton does not use tensor cores for fp64, and the operands are in registers.
    """
    return DOUBLE_CONFIGS[1:] if target(x).capability >= 100 else DOUBLE_CONFIGS


def dgrad_configs(x: Tensor, w: Tensor, conv: Conv, tma: bool) -> tuple[Configs, int]:
    """Tiles of `conv_dgrad`, GEMM_M pixels of x, GEMM_N channels, GEMM_K filters; the rule's."""
    gpu, channels = target(x), w.size(1)
    if x.dtype == torch.float64:
        configs = double_configs(x)
    else:
        configs = IEEE_CONFIGS if not tma and precision(x) == "ieee" else DGRAD_CONFIGS
    configs = eligible(configs, channels, gpu.shared)
    if tma and conv.stride[0] == 2:  # no box may reach into the other parity
        configs = tuple(config for config in configs if channels % config[1] == 0)
    return configs, pick(configs, x.numel() // channels, channels, gpu.multiprocessors)


def wgrad_configs(x: Tensor, w: Tensor) -> Configs:
    """Tiles of `conv_wgrad`, GEMM_M filters, GEMM_N channels, GEMM_K pixels; first the rule's."""
    if x.dtype == torch.float64:
        return DOUBLE_WGRAD_CONFIGS
    tallest = max(64, next_power_of_2(w.size(0)))
    configs = eligible(WGRAD_CONFIGS, w.size(1), target(x).shared)
    return tuple(config for config in configs if config[0] <= tallest)


def gradient_key(
    x: Tensor, w: Tensor, conv: Conv, grad_in: GradIn = NO_EPILOGUE
) -> tuple[Any, ...]:
    """Key of a gradient in the tables of tiles and plans."""
    kinds = (
        ("relu", grad_in.scale), ("sums", grad_in.mean), ("residual", grad_in.residual),
    )  # fmt: skip
    return _key(x, w, conv, kinds)


def gemm_of(x: Tensor, w: Tensor, conv: Conv, f: Fusion) -> Gemm:
    """The forward convolution as `conv_cost` sees it."""
    filters, channels, r, s = w.shape
    p, q = conv.output_size(x.size(2), r, 0), conv.output_size(x.size(3), s, 1)
    exact = precision(x) == "ieee"
    size = x.element_size()
    rate = 256 if exact else 4096 * 2 // size
    return Gemm(
        x.size(0) * p * q, filters // conv.groups, r * s, channels, conv.groups, size, rate,
        f.residual is not None, 0 if f.source is None else f.source.w.size(1),
    )  # fmt: skip


def _dgrad_gemm(x: Tensor, w: Tensor, conv: Conv, grad_in: GradIn) -> Gemm:
    """dgrad as `conv_cost` sees it: filters and channels change places."""
    filters, channels, r, s = w.shape
    return Gemm(
        x.numel() // channels, channels, r * s, filters, 1, x.element_size(),
        4096 * 2 // x.element_size(), grad_in.residual is not None,
        stride=conv.stride[0], gate=grad_in.scale is not None,
    )  # fmt: skip


def pick(configs: Configs, pixels: int, filters: int, processors: int) -> int:
    """The rule: index of the first tile whose grid fills the GPU, else of the last (smallest)."""
    for i, config in enumerate(configs):
        if cdiv(pixels, config[0]) * cdiv(filters, config[1]) >= processors:
            return i
    return len(configs) - 1


def key(
    x: Tensor, w: Tensor, conv: Conv, f: Fusion, prologue: bool = False
) -> tuple[Any, ...]:
    """Key of a forward convolution in the tables of tiles and plans.

    prologue: whether its input is φ(x).
    """
    source = f.source
    projection = "" if source is None else f"projection{source.w.size(1)}/{source.stride}"
    kinds = (
        ("prologue", prologue or None), ("residual", f.residual), ("stats", f.stats or None),
        (projection, source),
    )  # fmt: skip
    return _key(x, w, conv, kinds)


def _key(x: Tensor, w: Tensor, conv: Conv, kinds: Sequence[tuple[str, Any]]) -> tuple[Any, ...]:
    shapes = ("x".join(map(str, t.shape)) for t in (x, w))
    kind = "+".join(name for name, there in kinds if there is not None) or "plain"
    stride = "x".join(map(str, conv.stride))
    return *shapes, f"stride{stride}", f"groups{conv.groups}", kind, x.dtype, precision(x)
